"""Tunes masks, offsets and predictor together, through the model: all follow the gradient of the divergence from the dense model's predictions.

In the forward pass masks are as hard as in use; in the backward pass a neuron's mask is the sigmoid of its score less the last score that is kept, and
a chosen cluster the softmax of its logits (straight-through estimators, Bengio et al., 2013). The teacher is the model itself, dense, so that nothing is
learned of the text but where the model can be cut. Shape letters: L layers, E hidden size, D neurons, K clusters, n tokens, S tokens in a window.
"""

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.patterns import quantise
from apc.config.schema import TuneConfig
from apc.data.ffn import GatedFFN
from apc.predict.predictor import LayerPredictor, Predictor, at_16_bits
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.policies import POLICIES, MaskDecision, MaskInputs
from apc.utils import distributed
from apc.utils.errors import UserError

SCORES_LR, OFFSETS_LR = 20.0, 2.0  # learning rates, in units of the predictor's
TEMPERATURE = 0.5  # of the sigmoid in a mask's gradient
LEAST_PROFILE = 1e-3  # of the mean: scores are logarithms of profiles, which may be 0


class _Rows(torch.autograd.Function):
    """table[ids] whose gradient is a matrix product: the indexing's own adds the rows of one id one after the other."""

    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = len(table), table.dtype
        return table[ids]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        # On a GPU in bfloat16, which takes a tenth of float32's time: the gradient's rows are rounded, their sums are not.
        gradient = gradient.bfloat16() if gradient.is_cuda else gradient
        chosen = torch.zeros(ctx.rows, len(ids), dtype=gradient.dtype, device=ids.device)
        chosen[ids, torch.arange(len(ids), device=ids.device)] = 1
        return (chosen @ gradient).to(ctx.dtype), None


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """table [K, ...] at ids int64 [n] → [n, ...]"""
    return _Rows.apply(table, ids)


