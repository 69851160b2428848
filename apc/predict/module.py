"""Trains a predictor on blocks of FFN inputs, all layers at once.

Shape letters: L layers, E hidden size, K clusters, D neurons, n tokens, T tokens of the fit text.
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.patterns import Block, PatternInfo, by_ffn
from apc.config.schema import PredictorConfig, TuneConfig
from apc.data.ffn import FFN
from apc.predict.predictor import Predictor, PredictorHeader
from apc.utils.errors import UserError

WEIGHT_DECAY = 0.01


def nearest_clusters(codebook: Codebook, block: Block) -> dict[str, Tensor]:
    """The nearest cluster of each row of a block, int64 [L, n] per site."""
    ids = {}
    for site, book in codebook.sites.items():
        rows = block.importance[site] if codebook.power else block.patterns[site]
        grouped = rows.flatten(0, 1).unsqueeze(0) if codebook.scope == "pooled" else rows
        ids[site] = codebook.nearest(grouped, book.centroids).reshape(rows.shape[:2])
    return ids


def mixed_profiles(codebook: Codebook, site: str, probabilities: Tensor) -> Tensor:
    """The expected pattern Σ_k p_k · profile_k, [L, n, D] with a mean of 1 over neurons; probabilities: [L, n, K]."""
    profiles = codebook.sites[site].profiles.to(probabilities.dtype)
    return probabilities @ profiles  # profiles [G, K, D]: with G = 1 all layers share them


class StepModule(LightningModule):
    """The part that training a predictor and tuning share: a one-cycle learning rate, and a history of logged steps."""

    in_order = False  # blocks and windows come in random order
    checkpointed: tuple[str, ...] = ("history",)  # attributes that a checkpoint keeps, beside the tensors
    cfg: PredictorConfig | TuneConfig

    def __init__(self, log_every: int):
        super().__init__()
        self.log_every = log_every
        self.history: list[dict] = []

    @property
    def _loader(self):
        return self.trainer.datamodule.loader  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def get_extra_state(self) -> dict:
        """The attributes in `checkpointed`."""
        return {name: getattr(self, name) for name in self.checkpointed}

    def set_extra_state(self, state: dict) -> None:
        """Restores what `get_extra_state` returned."""
        vars(self).update(state)

    def _one_cycle(self, optimizer: torch.optim.Optimizer, rising: float) -> dict:
        """An optimizer with a one-cycle learning rate, for Lightning; rising: the fraction of steps to the peak."""
        rates = [group["lr"] for group in optimizer.param_groups]
        steps = max(2, len(self._loader) * self.cfg.max_epochs)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=rising)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _is_logged(self, batch_index: int) -> bool:
        is_last = batch_index + 1 == self.trainer.num_training_batches
        return (self.global_step + 1) % self.log_every == 0 or is_last

    def _log(self, metrics: dict) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics)


class PredictorModule(StepModule):
    """Trains a `Predictor`. The codebook labels each row with its nearest cluster, once before training.

    monitor: a block of held-out rows, measured by `predictor_figures` after each epoch; seed: of the initial weights;
    ffns: the model's FFNs, which the low-bit form copies at first; without them it starts from zeros.
    """

    checkpointed = ("history", "figures")
    cfg: PredictorConfig

    def __init__(
        self,
        cfg: PredictorConfig,
        codebook: Codebook,
        info: PatternInfo,
        monitor: Block | None = None,
        seed: int = 0,
        log_every: int = 20,
        ffns: list[FFN] | None = None,
    ):
        super().__init__(log_every)
        if cfg.loss != "ce" and not info.with_importance:
            advice = "set collect.importance=true or predictor.loss=ce"
            raise UserError(f"predictor.loss={cfg.loss} needs importances; {advice}")
        self.cfg, self.info, self.codebook, self.monitor = cfg, info, codebook, monitor
        outputs = {site: codebook.k if cfg.form == "cluster" else D for site, D in info.widths.items()}
        shape = (info.layers, info.hidden_size, cfg.bottleneck)
        reads = list(cfg.low_bit_projections)
        header = PredictorHeader(
            *shape, outputs, cfg.form, cfg.lookahead, bits=cfg.bits, low_bit_projections=reads, inputs=cfg.inputs
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = Predictor(header)
        if self.predictor.low_bit is not None and ffns is not None:
            book = codebook.sites["neuron"]
            energy = torch.linalg.vecdot(book.sizes.float().unsqueeze(1), book.profiles.float().transpose(1, 2))
            self.predictor.low_bit.copy_ffns(ffns, energy.expand(info.layers, -1))
        self.labels: dict[str, Tensor] = {}  # the nearest cluster of each row of this rank, int32 [L, T]; others are 0
        self.figures: dict = {}

    def fields(self) -> list[str]:
        """The names of the block fields that a step reads."""
        sites, cfg = list(self.info.widths), self.cfg
        active = [f"patterns.{site}" for site in sites] if cfg.form != "cluster" and cfg.loss != "listwise" else []
        importance = [f"importance.{site}" for site in sites] if cfg.loss != "ce" else []
        return ["hidden", *active, *importance, *self.info.routes()]

    def working_bytes(self) -> int:
        """Estimated bytes that training takes on the device, besides its batch.

        A step stores the scores and, if the loss needs them, each neuron's share and weight. The codebook's profiles
        are also stored as floats. The weights have gradients and two moments.
        """
        neurons = sum(self.info.widths.values()) if self.cfg.loss != "ce" else 0
        step = 8 * 4 * self.info.layers * self.cfg.batch_tokens * (sum(self.predictor.outputs.values()) + neurons)
        if self.cfg.inputs < 1:  # the inputs' sizes, and the largest inputs
            step += 2 * 4 * self.info.layers * self.cfg.batch_tokens * self.info.hidden_size
        books = sum(6 * book.profiles.numel() + book.centroids.numel() for book in self.codebook.sites.values())
        labels = 4 * self.info.layers * self.info.tokens * len(self.info.widths)
        return 16 * sum(value.numel() for value in self.parameters()) + step + books + labels

    def on_fit_start(self) -> None:
        """Moves codebook and monitor to the device, and labels the rows."""
        self.codebook = self.codebook.to(self.device)
        if self.monitor is not None:
            self.monitor = self.monitor.to(self.device)
        if self.cfg.form != "cluster":
            return
        shape = (self.info.layers, self.info.tokens)
        for site in self.info.widths:
            self.labels[site] = torch.zeros(shape, dtype=torch.int32, device=self.device)
        rows = "importance" if self.codebook.power else "patterns"  # what `nearest_clusters` reads
        for block in self._loader.whole_blocks([f"{rows}.{site}" for site in self.info.widths] + self.info.routes()):
            if block.tokens:
                block = by_ffn(block.to(self.device), self.info)
                for site, ids in nearest_clusters(self.codebook, block).items():
                    if block.positions.dim() == 1:
                        self.labels[site][:, block.positions] = ids.int()
                    else:
                        ffn, row = (block.positions >= 0).nonzero(as_tuple=True)
                        self.labels[site][ffn, block.positions[ffn, row]] = ids[ffn, row].int()

    def configure_optimizers(self):
        """AdamW with a one-cycle learning rate."""
        groups = self.predictor.param_groups(self.cfg.lr)
        decay = 0.0 if self.cfg.form == "low-bit" else WEIGHT_DECAY  # its weights stand for levels
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.lr, weight_decay=decay)
        return self._one_cycle(optimizer, 0.1)

    def training_step(self, block: Block, batch_index: int) -> Tensor:
        """The loss of a block, averaged over its sites. Raises UserError if it is not finite."""
        block = by_ffn(block, self.info)
        losses = [self._loss(site, scores, block) for site, scores in self.predictor(block.hidden).items()]
        loss = sum(losses[1:], start=losses[0]) / len(losses)
        if not torch.isfinite(loss):
            advice = f"lower predictor.lr (now {self.cfg.lr})"
            raise UserError(f"the predictor's loss is not finite at step {self.global_step}; {advice}")
        if self._is_logged(batch_index):
            step, value, lr = self.global_step + 1, loss.item(), self.trainer.optimizers[0].param_groups[0]["lr"]
            self.history.append({"step": step, "loss": value})
            self._log({"predictor/step": step, "predictor/loss": value, "predictor/lr": lr})
        return loss

    def _loss(self, site: str, scores: Tensor, block: Block) -> Tensor:
        """A site's loss, the mean over layers and tokens; scores: [L, n, K or D]."""
        cfg, terms = self.cfg, []
        if cfg.loss in ("ce", "mix"):
            if cfg.form == "cluster":
                terms.append(F.cross_entropy(scores.flatten(0, 1), self._labels(site, block).flatten()))
            else:
                active = ops.unpack(block.patterns[site], self.info.widths[site]).to(scores.dtype)
                if block.positions.dim() == 1:
                    terms.append(F.binary_cross_entropy_with_logits(scores, active))
                else:
                    each = F.binary_cross_entropy_with_logits(scores, active, reduction="none").mean(-1)
                    terms.append(_mean(each, block))
        if cfg.loss in ("listwise", "mix"):
            weights = block.importance[site].to(scores.dtype).pow(max(self.codebook.power, 1))
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
            # Each neuron's predicted share of the token's weight: ListNet's top-one probability (Cao et al., 2007).
            if cfg.form == "cluster":
                shares = mixed_profiles(self.codebook, site, scores.softmax(-1)) / self.info.widths[site]
                log_shares = shares.clamp_min(1e-12).log()
            else:
                log_shares = scores.log_softmax(-1)
            terms.append(-_mean((weights * log_shares).sum(-1), block))
        return sum(terms[1:], start=terms[0])

    def _labels(self, site: str, block: Block) -> Tensor:
        """The clusters of a block's rows, int64 [L, n]; −100 for padding, which cross_entropy ignores."""
        if block.positions.dim() == 1:
            return self.labels[site][:, block.positions].long()
        ids = self.labels[site].gather(1, block.positions.clamp_min(0)).long()
        return ids.masked_fill(block.positions < 0, -100)

    def on_train_epoch_end(self) -> None:
        """Measures and logs the figures of the held-out rows."""
        if self.monitor is not None and self.monitor.tokens:
            self.figures = predictor_figures(self.predictor, self.codebook, by_ffn(self.monitor, self.info))
            known = {name: [value for value in values if value is not None] for name, values in self.figures.items()}
            overall = {f"predictor/{name}": sum(values) / len(values) for name, values in known.items()}
            layers = {f"predictor_layers/{name}": values for name, values in self.figures.items()}
            self._log({"predictor/step": self.global_step} | overall | layers)

    def trained(self, provenance: dict) -> Predictor:
        """The predictor as trained so far, on the host, with this provenance and the configuration."""
        self.predictor.provenance = provenance | {"config": asdict(self.cfg)}
        return self.predictor.cpu().requires_grad_(False).eval().rounded()


