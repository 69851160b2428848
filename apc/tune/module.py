"""Tunes masks, offsets and predictor together, through the model.

The loss is the divergence of the masked model's predictions from those of the dense model. The dense model is the
teacher, so that tuning learns where the model can be cut and nothing else from the text. The forward pass uses the same
hard masks as inference. The backward pass replaces a neuron's mask by the sigmoid of the distance from its score to the
lowest score kept, and the choice of a cluster by the softmax of the logits (straight-through estimators, Bengio et al.,
2013).

Shape letters: L layers, E hidden size, D neurons, K clusters, n tokens, S tokens in a window.
"""

from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.collect.loader import WindowLoader
from apc.collect.patterns import quantise
from apc.config.schema import TuneConfig
from apc.data.ffn import GatedFFN
from apc.predict.predictor import LayerPredictor, Predictor, at_16_bits
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.policies import POLICIES, MaskDecision, MaskInputs
from apc.utils import distributed
from apc.utils.errors import UserError

SCORES_LR, OFFSETS_LR = 20.0, 2.0  # learning rates, as multiples of the predictor's
TEMPERATURE = 0.5  # of the sigmoid in a mask's gradient
MIN_PROFILE = 1e-3  # profiles have a mean of 1 and may be 0; scores are their logarithms


class _Rows(torch.autograd.Function):
    """table[ids] with a matrix product as its gradient; indexing's own gradient adds the rows of one id in sequence."""

    @staticmethod
    def forward(ctx, table: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = len(table), table.dtype
        return table[ids]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        # bfloat16 takes a tenth of float32's time on a GPU. It rounds the rows of the gradient, but not their sums.
        gradient = gradient.bfloat16() if gradient.is_cuda else gradient
        one_hot = torch.zeros(ctx.rows, len(ids), dtype=gradient.dtype, device=ids.device)
        one_hot[ids, torch.arange(len(ids), device=ids.device)] = 1
        return (one_hot @ gradient).to(ctx.dtype), None


def rows_of(table: Tensor, ids: Tensor) -> Tensor:
    """The rows of a table [K, ...] at ids int64 [n]: [n, ...]."""
    return _Rows.apply(table, ids)


def allocate_budget(curves: Tensor, total: int, least: int) -> list[int]:
    """How many neurons each layer keeps so that the dropped ones cost least together.

    The layers keep `total` neurons in all, each at least `least`. curves: float64 [L, D], the cost of dropping the
    neuron of each rank. Costs are noisy because they are measured on few tokens, so they are averaged over D / 96
    neighbouring ranks and sorted to fall with the rank.
    """
    L, D = curves.shape
    if not L * least <= total <= L * D:
        raise ValueError(f"{total} neurons can't be allocated to {L} layers of {D} with at least {least} each")
    width = max(1, D // 96)
    smooth = F.avg_pool1d(curves.unsqueeze(1), width, ceil_mode=True).squeeze(1).repeat_interleave(width, dim=1)[:, :D]
    falling = smooth.sort(dim=1, descending=True).values
    falling[:, :least] = torch.inf
    order = falling.flatten().sort(descending=True, stable=True).indices[:total]
    return torch.bincount(order // D, minlength=L).tolist()


class TuningModule(LightningModule):
    """Trains a codebook and a predictor for the policy `cfg.policy`.

    Its parameters are `scores` float32 [L, K, D], `offsets` float32 [L, K, E] and the predictor's. A cluster's mask
    keeps the m neurons of its largest scores; scores start as logarithms of the profiles. Parameters that the policy
    does not use are not trained. The buffer `sizes` int64 [L] is m of each layer.
    """

    in_order = False  # windows come in random order
    sizes: Tensor
    budget_allocated: Tensor

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
        """windows: int64 [n, S], for measuring the budget. Raises UserError if codebook or predictor can't be tuned."""
        super().__init__()
        check_tunable(cfg, codebook, predictor)
        self._policy = POLICIES[cfg.policy]
        self.cfg, self.codebook, self.seed, self.log_every = cfg, codebook, seed, 10
        self._model, self._ffns, self._windows = [model], ffns, windows  # the list keeps the model out of this state
        (site,), book = codebook.sites, next(iter(codebook.sites.values()))
        self.site = site
        by_cluster = self._policy.by_cluster
        scores = book.profiles.float().clamp_min(MIN_PROFILE).log()
        self.scores = nn.Parameter(scores, requires_grad=by_cluster)
        zeros = torch.zeros(*book.profiles.shape[:2], codebook.hidden_size)
        offsets = zeros if book.offsets is None else book.offsets.clone()
        self.offsets = nn.Parameter(offsets, requires_grad=by_cluster and cfg.offsets)
        self.predictor: Predictor | None = None
        if self._policy.forms and predictor is not None:
            self.predictor = predictor.copy(corrects=cfg.correction).requires_grad_(True)
        self.register_buffer("sizes", torch.tensor([codebook.size(site, layer) for layer in range(codebook.layers)]))
        self.register_buffer("budget_allocated", torch.tensor(not cfg.budget))
        self.history: list[dict] = []

    @property
    def _loader(self) -> WindowLoader:
        return self.trainer.datamodule.loader  # type: ignore[attr-defined]  # Lightning sets it without declaring it

    def get_extra_state(self) -> dict:
        """The logged history, for a checkpoint."""
        return {"history": self.history}

    def set_extra_state(self, state: dict) -> None:
        """Restores what `get_extra_state` returned."""
        self.history = state["history"]

    def configure_optimizers(self):
        """AdamW with a one-cycle learning rate, over the parameters that the policy uses."""
        cfg = self.cfg
        groups: list[dict] = [
            {"params": [self.scores], "lr": SCORES_LR * cfg.lr},
            {"params": [self.offsets], "lr": OFFSETS_LR * cfg.lr},
        ]
        groups += self.predictor.param_groups(cfg.lr) if self.predictor is not None else []
        groups = [group for group in groups if group["params"][0].requires_grad]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        steps = max(2, len(self._loader) * cfg.max_epochs)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps, pct_start=0.15
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Allocates the budget to the layers, unless a checkpoint did. Raises UserError if the costs are not finite."""
        self.codebook = self.codebook.to(self.device)
        if not self.budget_allocated:
            curves = self._costs().cpu()
            if not curves.isfinite().all():
                layer = int((~curves.isfinite()).any(1).nonzero()[0])
                raise UserError(
                    f"the cost of neurons in layer {layer} is not finite; "
                    "try model.dtype=float32 or bfloat16, or tune.budget=false"
                )
            total = int(self.sizes.sum())
            least = max(1, curves.shape[1] // 8)
            self.sizes.copy_(torch.tensor(allocate_budget(curves, total, min(least, total // len(curves)))))
            self.budget_allocated.fill_(True)

    def _costs(self) -> Tensor:
        """The cost of dropping only the neuron that the policy ranks r-th for a token, averaged over tokens.

        float64 [L, D], an estimate in nats: half the mean square of the gradient to the neuron's mask, for labels drawn
        from the model. This is the diagonal of the Fisher information (as in Theis et al., 2018), which needs no labels
        from the text.
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
        """The mean divergence KL(dense ‖ masked) of next-token predictions, in nats per token; windows: int64 [n, S].

        Raises UserError if it is not finite.
        """
        model = self._model[0]
        with torch.no_grad():
            dense = model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
        hooks = _TuningForward(self).hook()
        try:
            masked = model(input_ids=windows, use_cache=False).logits.flatten(0, 1)
        finally:
            hooks.remove()
        # Ranks may have different numbers of windows, and their gradients are averaged. The weight makes all windows of
        # a step count the same.
        weight = len(windows) * distributed.world_size() / self.step_windows
        loss = weight * ops.divergence(masked, dense).sum() / len(dense)
        if not torch.isfinite(loss):
            raise UserError(
                f"the divergence is not finite at step {self.global_step}; "
                f"lower tune.lr (now {self.cfg.lr}) or set tune.precision=32-true"
            )
        step = self.global_step + 1
        if step % self.log_every == 0 or batch_index + 1 == self.trainer.num_training_batches:
            divergence = distributed.all_sum(loss.detach().clone()).item() / distributed.world_size()
            self.history.append({"step": step, "divergence": divergence})
            lr = self.trainer.optimizers[0].param_groups[-1]["lr"]
            for logger in self.loggers:
                logger.log_metrics({"tune/step": step, "tune/divergence": divergence, "tune/lr": lr})
        return loss

    def ranking(self, tokens: MaskInputs) -> Tensor:
        """The scores by which the policy ranks neurons, float32 [n, D]; it keeps the highest."""
        if not self._policy.by_cluster:
            return self._outputs(tokens)[0]
        return self.scores[tokens.layer][self._ids(tokens)]

    def decide(
        self, tokens: MaskInputs, scores: Tensor, offsets: Tensor, m: int, predictor: LayerPredictor | None
    ) -> MaskDecision:
        """The policy's decision, with a gradient: its mask is a float tensor of zeros and ones.

        scores [K, D], offsets [K, E], m, predictor: those of the layer.
        """
        tau = TEMPERATURE
        if not self._policy.by_cluster:
            neuron_scores, correction = self._outputs(tokens, predictor)
            return MaskDecision(ops.straight_through(neuron_scores, m, tau, tokens.values.dtype), correction)
        masks = ops.straight_through(scores, m, tau)
        if not self._policy.forms:
            ids = self._ids(tokens)
            return MaskDecision(rows_of(masks, ids), rows_of(offsets, ids))
        logits, correction = self._outputs(tokens, predictor)
        ids, probabilities = logits.argmax(-1), logits.softmax(-1)
        gradient = probabilities - probabilities.detach()  # zeros with the gradient of the softmax
        mask = rows_of(masks, ids) + gradient @ masks.detach()
        delta = rows_of(offsets, ids) + gradient @ offsets.detach()
        return MaskDecision(mask, delta if correction is None else delta + correction)

    def _outputs(self, tokens: MaskInputs, predictor: LayerPredictor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits float32 and the correction; predictor: the layer's part from `Predictor.unbind`, if there is one."""
        assert self.predictor is not None  # the policy needs one
        hidden = tokens.inputs[self.predictor.source_layer(tokens.layer)]
        layer = self.predictor.layer(tokens.layer) if predictor is None else predictor
        logits, correction = layer(tokens.site, hidden)
        return logits.float(), correction

    @torch.no_grad()
    def _ids(self, tokens: MaskInputs) -> Tensor:
        """The clusters that the policy chooses, int64 [n]."""
        if self._policy.forms:
            return self._outputs(tokens)[0].argmax(-1)
        masks = ops.pack(ops.top_mask(self.scores[tokens.layer], int(self.sizes[tokens.layer])))
        rows = quantise(tokens.importance)[0] if self.codebook.power else ops.pack(tokens.active)
        return self.codebook.nearest(rows, masks)

    @torch.no_grad()
    def tuned(self, provenance: dict) -> tuple[Codebook, Predictor | None]:
        """The codebook and the predictor as tuned so far, copied to the host; None if the policy has no predictor."""
        old, scores = self.codebook.to(torch.device("cpu")), self.scores.detach().cpu()
        sizes = self.sizes.tolist()
        (book,) = old.sites.values()
        profiles = scores.exp()
        tuned_book = replace(
            book,
            centroids=torch.stack([ops.pack(ops.top_mask(layer, m)) for layer, m in zip(scores, sizes, strict=True)]),
            profiles=(profiles / profiles.mean(-1, keepdim=True)).half(),
            offsets=at_16_bits(self.offsets.detach().cpu()) if self.offsets.requires_grad else book.offsets,
        )
        tuning = asdict(self.cfg) | {"steps": int(self.global_step), "step_windows": self.step_windows}
        codebook = replace(old, sites={self.site: tuned_book}, budget=sizes, provenance=provenance | {"tune": tuning})
        if self.predictor is None:
            return codebook, None
        predictor = self.predictor.copy({**self.predictor.provenance, "codebook": codebook.provenance, "tune": tuning})
        return codebook, predictor.cpu().requires_grad_(False).eval().rounded()

    @property
    def step_windows(self) -> int:
        """Windows in a step, over all ranks."""
        return self._loader.step_windows if self._trainer is not None else self.cfg.batch_windows


class _TuningForward(ForwardReader):
    """Runs the model under the masks that are being tuned."""

    def __init__(self, module: TuningModule):
        lookahead = module.predictor.lookahead if module.predictor is not None else 0
        super().__init__(module._ffns, module.codebook, lookahead, changes_output=True)
        self.module = module
        # Unbound once: with indexing, each layer's gradient would be a tensor of all layers.
        predictors = [None] * len(module.scores) if module.predictor is None else module.predictor.unbind()
        self.layers = list(
            zip(module.scores.unbind(), module.offsets.unbind(), module.sizes.tolist(), predictors, strict=True)
        )

    def see(self, tokens: MaskInputs) -> MaskDecision:
        """The decision with a gradient."""
        return self.module.decide(tokens, *self.layers[tokens.layer])

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        """values · mask [n, D]: a product, which has a gradient to the mask."""
        return values * mask.to(values.dtype)


class _MaskGradients(_TuningForward):
    """Gives each layer of the dense model a mask of ones with a gradient, and keeps the policy's ranking of neurons."""

    def __init__(self, module: TuningModule):
        super().__init__(module)
        self.changes_output = False
        self.masks: list[Tensor] = []
        self.orders: list[Tensor] = []

    def see(self, tokens: MaskInputs) -> MaskDecision:
        """A mask of ones."""
        with torch.no_grad():
            self.orders.append(self.module.ranking(tokens).argsort(-1, descending=True))
        self.masks.append(torch.ones_like(tokens.values, requires_grad=True))
        return MaskDecision(self.masks[-1])


def check_tunable(cfg: TuneConfig, codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless `cfg.policy` can be tuned with this codebook and predictor."""
    if list(codebook.sites) != ["neuron"] or codebook.scope != "layer":
        raise UserError(
            f"tune.max_epochs={cfg.max_epochs}: tuning needs sites=[neuron] and cluster.scope=layer; "
            f"this codebook has sites={list(codebook.sites)} and scope {codebook.scope}"
        )
    if codebook.centroid_size != "fixed":
        raise UserError(
            f"tune.max_epochs={cfg.max_epochs}: tuning needs centroids of a fixed size; "
            "this codebook's centroids have any number of ones"
        )
    forms = POLICIES[cfg.policy].forms
    if forms and (predictor is None or predictor.form not in forms):
        has = "none was trained" if predictor is None else f"this one's is {predictor.form}"
        raise UserError(f"tune.policy={cfg.policy} needs a predictor of form {' or '.join(forms)}; {has}")
