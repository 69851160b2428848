"""Trains a predictor: a LightningModule over blocks of FFN inputs, all layers at once.

Shape letters: L layers, E hidden size, K clusters, D neurons, n tokens, T tokens of the fit text.
"""

from dataclasses import asdict

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.loader import BlockLoader
from apc.collect.patterns import Block, PatternInfo
from apc.config.schema import PredictorConfig
from apc.data.ffn import GatedFFN
from apc.predict.predictor import Predictor
from apc.utils.errors import UserError

WEIGHT_DECAY = 0.01


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
            raise UserError(
                f"predictor.loss={cfg.loss} needs importances; set collect.importance=true or predictor.loss=ce"
            )
        self.cfg, self.info, self.codebook, self.monitor, self.log_every = cfg, info, codebook, monitor, log_every
        outputs = {site: codebook.k if cfg.form == "cluster" else D for site, D in info.widths.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.predictor = Predictor(
                info.layers,
                info.hidden_size,
                cfg.bottleneck,
                outputs,
                cfg.form,
                cfg.lookahead,
                bits=cfg.bits,
                low_bit_projections=cfg.low_bit_projections,
            )
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
        step = 8 * 4 * self.info.layers * self.cfg.batch_tokens * (sum(self.predictor.outputs.values()) + neurons)
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
        groups = self.predictor.param_groups(self.cfg.lr)
        decay = 0.0 if self.cfg.form == "low-bit" else WEIGHT_DECAY  # towards 0 a level has no meaning
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.lr, weight_decay=decay)
        steps = len(self.trainer.datamodule.loader) * self.cfg.max_epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=max(2, steps), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, block: Block, batch_index: int) -> Tensor:
        logits = self.predictor(block.hidden)
        loss = sum(self._loss(site, scores, block) for site, scores in logits.items()) / len(logits)
        if not torch.isfinite(loss):
            raise UserError(
                f"the predictor's loss is not finite at step {self.global_step}; lower predictor.lr (now {self.cfg.lr})"
            )
        step = self.global_step + 1
        if step % self.log_every == 0 or batch_index + 1 == self.trainer.num_training_batches:
            self.history.append({"step": step, "loss": loss.item()})
            self._log(
                {
                    "predictor/step": step,
                    "predictor/loss": loss.item(),
                    "predictor/lr": self.lr_schedulers().get_last_lr()[0],
                }
            )
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
            layers = {
                f"predictor_layers/{name}_{i:02d}": value
                for name, values in self.figures.items()
                for i, value in enumerate(values)
            }
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
            figures[f"top1_{site}"], figures[f"top5_{site}"] = (
                hits[..., 0].double().mean(1),
                hits.any(-1).double().mean(1),
            )
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