def _mean(values: Tensor, block: Block) -> Tensor:
    """The mean of values [L, n], one for each row of a block, over rows that are not padding."""
    return values.mean() if block.positions.dim() == 1 else values[block.positions >= 0].mean()


def _row_means(values: Tensor, block: Block) -> Tensor:
    """The means of values [L, n] over rows that are not padding, [L]; NaN for an FFN that has only padding."""
    if block.positions.dim() == 1:
        return values.mean(1)
    rows = (block.positions >= 0).to(values.dtype)
    return (values * rows).sum(1) / rows.sum(1)


@torch.inference_mode()
def predictor_figures(predictor: Predictor, codebook: Codebook, block: Block) -> dict[str, list[float | None]]:
    """Figures of a predictor on the rows of a block, by name, each a list by layer; None for an expert without rows.

    In the cluster form: the top-1 and top-5 accuracy. If the block has importances: the shares of importance and energy
    that masks capture. A `hard` mask is the centroid of the likeliest cluster, or keeps the highest scores; a `soft`
    mask (cluster form only) keeps the largest entries of the mixed profile.
    """
    figures: dict[str, Tensor] = {}
    ids = nearest_clusters(codebook, block) if predictor.form == "cluster" else {}
    for site, scores in predictor(block.hidden).items():
        masks, kind, ranking = {}, "hard", scores.float()
        if predictor.form == "cluster":
            best = scores.topk(min(5, scores.shape[-1]), dim=-1).indices
            hits = best == ids[site].unsqueeze(-1)
            figures[f"top1_{site}"] = _row_means(hits[..., 0].double(), block)
            figures[f"top5_{site}"] = _row_means(hits.any(-1).double(), block)
            groups = torch.tensor([[codebook.group(layer)] for layer in range(len(scores))], device=scores.device)
            centroids = codebook.sites[site].centroids[groups, best[..., 0]]
            masks["hard"] = ops.unpack(centroids, codebook.widths[site])
            kind, ranking = "soft", mixed_profiles(codebook, site, ranking.softmax(-1))
        masks[kind] = torch.stack(
            [ops.top_mask(values, codebook.size(site, layer)) for layer, values in enumerate(ranking)]
        )
        for kind, mask in masks.items() if block.importance else ():
            for name, power in (("importance", 1), ("energy", 2)):
                weights = block.importance[site].double().pow(power)
                share = (weights * mask).sum(-1) / weights.sum(-1).clamp_min(1)
                figures[f"captured_{name}_{kind}_{site}"] = _row_means(share, block)
    return {name: [None if value != value else value for value in each.tolist()] for name, each in figures.items()}