def allocate_budget(curves: Tensor, total: int, least: int) -> list[int]:
    """How many neurons each layer keeps, `total` in all and at least `least`, so that what the dropped ones cost together is least.

    curves: float64 [L, D], what dropping the neuron of each rank costs. Costs are averaged over D / 96 ranks next to each other, and made to fall with
    the rank: they are measured on few tokens.
    """
    L, D = curves.shape
    if not L * least <= total <= L * D:
        raise ValueError(f"{total} neurons can't be shared out to {L} layers of {D} with at least {least} each")
    width = max(1, D // 96)
    smooth = F.avg_pool1d(curves.unsqueeze(1), width, ceil_mode=True).squeeze(1).repeat_interleave(width, dim=1)[:, :D]
    falling = smooth.sort(dim=1, descending=True).values
    falling[:, :least] = torch.inf
    order = falling.flatten().sort(descending=True, stable=True).indices[:total]
    return torch.bincount(order // D, minlength=L).tolist()


class TuningModule(LightningModule):
    """Trains the policy `cfg.policy` of a codebook and a predictor.

    Parameters: `scores` float32 [L, K, D], of which a cluster's mask is the largest m (logarithms of the profiles at first), `offsets` [L, K, E], and
    the predictor's; those that the policy does not use are not trained. Buffer: `sizes` int64 [L], m of each layer.
    """

    def __init__(
        self,
        cfg: TuneConfig,
        model: nn.Module,
        ffns: list[GatedFFN],
        codebook: Codebook,
        predictor: Predictor | None,
        windows: Tensor,
        seed: int = 0,
    ):
        """windows: int64 [n, S], those that the budget is measured on. Raises UserError for a codebook or predictor that can't be tuned."""
        super().__init__()
        check_tunable(cfg, codebook, predictor)
        self._policy = POLICIES[cfg.policy]
        self.cfg, self.codebook, self.seed, self.log_every = cfg, codebook, seed, 10
        self._model, self._ffns, self._windows = [model], ffns, windows  # in a list: not a part of this module's state
        (site,), book = codebook.sites, next(iter(codebook.sites.values()))
        self.site = site
        by_cluster = self._policy.by_cluster
        scores = book.profiles.float().clamp_min(LEAST_PROFILE).log()
        offsets = (
            torch.zeros(*book.profiles.shape[:2], codebook.hidden_size)
            if book.offsets is None
            else book.offsets.clone()
        )
        self.scores, self.offsets = (
            nn.Parameter(scores, requires_grad=by_cluster),
            nn.Parameter(offsets, requires_grad=by_cluster and cfg.offsets),
        )
        self.predictor = None
        if self._policy.forms:
            self.predictor = predictor.copy(corrects=cfg.correction)
            self.predictor.requires_grad_(True)
        flat = [codebook.size(site, layer) for layer in range(codebook.layers)]
        self.register_buffer("sizes", torch.tensor(flat))
        self.register_buffer("budget_allocated", torch.tensor(not cfg.budget))
        self.history: list[dict] = []

    in_order = False

    def get_extra_state(self) -> dict:
        return {"history": self.history}

    def set_extra_state(self, state: dict) -> None:
        self.history = state["history"]

    def configure_optimizers(self):
        cfg = self.cfg
        groups = [
            {"params": [self.scores], "lr": SCORES_LR * cfg.lr},
            {"params": [self.offsets], "lr": OFFSETS_LR * cfg.lr},
        ]
        groups += self.predictor.param_groups(cfg.lr) if self.predictor is not None else []
        groups = [group for group in groups if group["params"][0].requires_grad]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        steps = max(2, len(self.trainer.datamodule.loader) * cfg.max_epochs)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.15
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.codebook = self.codebook.to(self.device)
        if not self.budget_allocated:
            curves = self._costs().cpu()
            if not curves.isfinite().all():
                layer = int((~curves.isfinite()).any(1).nonzero()[0])
                raise UserError(
                    f"what neurons of layer {layer} cost is not finite; try model.dtype=float32 or bfloat16, or tune.budget=false"
                )
            total = int(self.sizes.sum())
            least = max(1, curves.shape[1] // 8)
            self.sizes.copy_(torch.tensor(allocate_budget(curves, total, min(least, total // len(curves)))))
            self.budget_allocated.fill_(True)

    def _costs(self) -> Tensor:
        """float64 [L, D]: about what it costs in nats to drop, alone, the neuron that the policy ranks r-th for a token; the mean over tokens.

        Half the mean square of the gradient to a neuron's mask, for labels drawn from the model: the diagonal of the Fisher information (as in Theis et
        al., 2018), which needs no label of the text.
        """
        windows = self._windows.to(self.device)
        first, last = distributed.share(len(windows))
        costs = torch.zeros(
            self.codebook.layers, self.codebook.widths[self.site], dtype=torch.float64, device=self.device
        )
        for window in range(first, last):
            generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + window)
            ranked = _MaskGradients(self)
            hooks = ranked.hook()
            try:
                logits = self._model[0](input_ids=windows[window : window + 1], use_cache=False).logits[0].float()
            finally:
                hooks.remove()
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
            gradients = torch.autograd.grad(-logits.log_softmax(-1).gather(1, labels).sum(), ranked.masks)
            for layer, (gradient, order) in enumerate(zip(gradients, ranked.orders, strict=True)):
                costs[layer] += gradient.float().square().gather(1, order).double().sum(0) / 2
        return distributed.all_sum(costs) / windows.numel()

    def training_step(self, windows: Tensor, batch_index: int) -> Tensor:
        """windows int64 [n, S] → the mean divergence KL(dense ‖ masked) of next-token predictions, in nats a token"""
        model = self._model[0]
        with torch.no_grad():
            dense = model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
        hooks = _TuningForward(self).hook()
        try:
            found = model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
        finally:
            hooks.remove()
        # All windows of a step weigh the same, also where ranks have more or fewer of them: their gradients' mean is taken.
        weight = len(windows) * distributed.world_size() / self.step_windows
        loss = weight * ops.divergence(found, dense).sum() / len(dense)
        if not torch.isfinite(loss):
            raise UserError(
                f"the divergence is not finite at step {self.global_step}; lower tune.lr (now {self.cfg.lr}) or set tune.precision=32-true"
            )
        step = self.global_step + 1
        if step % self.log_every == 0 or batch_index + 1 == self.trainer.num_training_batches:
            shown = distributed.all_sum(loss.detach().clone()).item() / distributed.world_size()
            self.history.append({"step": step, "divergence": shown})
            for logger in self.loggers:
                logger.log_metrics(
                    {"tune/step": step, "tune/divergence": shown, "tune/lr": self.lr_schedulers().get_last_lr()[-1]}
                )
        return loss

    def ranking(self, tokens: MaskInputs) -> Tensor:
        """What the policy would cut a mask from, float32 [n, D]: the larger, the rather kept."""
        if not self._policy.by_cluster:
            return self._outputs(tokens)[0]
        return self.scores[tokens.layer][self._ids(tokens)]

    def choose(
        self, tokens: MaskInputs, scores: Tensor, offsets: Tensor, m: int, predictor: LayerPredictor | None
    ) -> MaskDecision:
        """The policy's choice, with a gradient; its mask holds numbers. scores [K, D], offsets [K, E], m and predictor: of the layer."""
        tau = TEMPERATURE
        if not self._policy.by_cluster:
            found, correction = self._outputs(tokens, predictor)
            return MaskDecision(ops.straight_through(found, m, tau, tokens.values.dtype), correction)
        masks = ops.straight_through(scores, m, tau)
        if not self._policy.forms:
            ids = self._ids(tokens)
            return MaskDecision(rows_of(masks, ids), rows_of(offsets, ids))
        logits, correction = self._outputs(tokens, predictor)
        ids, shares = logits.argmax(-1), logits.softmax(-1)
        gradient = shares - shares.detach()  # 0, but for its gradient
        added = rows_of(offsets, ids) + gradient @ offsets.detach()
        return MaskDecision(
            rows_of(masks, ids) + gradient @ masks.detach(), added if correction is None else added + correction
        )

    def _outputs(self, tokens: MaskInputs, predictor: LayerPredictor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits float32 and correction; predictor: the layer's, where all were taken apart at once."""
        hidden = tokens.inputs[self.predictor.source_layer(tokens.layer)]
        logits, correction = (
            predictor(tokens.site, hidden)
            if predictor
            else self.predictor.layer_outputs(tokens.layer, tokens.site, hidden)
        )
        return logits.float(), correction

    @torch.no_grad()
    def _ids(self, tokens: MaskInputs) -> Tensor:
        """The clusters that the policy chooses, int64 [n]."""
        if self._policy.forms:
            return self._outputs(tokens)[0].argmax(-1)
        masks = ops.pack(ops.top_mask(self.scores[tokens.layer], int(self.sizes[tokens.layer])))
        return self.codebook.nearest(
            quantise(tokens.importance)[0] if self.codebook.power else ops.pack(tokens.active), masks
        )

    @torch.no_grad()
    def tuned(self, provenance: dict) -> tuple[Codebook, Predictor | None]:
        """The codebook and the predictor (None where the policy has none) as they stand, copies on the host."""
        old, scores = self.codebook.to(torch.device("cpu")), self.scores.detach().cpu()
        sizes = self.sizes.tolist()
        (book,) = old.sites.values()
        profiles = scores.exp()
        made = replace(
            book,
            centroids=torch.stack([ops.pack(ops.top_mask(layer, m)) for layer, m in zip(scores, sizes, strict=True)]),
            profiles=(profiles / profiles.mean(-1, keepdim=True)).half(),
            offsets=at_16_bits(self.offsets.detach().cpu()) if self.offsets.requires_grad else book.offsets,
        )
        made_by = asdict(self.cfg) | {"steps": int(self.global_step), "step_windows": self.step_windows}
        codebook = replace(old, sites={self.site: made}, budget=sizes, provenance=provenance | {"tune": made_by})
        if self.predictor is None:
            return codebook, None
        predictor = self.predictor.copy({**self.predictor.provenance, "codebook": codebook.provenance, "tune": made_by})
        return codebook, predictor.cpu().requires_grad_(False).eval().rounded()

    @property
    def step_windows(self) -> int:
        """Windows in a step, over all ranks."""
        return self.trainer.datamodule.loader.step_windows if self._trainer is not None else self.cfg.batch_windows


class _TuningForward(ForwardReader):
    """The model under the module's own masks."""

    def __init__(self, module: TuningModule):
        lookahead = module.predictor.lookahead if module.predictor is not None else 0
        super().__init__(module._ffns, module.codebook, lookahead, changes_output=True)
        self.module = module
        # Taken apart once: the gradient of indexing would be a tensor of all layers for each.
        predictors = [None] * len(module.scores) if module.predictor is None else module.predictor.unbind()
        self.layers = list(
            zip(module.scores.unbind(), module.offsets.unbind(), module.sizes.tolist(), predictors, strict=True)
        )

    def see(self, tokens: MaskInputs) -> MaskDecision:
        return self.module.choose(tokens, *self.layers[tokens.layer])

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        return values * mask.to(values.dtype)


class _MaskGradients(_TuningForward):
    """Leaves the model dense, with a mask of ones to which a gradient can be taken in every layer, and the order in which the policy ranks the neurons."""

    def __init__(self, module: TuningModule):
        super().__init__(module)
        self.changes_output = False
        self.masks: list[Tensor] = []
        self.orders: list[Tensor] = []

    def see(self, tokens: MaskInputs) -> MaskDecision:
        with torch.no_grad():
            self.orders.append(self.module.ranking(tokens).argsort(-1, descending=True))
        self.masks.append(torch.ones_like(tokens.values, requires_grad=True))
        return MaskDecision(self.masks[-1])


def check_tunable(cfg: TuneConfig, codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless the policy of this codebook and predictor can be tuned."""
    if list(codebook.sites) != ["neuron"] or codebook.scope != "layer":
        raise UserError(
            f"tune.max_epochs={cfg.max_epochs}: tuning needs sites=[neuron] and cluster.scope=layer; this codebook has {list(codebook.sites)}, {codebook.scope}"
        )
    if codebook.centroid_size != "fixed":
        raise UserError(
            f"tune.max_epochs={cfg.max_epochs}: tuning needs masks of a fixed size; this codebook's centroids have any number of ones"
        )
    forms = POLICIES[cfg.policy].forms
    if forms and (predictor is None or predictor.form not in forms):
        has = "none was trained" if predictor is None else f"this one's is {predictor.form}"
        raise UserError(f"tune.policy={cfg.policy} needs a predictor of form {' or '.join(forms)}; {has}")
