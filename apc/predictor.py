"""Predicts, from an FFN's input, which cluster its pattern will fall into (or, in other forms, which neurons it will need).

Shape letters: L layers, E hidden size, H width of the bottleneck, K clusters, D neurons, n tokens.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from apc import ops
from apc.codebook import Codebook
from apc.datamodule import BlockLoader
from apc.errors import UserError
from apc.files import load_tensors, save_tensors, wrong_field
from apc.low_bit import READS, SPACING, LayerScores, LowBitScores
from apc.models import GatedFFN
from apc.patterns import Block, PatternInfo

KIND, VERSION = "apc-predictor", 2
FORMS = ("cluster", "neuron", "low-bit")


@dataclass(frozen=True)
class PredictorConfig:
    form: str = "cluster"  # cluster: logits over the K clusters; neuron: a score for each neuron (Deja Vu's form); low-bit: the same from a copy of weights
    hidden: int = 256  # width of the bottleneck; the low-bit form has one for what tuning adds to the FFN's output only
    bits: int = 1  # low-bit form: of a weight in the copy, 1 to 4
    reads: list[str] = field(default_factory=lambda: ["gate", "up"])  # low-bit form: the projections that are copied, [gate], [up] or [gate,up]
    lookahead: int = 0  # predict from the FFN input of this many layers earlier; the first layers use the first one
    loss: str = "ce"  # ce (neuron form: binary cross-entropy on active), listwise (importance), mix (their sum)
    lr: float = 2e-3  # peak of a one-cycle schedule
    batch: int = 1024  # tokens in a step, over all ranks, all layers at once
    max_epochs: int = 10
    weight_decay: float = 0.01

    def __post_init__(self):
        for key, known in dict(form=FORMS, loss=("ce", "listwise", "mix")).items():
            if getattr(self, key) not in known:
                raise UserError(f"predictor.{key}={getattr(self, key)}: choose {', '.join(known)}")
        for key, least in dict(hidden=1, lookahead=0, batch=1, max_epochs=1).items():
            if getattr(self, key) < least:
                raise UserError(f"predictor.{key} must be at least {least}, got {getattr(self, key)}")
        if self.bits not in SPACING:
            raise UserError(f"predictor.bits must be from {min(SPACING)} to {max(SPACING)}, got {self.bits}")
        if not self.reads or [name for name in READS if name in self.reads] != list(self.reads):
            raise UserError(f"predictor.reads={list(self.reads)}: choose [gate], [up] or [gate,up]")
        if self.lr <= 0 or self.weight_decay < 0:
            raise UserError(f"predictor.lr must be above 0 and predictor.weight_decay not negative, got {self.lr} and {self.weight_decay}")


def at_16_bits(value: Tensor) -> Tensor:
    """float32 rounded to the nearest bfloat16."""
    return value.bfloat16().float()


class Predictor(nn.Module):
    """A bottleneck MLP for every layer, E → H → K (or D) for each site, all layers in one batched product; in the low-bit form `LowBitScores` instead.

    outputs: how many logits each site gets; form, lookahead, bits and reads as in `PredictorConfig`. corrects: whether the bottleneck is also mapped back,
    H → E, to what the FFN's output lacks under its mask (nothing at first: `apc.tuning` trains it). The low-bit form has no bottleneck without that.
    frozen: whether the low-bit copy is held as bits, and can't be trained. thresholds: float32 [L], the least score that a layer's neuron is kept for where
    a token keeps as many as it needs (`apc.thresholds` finds them), or None.
    """

    def __init__(
        self, layers: int, hidden_size: int, hidden: int, outputs: dict[str, int], form: str = "cluster", lookahead: int = 0, provenance=None,
        corrects: bool = False, bits: int = 1, reads: list[str] | None = None, frozen: bool = False, with_thresholds: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("thresholds", torch.zeros(layers) if with_thresholds else None)
        self.layers, self.hidden_size, self.hidden, self.outputs = layers, hidden_size, hidden, dict(outputs)
        self.form, self.lookahead, self.provenance = form, lookahead, provenance or {}
        self.corrects, self.bits, self.reads = corrects, bits, list(reads or READS)
        self.low_bit = None
        if form == "low-bit":
            if list(outputs) != ["neuron"]:
                raise UserError(f"predictor.form=low-bit needs sites=[neuron], got {list(outputs)}")
            self.low_bit = LowBitScores(layers, hidden_size, outputs["neuron"], self.reads, bits, frozen)
        by_bottleneck = self.low_bit is None
        has_bottleneck = by_bottleneck or corrects
        self.reduce = nn.Parameter(torch.empty(layers, hidden_size, hidden)) if has_bottleneck else None
        self.reduce_bias = nn.Parameter(torch.zeros(layers, hidden)) if has_bottleneck else None
        expands = outputs if by_bottleneck else {}
        self.expand = nn.ParameterDict({site: nn.Parameter(torch.empty(layers, hidden, count)) for site, count in expands.items()})
        self.expand_bias = nn.ParameterDict({site: nn.Parameter(torch.zeros(layers, count)) for site, count in expands.items()})
        self.correct = nn.Parameter(torch.zeros(layers, hidden, hidden_size)) if corrects else None
        self.correct_bias = nn.Parameter(torch.zeros(layers, hidden_size)) if corrects else None
        if has_bottleneck:
            nn.init.normal_(self.reduce, std=hidden_size**-0.5)
        for weight in self.expand.values():
            nn.init.normal_(weight, std=hidden**-0.5)

    def source_layer(self, layer: int) -> int:
        """The layer whose FFN input predicts `layer`."""
        return max(layer - self.lookahead, 0)

    def forward(self, hidden: Tensor) -> dict[str, Tensor]:
        """hidden [L, n, E], the FFN inputs → logits float [L, n, K] (neuron and low-bit form: [L, n, D]) per site."""
        sources = torch.tensor([self.source_layer(layer) for layer in range(self.layers)], device=hidden.device)
        if self.low_bit is not None:
            return {"neuron": self.low_bit(hidden[sources].to(self.low_bit.bias.dtype))}
        inner = F.silu(torch.baddbmm(self.reduce_bias.unsqueeze(1), _normalise(hidden[sources], self.reduce.dtype), self.reduce))
        return {site: torch.baddbmm(self.expand_bias[site].unsqueeze(1), inner, weight) for site, weight in self.expand.items()}

    def layer_outputs(self, layer: int, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """One layer's logits [n, K] from hidden [n, E], the FFN input of `source_layer(layer)`, and its correction [n, E], None if it has none."""
        return LayerPredictor({name: value[layer] for name, value in self._by_name().items()}, self.low_bit and self.low_bit.layer(layer))(site, hidden)

    def unbind(self) -> list["LayerPredictor"]:
        """All layers taken apart at once: their gradients become one tensor, where those of `layer_outputs` are a tensor of all layers for each."""
        parts = {name: value.unbind() for name, value in self._by_name().items()}
        scores = [None] * self.layers if self.low_bit is None else self.low_bit.unbind()
        return [LayerPredictor({name: value[layer] for name, value in parts.items()}, scores[layer]) for layer in range(self.layers)]

    def _by_name(self) -> dict[str, Tensor]:
        """The bottleneck's parameters, [L, ...] each."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("low_bit.")}

    def copy(self, provenance: dict | None = None, corrects: bool = False) -> "Predictor":
        """A copy that can be trained, with another provenance, or one that corrects (by nothing yet, where this one does not); without thresholds."""
        header = self._header() | {"provenance": provenance or self.provenance, "corrects": corrects or self.corrects}
        header |= {"frozen": False, "with_thresholds": False}
        made = Predictor(**header)
        if self.low_bit is not None:
            made.low_bit = self.low_bit.thaw()
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("low_bit.") and name != "thresholds"}
        made.load_state_dict({**made.state_dict(), **own})
        return made

    def _header(self) -> dict:
        names = ("layers", "hidden_size", "hidden", "outputs", "form", "lookahead", "provenance", "corrects", "bits", "reads")
        held = {"frozen": self.low_bit is not None and self.low_bit.frozen, "with_thresholds": self.thresholds is not None}
        return {name: getattr(self, name) for name in names} | held

    def rates(self, lr: float) -> list[dict]:
        """Its parameters as an optimizer's groups: those of a score's curve learn ten times as fast as weights, which are of the order of 1 too but many."""
        curve = [] if self.low_bit is None else [self.low_bit.scale, self.low_bit.slope, self.low_bit.power, self.low_bit.bias]
        others = [value for value in self.parameters() if not any(value is one for one in curve)]
        return [{"params": values, "lr": rate} for values, rate in ((others, lr), (curve, 10 * lr)) if values]

    def parameters_read(self, site: str) -> float:
        """Parameters of 16 bits that one layer reads for one token at `site`; reduction and correction count at the first site only."""
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.parameters_read())

    def multiplications(self, site: str) -> int:
        """Products (with what is added to them) that one layer computes for one token at `site`."""
        return self._bottleneck_parameters(site) + (0 if self.low_bit is None else self.low_bit.multiplications())

    def _bottleneck_parameters(self, site: str) -> int:
        own = [weights[site] for weights in (self.expand, self.expand_bias) if site in weights]
        shared = [self.reduce, self.reduce_bias, self.correct, self.correct_bias] if site == next(iter(self.outputs)) else []
        return sum(value[0].numel() for value in (*own, *shared) if value is not None)

    def rounded(self) -> "Predictor":
        """Itself, its parameters rounded to what 16 bits hold, a low-bit copy to its levels: so they are counted, and so they are scored."""
        if self.low_bit is not None:
            self.low_bit = self.low_bit.freeze()
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(at_16_bits(value))
        return self

    def save(self, path: str | Path) -> None:
        save_tensors(Path(path), KIND, VERSION, self._header(), self.state_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Predictor":
        """Raises UserError, naming the file, if it is missing, damaged, or doesn't hold what its header says."""
        header, tensors = load_tensors(Path(path), KIND, VERSION)
        try:
            if wrong := wrong_field(header, _HEADER) or _wrong_value(header):
                raise ValueError(wrong)
            with torch.device("meta"):
                predictor = cls(**header)
            predictor.load_state_dict(tensors, assign=True)
        except (TypeError, ValueError, RuntimeError, KeyError, ArithmeticError, UserError) as error:  # whatever it is that does not go together
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: damaged (its header and tensors don't match: {reason}); make it again") from error
        return predictor.requires_grad_(False).eval()


_HEADER = dict(
    layers=int, hidden_size=int, hidden=int, outputs=dict, form=str, lookahead=int, provenance=dict, corrects=bool, bits=int, reads=list, frozen=bool,
    with_thresholds=bool,
)  # fmt: skip


def _wrong_value(header: dict) -> str | None:
    """The first entry of a header, whose kinds are right, that no predictor has; None if there is none."""
    least = dict(layers=1, hidden_size=1, hidden=1, lookahead=0, bits=1)
    for name, value in header.items():
        counts = name == "outputs" and value and all(type(count) is int and 0 < count < 1 << 30 for count in value.values())
        right = least[name] <= value < 1 << 30 if name in least else counts if name == "outputs" else value in FORMS if name == "form" else True
        if not right:
            return f"{name} is {value!r}"[:100]
    return None


def _normalise(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """To a root mean square of 1 a token, since a window's first tokens are hundreds of times larger than others."""
    return F.rms_norm(hidden.to(dtype), hidden.shape[-1:])


@dataclass(frozen=True, eq=False)  # by its identity, as torch.compile compares what is called
class LayerPredictor:
    """One layer of a `Predictor`. weights: those of its bottleneck, by their names; scores: its low-bit copy, or None."""

    weights: dict[str, Tensor]
    scores: LayerScores | None

    def __call__(self, site: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [n, K] from hidden [n, E], and the correction [n, E], None if it has none."""
        own, inner, correction = self.weights, None, None
        if "reduce" in own:
            inner = F.silu(torch.addmm(own["reduce_bias"], _normalise(hidden, own["reduce"].dtype), own["reduce"]))
        if "correct" in own:
            correction = torch.addmm(own["correct_bias"], inner, own["correct"])
        if self.scores is not None:
            return self.scores(hidden), correction
        return torch.addmm(own[f"expand_bias.{site}"], inner, own[f"expand.{site}"]), correction


def label_rows(loader: BlockLoader, codebook: Codebook, device: torch.device) -> dict[str, Tensor]:
    """The nearest cluster of every row this rank owns, int32 [L, T] per site on the device (other rows: 0)."""
    info = loader.source.info
    labels = {site: torch.zeros(info.layers, info.tokens, dtype=torch.int32, device=device) for site in info.widths}
    for block in loader.whole_blocks(block_fields(codebook, info)):
        if block.tokens:
            block = block.to(device)
            for site, ids in nearest_clusters(codebook, block).items():
                labels[site][:, block.positions] = ids.int()
    return labels


def block_fields(codebook: Codebook, info: PatternInfo) -> list[str]:
    """The fields that `nearest_clusters` needs."""
    return [f"{'importance' if codebook.power else 'patterns'}.{site}" for site in info.widths]


def nearest_clusters(codebook: Codebook, block: Block) -> dict[str, Tensor]:
    """int64 [L, n] per site: the cluster that each row is nearest to."""
    ids = {}
    for site, book in codebook.sites.items():
        rows = block.importance[site] if codebook.power else block.patterns[site]
        shape = rows.shape[:2]
        if codebook.scope == "pooled":
            rows = rows.flatten(0, 1).unsqueeze(0)
        ids[site] = codebook.nearest(rows, book.centroids).reshape(shape)
    return ids


def mixed_profiles(codebook: Codebook, site: str, probabilities: Tensor) -> Tensor:
    """Σ_k p_k · profile_k: probabilities [L, n, K] → expected pattern [L, n, D] (mean 1 over the neurons)."""
    profiles = codebook.sites[site].profiles.to(probabilities.dtype)
    return probabilities @ profiles  # [G, K, D] with G = 1 is shared by all layers


class PredictorModule(LightningModule):
    """Trains a `Predictor` on blocks with FFN inputs; cluster ids come from the codebook, computed once.

    monitor: a block of held-out rows, on which every epoch's figures are measured (top-1, top-5, captured importance and
    energy of the hard and the soft mask, each per layer and over all).
    """

    def __init__(
        self, cfg: PredictorConfig, codebook: Codebook, info: PatternInfo, monitor: Block | None = None, seed: int = 0, log_every: int = 20,
        ffns: list[GatedFFN] | None = None,
    ):  # fmt: skip
        """ffns: the model's, which the low-bit form begins as a copy of; without them it begins as zeros."""
        super().__init__()
        if cfg.loss != "ce" and not info.with_importance:
            raise UserError(f"predictor.loss={cfg.loss} needs importances; set collect.importance=true or predictor.loss=ce")
        self.cfg, self.info, self.codebook, self.monitor, self.log_every = cfg, info, codebook, monitor, log_every
        outputs = {site: codebook.k if cfg.form == "cluster" else D for site, D in info.widths.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = Predictor(info.layers, info.hidden_size, cfg.hidden, outputs, cfg.form, cfg.lookahead, bits=cfg.bits, reads=cfg.reads)
        if cfg.form == "low-bit" and ffns is not None:
            book = codebook.sites["neuron"]
            energy = torch.linalg.vecdot(book.sizes.float().unsqueeze(1), book.profiles.float().transpose(1, 2))
            self.predictor.low_bit.start(ffns, energy.expand(info.layers, -1))
        self.labels: dict[str, Tensor] = {}
        self.history: list[dict] = []
        self.figures: dict = {}

    in_order = False  # blocks come shuffled

    def get_extra_state(self) -> dict:
        return {"history": self.history, "figures": self.figures}

    def set_extra_state(self, state: dict) -> None:
        self.history, self.figures = state["history"], state["figures"]

    def fields(self) -> list[str]:
        """The fields of a block that a step reads."""
        sites, cfg = list(self.info.widths), self.cfg
        active = [f"patterns.{site}" for site in sites] if cfg.form != "cluster" and cfg.loss != "listwise" else []
        importance = [f"importance.{site}" for site in sites] if cfg.loss != "ce" else []
        return ["hidden", *active, *importance]

    def working_bytes(self) -> int:
        """About what training holds on the device besides its batch: weights, gradients and two moments; the codebook and its profiles as
        floats; labels; scores of a step, and shares and weights of every neuron where the loss needs them."""
        neurons = sum(self.info.widths.values()) if self.cfg.loss != "ce" else 0
        step = 8 * 4 * self.info.layers * self.cfg.batch * (sum(self.predictor.outputs.values()) + neurons)
        books = sum(6 * book.profiles.numel() + book.centroids.numel() for book in self.codebook.sites.values())
        labels = 4 * self.info.layers * self.info.tokens * len(self.info.widths)
        return 16 * sum(value.numel() for value in self.parameters()) + step + books + labels

    def on_fit_start(self) -> None:
        self.codebook = self.codebook.to(self.device)
        if self.cfg.form == "cluster":
            self.labels = label_rows(self.trainer.datamodule.loader, self.codebook, self.device)
        if self.monitor is not None:
            self.monitor = self.monitor.to(self.device)

    def configure_optimizers(self):
        groups = self.predictor.rates(self.cfg.lr)
        decay = 0.0 if self.cfg.form == "low-bit" else self.cfg.weight_decay  # towards 0 a level has no meaning
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.lr, weight_decay=decay)
        steps = len(self.trainer.datamodule.loader) * self.cfg.max_epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=max(2, steps), pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, block: Block, batch_index: int) -> Tensor:
        logits = self.predictor(block.hidden)
        loss = sum(self._loss(site, scores, block) for site, scores in logits.items()) / len(logits)
        if not torch.isfinite(loss):
            raise UserError(f"the predictor's loss is not finite at step {self.global_step}; lower predictor.lr (now {self.cfg.lr})")
        step = self.global_step + 1
        if step % self.log_every == 0 or batch_index + 1 == self.trainer.num_training_batches:
            self.history.append({"step": step, "loss": loss.item()})
            self._log({"predictor/step": step, "predictor/loss": loss.item(), "predictor/lr": self.lr_schedulers().get_last_lr()[0]})
        return loss

    def _log(self, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics)

    def _loss(self, site: str, scores: Tensor, block: Block) -> Tensor:
        """Mean over layers and tokens; scores [L, n, K or D]."""
        cfg, terms = self.cfg, []
        if cfg.loss in ("ce", "mix"):
            if cfg.form == "cluster":
                ids = self.labels[site][:, block.positions].long()
                terms.append(F.cross_entropy(scores.flatten(0, 1), ids.flatten()))
            else:
                active = ops.unpack(block.patterns[site], self.info.widths[site])
                terms.append(F.binary_cross_entropy_with_logits(scores, active.to(scores.dtype)))
        if cfg.loss in ("listwise", "mix"):
            weights = block.importance[site].to(scores.dtype).pow(max(self.codebook.power, 1))
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
            terms.append(-(weights * self._log_shares(site, scores)).sum(-1).mean())
        return sum(terms)

    def _log_shares(self, site: str, scores: Tensor) -> Tensor:
        """log of each neuron's predicted share of the token's weight, [L, n, D] (ListNet's top-one probabilities, Cao et al., 2007)."""
        if self.cfg.form != "cluster":
            return scores.log_softmax(-1)
        shares = mixed_profiles(self.codebook, site, scores.softmax(-1)) / self.info.widths[site]
        return shares.clamp_min(1e-12).log()

    def on_train_epoch_end(self) -> None:
        if self.monitor is not None and self.monitor.tokens:
            self.figures = predictor_figures(self.predictor, self.codebook, self.monitor)
            overall = {f"predictor/{name}": sum(values) / len(values) for name, values in self.figures.items()}
            layers = {f"predictor_layers/{name}_{i:02d}": value for name, values in self.figures.items() for i, value in enumerate(values)}
            self._log({"predictor/step": self.global_step} | overall | layers)

    def trained(self, provenance: dict) -> Predictor:
        """The predictor as it stands, on the host."""
        self.predictor.provenance = provenance | {"config": asdict(self.cfg)}
        return self.predictor.cpu().requires_grad_(False).eval().rounded()


def _top_masks(scores: Tensor, sizes: list[int]) -> Tensor:
    """bool [L, n, D]: of scores [L, n, D] each layer's so many largest of every token."""
    return torch.stack([ops.top_mask(layer, m) for layer, m in zip(scores, sizes, strict=True)])


@torch.inference_mode()
def predictor_figures(predictor: Predictor, codebook: Codebook, block: Block) -> dict[str, list[float]]:
    """Per layer, over the block's rows: top-1 and top-5 share (cluster form), and the importance and energy that the predicted
    masks capture, where the block has importances: of the likeliest cluster (`hard`) and of the mixed profiles (`soft`)."""
    figures: dict[str, Tensor] = {}
    ids = nearest_clusters(codebook, block) if predictor.form == "cluster" else {}
    for site, scores in predictor(block.hidden).items():
        D = codebook.widths[site]
        sizes = [codebook.size(site, layer) for layer in range(codebook.layers)]
        masks = {}
        if predictor.form == "cluster":
            best = scores.topk(min(5, scores.shape[-1]), dim=-1).indices
            hits = best == ids[site].unsqueeze(-1)
            figures[f"top1_{site}"], figures[f"top5_{site}"] = hits[..., 0].double().mean(1), hits.any(-1).double().mean(1)
            layers = torch.arange(len(scores), device=scores.device).unsqueeze(1)
            groups = torch.zeros_like(layers) if codebook.scope == "pooled" else layers
            masks["hard"] = ops.unpack(codebook.sites[site].centroids[groups, best[..., 0]], D)
            masks["soft"] = _top_masks(mixed_profiles(codebook, site, scores.float().softmax(-1)), sizes)
        else:
            masks["hard"] = _top_masks(scores.float(), sizes)
        for kind, mask in masks.items() if block.importance else ():
            for name, power in (("importance", 1), ("energy", 2)):
                weights = block.importance[site].double().pow(power)
                share = (weights * mask).sum(-1) / weights.sum(-1).clamp_min(1)
                figures[f"captured_{name}_{kind}_{site}"] = share.mean(1)
    return {name: values.tolist() for name, values in figures.items()}
