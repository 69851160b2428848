"""Trains a predictor on blocks of FFN inputs, all layers at once.

Shape letters: L layers, E hidden size, K clusters, D neurons, n tokens, T tokens of the fit text.
"""

from dataclasses import asdict
from typing import Any

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
from apc.predict.predictor import Predictor, PredictorHeader
from apc.utils.errors import UserError

WEIGHT_DECAY = 0.01


def label_rows(loader: BlockLoader, codebook: Codebook, device: torch.device) -> dict[str, Tensor]:
    """The nearest cluster of each row that this rank owns, int32 [L, T] per site, on the device; other rows are 0."""
    info = loader.source.info
    labels = {site: torch.zeros(info.layers, info.tokens, dtype=torch.int32, device=device) for site in info.widths}
    for block in loader.whole_blocks(block_fields(codebook, info)):
        if block.tokens:
            block = block.to(device)
            for site, ids in nearest_clusters(codebook, block).items():
                labels[site][:, block.positions] = ids.int()
    return labels


def block_fields(codebook: Codebook, info: PatternInfo) -> list[str]:
    """The names of the block fields that `nearest_clusters` reads."""
    return [f"{'importance' if codebook.power else 'patterns'}.{site}" for site in info.widths]


def nearest_clusters(codebook: Codebook, block: Block) -> dict[str, Tensor]:
    """The nearest cluster of each row of a block, int64 [L, n] per site."""
    ids = {}
    for site, book in codebook.sites.items():
        rows = block.importance[site] if codebook.power else block.patterns[site]
        shape = rows.shape[:2]
        if codebook.scope == "pooled":
            rows = rows.flatten(0, 1).unsqueeze(0)
        ids[site] = codebook.nearest(rows, book.centroids).reshape(shape)
    return ids


def mixed_profiles(codebook: Codebook, site: str, probabilities: Tensor) -> Tensor:
    """The expected pattern Σ_k p_k · profile_k, [L, n, D] with a mean of 1 over neurons; probabilities: [L, n, K]."""
    profiles = codebook.sites[site].profiles.to(probabilities.dtype)
    return probabilities @ profiles  # profiles [G, K, D]: with G = 1 all layers share them


