"""Tunes masks, offsets and predictor together, through the model.

The loss is the divergence of the masked model's predictions from those of the dense model, its teacher: tuning learns
what the model can leave out, and nothing else from the text. The forward pass uses the hard masks of inference. The
backward pass replaces a neuron's mask by the sigmoid of its score's distance to the lowest score kept, and the choice
of a cluster by the softmax of the logits (straight-through estimators, Bengio et al., 2013).

Staged policies learn their thresholds too. The loss then has a price on bytes, which rises while more than the budget
is read and falls while less is (an augmented Lagrangian), so stages and layers share the budget out themselves.

Shape letters: L layers, E hidden size, D neurons, K clusters, n tokens, S tokens in a window.
"""

from dataclasses import asdict, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apc import ops
from apc.cluster.codebook import Codebook
from apc.config.schema import TuneConfig
from apc.data.ffn import FFN
from apc.ops.staged_ffn import log_energy
from apc.predict.module import StepModule
from apc.predict.predictor import LayerPredictor, Predictor, at_16_bits
from apc.sparse.masked_forward import ForwardReader
from apc.sparse.policies import POLICIES, MaskDecision, MaskInputs
from apc.sparse.policies.base import add_deltas, own_clusters
from apc.sparse.policies.staged import Staged, best_clusters
from apc.tune.calibrate import SamplePass
from apc.tune.costs import drop_costs
from apc.tune.steps import refine, step
from apc.utils import distributed
from apc.utils.errors import UserError

SCORES_LR, OFFSETS_LR = 20.0, 2.0  # learning rates, as multiples of the predictor's
TEMPERATURE = 0.5  # of the sigmoid in a mask's gradient
MIN_PROFILE = 1e-3  # profiles have a mean of 1 and may be 0; scores are their logarithms
# In units of the first step's divergence: the price of reading all of an FFN's rows at first, its change per step and
# excess share, and the factor of the excess share's square in the loss.
PRICE, PRICE_RATE, PRICE_SQUARE = 1.0, 5.0, 100.0


class _Rows(torch.autograd.Function):
    """table[ids], with the gradient computed as a matrix product.

    The gradient of plain indexing adds rows with equal ids one after the other, which is slow.
    """

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
    """The number of neurons that each layer keeps: at least `least`, `total` in all. The dropped neurons cost least.

    curves: float64 [L, D], the cost of dropping the neuron of each rank. Costs measured on few tokens are noisy: they
    are averaged over D / 96 neighbouring ranks and sorted to fall with the rank.
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


class TuningModule(StepModule):
    """Trains a codebook and a predictor for the policy `cfg.policy`.

    Its parameters are `scores` float32 [L, K, D], `offsets` float32 [L, K, E] and the predictor's, as far as the policy
    uses them. A cluster's mask keeps its `sizes[layer]` largest scores, which start as logarithms of the profiles.
    """

    cfg: TuneConfig
    sizes: Tensor  # int64 [L]
    price: Tensor | None
    budget_allocated: Tensor

    def __init__(
        self,
        cfg: TuneConfig,
        model: nn.Module,
        ffns: list[FFN],
        codebook: Codebook,
        predictor: Predictor | None,
        windows: Tensor,
        seed: int = 0,
        share: float = 1.0,
        teacher: nn.Module | None = None,
    ):
        """windows: int64 [n, S], for measuring the budget; share: of the dense FFN's bytes that a staged policy reads.

        teacher: the model from which the masked one must not diverge; None: the dense model.

        Raises UserError if codebook or predictor can't be tuned.
        """
        super().__init__(log_every=10)
        check_tunable(cfg, codebook, predictor)
        self._policy = POLICIES[cfg.policy]
        self.cfg, self.codebook, self.seed, self.share = cfg, codebook, seed, share
        self._model, self._ffns, self._windows = [model], ffns, windows  # lists keep the models out of this state
        self._teacher = [model if teacher is None else teacher]
        ((self.site, book),) = codebook.sites.items()
        by_cluster = self._policy.by_cluster
        scores = book.profiles.float().clamp_min(MIN_PROFILE).log()
        self.scores = nn.Parameter(scores, requires_grad=by_cluster)
        zeros = torch.zeros(*book.profiles.shape[:2], codebook.hidden_size)
        offsets = zeros if book.offsets is None else book.offsets.clone()
        self.offsets = nn.Parameter(offsets, requires_grad=by_cluster and cfg.offsets)
        self.predictor: Predictor | None = None
        if (self._policy.forms or self._policy.corrected) and predictor is not None:
            self.predictor = predictor.copy(corrects=cfg.correction).requires_grad_(True)
        self.register_buffer(
            "sizes", torch.tensor([codebook.size(self.site, layer) for layer in range(codebook.layers)])
        )
        staged = self._policy.staged
        self.register_buffer("budget_allocated", torch.tensor(not cfg.budget and not staged))
        self.thresholds = nn.Parameter(torch.zeros(codebook.layers, 3)) if staged else None  # by layer and stage
        self.lora = nn.ParameterDict(_low_rank(ffns, cfg.lora, seed) if staged and cfg.lora else {})
        # The first step's divergence, 0 before it, and the price in units of it.
        self.register_buffer("price", torch.tensor([0.0, PRICE]) if staged else None)

    def configure_optimizers(self):
        """AdamW with a one-cycle learning rate, over the parameters that the policy uses."""
        lr = self.cfg.lr
        rates = ((self.scores, SCORES_LR * lr), (self.thresholds, SCORES_LR * lr), (self.offsets, OFFSETS_LR * lr))
        learned = ((value, rate) for value, rate in rates if value is not None and value.requires_grad)
        groups: list[dict] = [{"params": [value], "lr": rate} for value, rate in learned]
        groups += self.predictor.param_groups(lr) if self.predictor is not None else []
        groups += [{"params": list(self.lora.values()), "lr": lr}] if self.lora else []
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        return self._one_cycle(optimizer, 0.15)

    def on_fit_start(self) -> None:
        """Allocates the budget, unless a checkpoint did. Raises UserError if the costs of neurons are not finite."""
        self.codebook = self.codebook.to(self.device)
        if self.thresholds is not None:
            fit = SamplePass(self._model[0], self._ffns, self.codebook, self.predictor, self._windows, seed=self.seed)
            policy = cast(type[Staged], self._policy)
            self._rows_share = policy.rows_share(fit, self.share, self.cfg.lora)
            if not self.budget_allocated:
                thresholds = policy.calibrate(fit, self.share)["thresholds"]
                if self._policy.by_cluster:
                    thresholds[:, 0] = thresholds[:, 0].clamp_min(MIN_PROFILE).log()
                self.thresholds.data.copy_(thresholds.clamp_min(-100.0))
        elif not self.budget_allocated:
            curves = self._costs().cpu()
            for layer, curve in enumerate(curves):
                if not curve.isfinite().all():
                    advice = "try model.dtype=float32 or bfloat16, or tune.budget=false"
                    raise UserError(f"the cost of neurons in layer {layer} is not finite; {advice}")
            total = int(self.sizes.sum())
            least = min(max(1, curves.shape[1] // 8), total // len(curves))
            self.sizes.copy_(torch.tensor(allocate_budget(curves, total, least)))
        self.budget_allocated.fill_(True)

    def _costs(self) -> Tensor:
        """The cost in nats of dropping only the neuron that the policy ranks r-th for a token, float64 [L, D]."""
        shape = (self.codebook.layers, self.codebook.widths[self.site])
        costs = torch.zeros(shape, dtype=torch.float64, device=self.device)
        lookahead = 0 if self.predictor is None else self.predictor.lookahead
        parts = self._model[0], self._ffns, self.codebook, self._windows
        ranks = lambda tokens: self.ranking(tokens).argsort(-1, descending=True)
        for layer, order, cost in drop_costs(*parts, ranks, self.seed, lookahead=lookahead):
            costs[layer] += cost.gather(1, order).double().sum(0)
        return distributed.all_sum(costs) / self._windows.numel()

    def _logits(self, windows: Tensor, reader: ForwardReader) -> Tensor:
        """The model's logits [n · S, vocabulary], with the reader in its forward pass."""
        hooks = reader.hook()
        try:
            return self._model[0](input_ids=windows, use_cache=False).logits.flatten(0, 1)
        finally:
            hooks.remove()

    def training_step(self, windows: Tensor, batch_index: int) -> Tensor:
        """The mean KL(dense ‖ masked) of next tokens, in nats per token. Raises UserError if it isn't finite."""
        with torch.no_grad():
            dense = self._teacher[0](input_ids=windows, use_cache=False).logits.flatten(0, 1)
        reader = _TuningForward(self)
        masked = self._logits(windows, reader)
        # Gradients are averaged over ranks, which may have different numbers of windows; windows must count equally.
        weight = len(windows) * distributed.world_size() / self.step_windows
        loss = weight * ops.divergence(masked, dense).sum() / len(dense)
        divergence = loss.detach().clone()
        if not torch.isfinite(loss):
            advice = f"lower tune.lr (now {self.cfg.lr}) or set tune.precision=32-true"
            raise UserError(f"the divergence is not finite at step {self.global_step}; {advice}")
        read = None
        if self.price is not None:
            shares = torch.stack(reader.shares).mean()
            mean = distributed.all_sum(torch.stack([weight * shares.detach(), divergence])) / distributed.world_size()
            read, excess = mean[0], mean[0] - self._rows_share
            unit, price = torch.where(self.price[0] > 0, self.price[0], mean[1]), self.price[1]
            loss = loss + unit * (price + 2 * PRICE_SQUARE * excess) * weight * shares
            self.price.copy_(torch.stack([unit, (price + PRICE_RATE * excess).clamp_min(0)]))
        if self._is_logged(batch_index):
            step = self.global_step + 1
            record = {"divergence": distributed.all_sum(divergence).item() / distributed.world_size()}
            if read is not None:
                record["rows_read"] = read.item()
            self.history.append({"step": step, **record})
            lr = self.trainer.optimizers[0].param_groups[-1]["lr"]
            self._log({"tune/step": step, "tune/lr": lr, **{f"tune/{name}": value for name, value in record.items()}})
        return loss

    def ranking(self, tokens: MaskInputs) -> Tensor:
        """The scores by which the policy ranks neurons, float32 [n, D]; it keeps the highest."""
        by_cluster = self._policy.by_cluster
        return self.scores[tokens.layer][self._ids(tokens)] if by_cluster else self._outputs(tokens)[0]

    def _outputs(self, tokens: MaskInputs, predictor: LayerPredictor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits float32 and the correction; predictor: the layer's part, if `Predictor.unbind` made it."""
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
        layer, scores = tokens.layer, self.scores[tokens.layer]
        if self.thresholds is None:
            return own_clusters(self.codebook, tokens, ops.pack(ops.top_mask(scores, int(self.sizes[layer]))))
        correction = None if self.predictor is None else self._outputs(tokens)[1]
        nominated, up, down = self.thresholds[layer]
        up_scores, down_scores = _stage_scores(tokens)
        later = (up_scores >= up) & (down_scores >= down)
        return best_clusters(tokens, scores >= nominated, later, self.offsets[layer], correction)

    @torch.no_grad()
    def tuned(self, provenance: dict) -> tuple[Codebook, Predictor | None]:
        """The codebook and the predictor as tuned so far, copied to the host; None if the policy has no predictor."""
        old = self.codebook.to(torch.device("cpu")).without_calibrated()
        scores, sizes = self.scores.detach().cpu(), self.sizes.tolist()
        book, profiles = old.sites[self.site], scores.exp()
        tuned_book = replace(
            book,
            centroids=torch.stack([ops.pack(ops.top_mask(layer, m)) for layer, m in zip(scores, sizes, strict=True)]),
            profiles=(profiles / profiles.mean(-1, keepdim=True)).half(),
            offsets=at_16_bits(self.offsets.detach().cpu()) if self.offsets.requires_grad else book.offsets,
        )
        tuning = asdict(self.cfg) | {"steps": int(self.global_step), "step_windows": self.step_windows}
        codebook = replace(old, sites={self.site: tuned_book}, budget=sizes, provenance=provenance | {"tune": tuning})
        if self.thresholds is not None:
            thresholds = self.thresholds.detach().cpu()
            tensors = {"thresholds": thresholds.clone()}
            if self._policy.by_cluster:
                tensors["masks"] = ops.pack(scores >= thresholds[:, :1, None])
            tensors |= {f"lora_{name}": value.detach().cpu().bfloat16() for name, value in self.lora.items()}
            codebook = codebook.with_calibrated(self.cfg.policy, tensors, {})
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
        super().__init__(module._ffns, module.codebook, lookahead, module._policy.staged, changes_output=True)
        self.module = module
        self.shares: list[Tensor] = []  # that the stages of each layer read, float32 [3]; for a staged policy
        # Unbound once: with indexing, each layer's gradient would be as large as that of all layers.
        self.scores, self.offsets = module.scores.unbind(), module.offsets.unbind()
        self.predictors = [None] * len(self.scores) if module.predictor is None else module.predictor.unbind()
        self.sizes = module.sizes.tolist()
        self.lora = {name: value.unbind() for name, value in module.lora.items()}

    def more_sites(self) -> list[str]:
        """The projections whose outputs have low-rank updates."""
        return ["gate", "up"] if self.lora else []

    def visit(self, layer: int, site: str, values: Tensor) -> Tensor | None:
        """Adds the low-rank updates of gate and up; masks neurons and adds the output delta as the base class does."""
        if not self.lora or site not in ("gate", "up"):
            return super().visit(layer, site, values)
        updated = values + self._low_rank(layer, site, self._inputs[layer]).to(values.dtype).view_as(values)
        if site == "gate":
            super().visit(layer, site, updated)
        return updated

    def _low_rank(self, layer: int, projection: str, values: Tensor) -> Tensor:
        """The product of values [n, E or D] with a projection's low-rank update."""
        a, b = (self.lora[f"{projection}_{side}"][layer] for side in "ab")
        return F.linear(F.linear(values, a.to(values.dtype)), b.to(values.dtype))

    def see(self, tokens: MaskInputs) -> MaskDecision:
        """The policy's decision, with a gradient: its mask is a float tensor of zeros and ones."""
        decision = self._decide(tokens)
        if not self.lora:
            return decision
        kept = self.apply(tokens.values, decision.mask)
        return replace(
            decision, output_delta=add_deltas(decision.output_delta, self._low_rank(tokens.layer, "down", kept))
        )

    def _decide(self, tokens: MaskInputs) -> MaskDecision:
        module, layer = self.module, tokens.layer
        policy, m, tau = module._policy, self.sizes[layer], TEMPERATURE
        if not policy.by_cluster:
            scores, correction = module._outputs(tokens, self.predictors[layer])
            if policy.staged:
                mask, counted = (self._step(layer, each) for each in (scores, scores.detach()))
                return MaskDecision(self._refine(tokens, mask, counted, self._up_part(tokens)), correction)
            return MaskDecision(ops.straight_through(scores, m, tau, tokens.values.dtype), correction)
        scores, offsets = self.scores[layer], self.offsets[layer]
        masks = self._step(layer, scores) if policy.staged else ops.straight_through(scores, m, tau)
        if policy.forms:
            logits, correction = module._outputs(tokens, self.predictors[layer])
            ids, probabilities = logits.argmax(-1), logits.softmax(-1)
            gradient = probabilities - probabilities.detach()  # zeros with the gradient of the softmax
            mask = rows_of(masks, ids) + gradient @ masks.detach()
            delta = rows_of(offsets, ids) + gradient @ offsets.detach()
            delta = delta if correction is None else delta + correction
        else:
            ids = module._ids(tokens)
            mask, delta = rows_of(masks, ids), rows_of(offsets, ids)
            correction = None if module.predictor is None else module._outputs(tokens, self.predictors[layer])[1]
            delta = delta if correction is None else delta + correction
        if policy.staged:
            mask = self._refine(tokens, mask, rows_of(self._step(layer, scores.detach()), ids))
        return MaskDecision(mask, delta)

    def _step(self, layer: int, scores: Tensor) -> Tensor:
        """The nominated neurons as 0 and 1, like scores float32 [..., D]."""
        assert self.module.thresholds is not None
        return step(scores, self.module.thresholds[layer, 0], TEMPERATURE)

    def _up_part(self, tokens: MaskInputs) -> Tensor | None:
        """What a low-bit copy of up adds to the scores of up, float32 [n, D]; None without one."""
        assert self.module.predictor is not None
        predictor = self.predictors[tokens.layer]
        hidden = tokens.inputs[self.module.predictor.source_layer(tokens.layer)]
        return None if predictor is None or predictor.scores is None else predictor.scores.up_part(hidden)

    def _refine(self, tokens: MaskInputs, mask: Tensor, counted: Tensor, up_part: Tensor | None = None) -> Tensor:
        """The nominated neurons [n, D] that all stages keep; see `apc.tune.steps.refine`."""
        assert self.module.thresholds is not None
        up, down = _stage_scores(tokens)
        up = up if up_part is None else up + up_part
        thresholds = self.module.thresholds[tokens.layer, 1:]
        refined, shares = refine(mask, counted, up, down, thresholds, TEMPERATURE)
        self.shares.append(shares)
        return refined

    def apply(self, values: Tensor, mask: Tensor) -> Tensor:
        """values · mask [n, D]: a product, which has a gradient to the mask."""
        return values * mask.to(values.dtype)


def _stage_scores(tokens: MaskInputs) -> tuple[Tensor, Tensor]:
    """The scores by which the stages up and down keep neurons, float32 [n, D] each."""
    assert tokens.gate is not None
    gate, values = (
        log_energy(tokens.measure(tokens.layer, tokens.site, each.detach())) for each in (tokens.gate, tokens.values)
    )
    return gate, values


def _low_rank(ffns: list[FFN], rank: int, seed: int) -> dict[str, nn.Parameter]:
    """Low-rank updates b @ a of gate, up and down (LoRA, Hu et al., 2021): a [L, rank, inputs], b [L, outputs, rank].

    b starts at zero, a from a normal distribution of variance 1 / inputs.
    """
    L, E, D = len(ffns), ffns[0].hidden_size, ffns[0].site_width("neuron")
    generator, parts = torch.Generator().manual_seed(seed), {}
    for name, (inputs, outputs) in {"gate": (E, D), "up": (E, D), "down": (D, E)}.items():
        parts[f"{name}_a"] = nn.Parameter(torch.randn(L, rank, inputs, generator=generator) * inputs**-0.5)
        parts[f"{name}_b"] = nn.Parameter(torch.zeros(L, outputs, rank))
    return parts


def check_tunable(cfg: TuneConfig, codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless `cfg.policy` can be tuned with this codebook and predictor."""
    sites, needs = list(codebook.sites), f"tune.max_epochs={cfg.max_epochs}: tuning needs"
    if sites != ["neuron"] or codebook.scope != "layer":
        has = f"this codebook has sites={sites} and scope {codebook.scope}"
        raise UserError(f"{needs} sites=[neuron] and cluster.scope=layer; {has}")
    if codebook.centroid_size != "fixed":
        raise UserError(f"{needs} centroids of a fixed size; this codebook's centroids have any number of ones")
    forms = POLICIES[cfg.policy].forms
    if forms and (predictor is None or predictor.form not in forms):
        has = "none was trained" if predictor is None else f"this one's is {predictor.form}"
        raise UserError(f"tune.policy={cfg.policy} needs a predictor of form {' or '.join(forms)}; {has}")