class PredictorModule(LightningModule):
    """Trains a `Predictor`. The codebook labels each row with its nearest cluster, once before training.

    Args:
        cfg: the configuration's `predictor` part.
        codebook: the clusters to predict.
        info: the shapes of the blocks.
        monitor: a block of held-out rows; `predictor_figures` measures it after each epoch.
        seed: of the initial weights.
        log_every: steps between two logged losses.
        ffns: the model's FFNs, which the low-bit form copies at first; without them it starts from zeros.
    """

    in_order = False  # blocks come in random order

    def __init__(
        self,
        cfg: PredictorConfig,
        codebook: Codebook,
        info: PatternInfo,
        monitor: Block | None = None,
        seed: int = 0,
        log_every: int = 20,
        ffns: list[GatedFFN] | None = None,
    ):
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
                PredictorHeader(
                    layers=info.layers,
                    hidden_size=info.hidden_size,
                    bottleneck=cfg.bottleneck,
                    outputs=outputs,
                    form=cfg.form,
                    lookahead=cfg.lookahead,
                    bits=cfg.bits,
                    low_bit_projections=list(cfg.low_bit_projections),
                )
            )
        if self.predictor.low_bit is not None and ffns is not None:
            book = codebook.sites["neuron"]
            energy = torch.linalg.vecdot(book.sizes.float().unsqueeze(1), book.profiles.float().transpose(1, 2))
            self.predictor.low_bit.copy_ffns(ffns, energy.expand(info.layers, -1))
        self.labels: dict[str, Tensor] = {}
        self.history: list[dict] = []
        self.figures: dict = {}

    @property
    def _loader(self) -> BlockLoader:
        return self.trainer.datamodule.loader  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def get_extra_state(self) -> dict:
        """The logged history and the monitor's figures, for a checkpoint."""
        return {"history": self.history, "figures": self.figures}

    def set_extra_state(self, state: dict) -> None:
        """Restores what `get_extra_state` returned."""
        self.history, self.figures = state["history"], state["figures"]

    def fields(self) -> list[str]:
        """The names of the block fields that a step reads."""
        sites, cfg = list(self.info.widths), self.cfg
        active = [f"patterns.{site}" for site in sites] if cfg.form != "cluster" and cfg.loss != "listwise" else []
        importance = [f"importance.{site}" for site in sites] if cfg.loss != "ce" else []
        return ["hidden", *active, *importance]

    def working_bytes(self) -> int:
        """About how many bytes training takes on the device, besides its batch.

        These are weights, gradients and two moments; the codebook, and its profiles as floats; labels; the scores of a
        step; and each neuron's share and weight if the loss needs them.
        """
        neurons = sum(self.info.widths.values()) if self.cfg.loss != "ce" else 0
        step = 8 * 4 * self.info.layers * self.cfg.batch_tokens * (sum(self.predictor.outputs.values()) + neurons)
        books = sum(6 * book.profiles.numel() + book.centroids.numel() for book in self.codebook.sites.values())
        labels = 4 * self.info.layers * self.info.tokens * len(self.info.widths)
        return 16 * sum(value.numel() for value in self.parameters()) + step + books + labels

    def on_fit_start(self) -> None:
        """Moves codebook and monitor to the device, and labels the rows."""
        self.codebook = self.codebook.to(self.device)
        if self.cfg.form == "cluster":
            self.labels = label_rows(self._loader, self.codebook, self.device)
        if self.monitor is not None:
            self.monitor = self.monitor.to(self.device)

    def configure_optimizers(self):
        """AdamW with a one-cycle learning rate."""
        groups = self.predictor.param_groups(self.cfg.lr)
        decay = 0.0 if self.cfg.form == "low-bit" else WEIGHT_DECAY  # its weights stand for levels
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.lr, weight_decay=decay)
        steps = len(self._loader) * self.cfg.max_epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=max(2, steps), pct_start=0.1
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, block: Block, batch_index: int) -> Tensor:
        """The loss of a block, averaged over its sites. Raises UserError if it is not finite."""
        losses = [self._loss(site, scores, block) for site, scores in self.predictor(block.hidden).items()]
        loss = sum(losses[1:], start=losses[0]) / len(losses)
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
                    "predictor/lr": self.trainer.optimizers[0].param_groups[0]["lr"],
                }
            )
        return loss

    def _log(self, metrics: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.log_metrics(metrics)

    def _loss(self, site: str, scores: Tensor, block: Block) -> Tensor:
        """A site's loss, the mean over layers and tokens; scores: [L, n, K or D]."""
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
        return sum(terms[1:], start=terms[0])

    def _log_shares(self, site: str, scores: Tensor) -> Tensor:
        """Logarithm of each neuron's predicted share of the token's weight, [L, n, D].

        These are ListNet's top-one probabilities (Cao et al., 2007).
        """
        if self.cfg.form != "cluster":
            return scores.log_softmax(-1)
        shares = mixed_profiles(self.codebook, site, scores.softmax(-1)) / self.info.widths[site]
        return shares.clamp_min(1e-12).log()

    def on_train_epoch_end(self) -> None:
        """Measures and logs the figures of the held-out rows."""
        if self.monitor is not None and self.monitor.tokens:
            self.figures = predictor_figures(self.predictor, self.codebook, self.monitor)
            overall = {f"predictor/{name}": sum(values) / len(values) for name, values in self.figures.items()}
            layers = {f"predictor_layers/{name}": values for name, values in self.figures.items()}
            self._log({"predictor/step": self.global_step} | overall | layers)

    def trained(self, provenance: dict) -> Predictor:
        """The predictor as trained so far, on the host, with this provenance and the configuration."""
        self.predictor.provenance = provenance | {"config": asdict(self.cfg)}
        return self.predictor.cpu().requires_grad_(False).eval().rounded()


def _top_masks(scores: Tensor, sizes: list[int]) -> Tensor:
    """Masks bool [L, n, D] of each token's largest scores; scores: [L, n, D], sizes: how many in each layer."""
    return torch.stack([ops.top_mask(layer, m) for layer, m in zip(scores, sizes, strict=True)])


@torch.inference_mode()
def predictor_figures(predictor: Predictor, codebook: Codebook, block: Block) -> dict[str, list[float]]:
    """Figures of a predictor on the rows of a block, by name, each a list by layer.

    In the cluster form these are the top-1 and top-5 accuracy. If the block has importances, they include the shares of
    importance and energy that predicted masks capture: the centroid of the likeliest cluster (`hard`), and in the
    cluster form the mixed profiles (`soft`).
    """
    figures: dict[str, Tensor] = {}
    ids = nearest_clusters(codebook, block) if predictor.form == "cluster" else {}
    for site, scores in predictor(block.hidden).items():
        D = codebook.widths[site]
        sizes = [codebook.size(site, layer) for layer in range(codebook.layers)]
        masks = {}
        if predictor.form == "cluster":
            best = scores.topk(min(5, scores.shape[-1]), dim=-1).indices
            hits = best == ids[site].unsqueeze(-1)
            figures[f"top1_{site}"] = hits[..., 0].double().mean(1)
            figures[f"top5_{site}"] = hits.any(-1).double().mean(1)
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
