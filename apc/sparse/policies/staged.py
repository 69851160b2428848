"""Staged masks: what an FFN has computed already decides what it reads next.

A nominating policy chooses the neurons whose rows of gate are read. Of these, the neurons with the largest
|act(g_i)| · ‖w_i‖ have their rows of up read (w_i is the neuron's column of W_down). Of those, the neurons with the
largest importance |act(g_i) · u_i| · ‖w_i‖ have their columns of down read. Scores are logarithms of squares, as those
of the low-bit predictor.

Shape letters: n tokens, E hidden size, D neurons, L layers, K clusters, W bytes of a packed row.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.data.ffn import first_device
from apc.data.quantise import FULL_BITS, mean_bits
from apc.ops.staged_ffn import log_energy
from apc.predict.predictor import CORRECTION, Predictor
from apc.sparse.policies.base import ClusterPolicy, FitPass, MaskDecision, MaskInputs, MaskPolicy, add_deltas
from apc.sparse.policies.bounds import Oracle
from apc.sparse.policies.budget import allocate_stages
from apc.sparse.policies.copies import Prox
from apc.sparse.policies.fixed import Static
from apc.sparse.policies.neurons import NeuronPredictor
from apc.sparse.policies.predicted import Predicted
from apc.utils import distributed
from apc.utils.errors import UserError

STAGES = ("gate", "up", "down")
CANDIDATES = 8  # clusters that `best_clusters` compares by the FFN's output
SIZE_PRICE = 0.05  # of keeping all neurons, in units of a token's energy
LEVELS = 24  # of a token's ranking of neurons, by which shares are chosen


class Staged(MaskPolicy):
    """Refines the masks of the nominating policy, which is the next class in the order of inheritance.

    `Codebook.calibrated` holds, by the policy's name: thresholds float32 [L, 3], the least score that each stage keeps;
    or, with stages.rule=top, sizes int64 [L, 3], the number of neurons that each stage keeps for each token. Policies
    whose nominations are masks also have masks uint8 [L, K, W] (K = 1 for `static`).
    """

    by_default = False
    in_sparsify = False
    monitored = False
    sees_gate = True
    experts = False
    calibrated = True
    staged = True
    sites = ("neuron",)
    gap_to: str | None = None
    nominates_by_stages = False  # whether nominations depend on the thresholds of the later stages

    def kernel_by(self, way: str) -> str | None:
        """None: no kernel runs these stages."""
        return None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What calibration left for this policy, by name."""
        return self.codebook.calibrated[self.name]

    def nominate(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose rows of gate are read, and the output delta."""
        return super().decide(inputs)

    def up_scores(self, inputs: MaskInputs) -> Tensor:
        """The scores that decide which rows of up are read, float32 [n, D]."""
        assert inputs.gate is not None  # `sees_gate` asks for it
        return log_energy(inputs.measure(inputs.layer, inputs.site, inputs.gate))

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose columns of down are read, and what each stage reads."""
        nominated = self.nominate(inputs)
        up = nominated.mask & self.kept(inputs.layer, 1, self.up_scores(inputs), nominated.mask)
        down = up & self.kept(inputs.layer, 2, log_energy(inputs.importance), up)
        return self.in_stages(inputs, nominated, up, down)

    def in_stages(self, inputs: MaskInputs, nominated: MaskDecision, up: Tensor, down: Tensor) -> MaskDecision:
        """The decision to read gate of the nominated neurons, and up and down of those in these masks, bool [n, D]."""
        delta = nominated.output_delta
        if self.adapts_weights:
            kept = inputs.values.masked_fill(~down, 0)
            delta = add_deltas(delta, self.low_rank(inputs.layer, "down", kept))
        read = {**nominated.read, "gate": nominated.mask, "up": up, "down": down}
        return MaskDecision(down, delta, read)

    @property
    def adapts_weights(self) -> bool:
        """Whether tuning left low-rank updates of the weights (`tune.lora`)."""
        return "lora_down_a" in self.codebook.calibrated.get(self.name, ())

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The nominating policy's, and low-rank updates that can't be merged into the weights."""
        rank = self.tensors["lora_down_a"].shape[1] if self.adapts_weights else 0
        return super().parameters_read(site, copy) + self.unmerged_parameters(self.codebook, rank)

    @staticmethod
    def unmerged_parameters(codebook: Codebook, rank: int) -> int:
        """16-bit parameters of a layer's updates of gate, up and down, if the FFN is stored at fewer bits; else 0."""
        merges = codebook.provenance.get("ffn_bits", FULL_BITS) == FULL_BITS
        return 0 if merges else 3 * rank * (codebook.hidden_size + codebook.ffn_width)

    @property
    def adds_to_projections(self) -> bool:
        """Whether gate and up have low-rank updates, which `projection_delta` adds to their outputs."""
        return self.adapts_weights

    @property
    def changes_output(self) -> bool:
        """Whether decisions may have an output delta."""
        return self.adapts_weights or super().changes_output

    def projection_delta(self, layer: int, projection: str, hidden: Tensor) -> Tensor:
        """What the low-rank update of gate or up adds to its output [n, D]; hidden: FFN inputs [n, E]."""
        return self.low_rank(layer, projection, hidden)

    def low_rank(self, layer: int, projection: str, values: Tensor) -> Tensor:
        """The product of values [n, E or D] with a projection's low-rank update, in their type."""
        a, b = (self.tensors[f"lora_{projection}_{side}"][layer].to(values.dtype) for side in "ab")
        return values @ a.T @ b.T

    def kept(self, layer: int, stage: int, scores: Tensor, among: Tensor) -> Tensor:
        """The neurons that a stage keeps by their scores float32 [n, D], if the previous stage kept them, bool [n, D].

        among: bool [n, D] or [1, D], the neurons that the previous stage kept; only a choice by top share needs it.
        """
        if "sizes" in self.tensors:
            candidates = scores.masked_fill(~among, -torch.inf)
            return ops.top_mask(candidates, int(self.tensors["sizes"][layer, stage]), check=False)
        return scores >= self.tensors["thresholds"][layer, stage]

    # Calibration

    def nomination_scores(self, inputs: MaskInputs) -> Tensor:
        """The scores by which the policy ranks neurons before it reads the FFN, float32 [n, D]."""
        raise NotImplementedError

    def calibrate_nomination(self, inputs: MaskInputs, share: float) -> MaskDecision:
        """Sets what `nominate` needs in this layer to nominate this share of the neurons; returns the nomination."""
        if "sizes" not in self.tensors:
            self.tensors["thresholds"][inputs.layer, 0] = least_kept(self.nomination_scores(inputs), share)
        return self.nominate(inputs)

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """The tensors with which the policy reads this share of the dense FFN's bytes on the fit text.

        The stages' shares in each layer are those that tuning found, `stages.shares`, or those whose dropped neurons
        cost least.
        """
        tuned = fit.codebook.calibrated.get(cls.name)
        if tuned is not None and fit.codebook.provenance.get("tune", {}).get("policy") == cls.name:
            return cls.with_shares(fit, cls.tuned_shares(fit, tuned, cls.rows_share(fit, share)), tuned)
        if fit.stages.shares is not None:
            shares = torch.tensor([fit.stages.shares] * fit.codebook.layers, dtype=torch.float64)
        else:
            shares = cls.cheapest_shares(fit, cls.rows_share(fit, share))
        return cls.with_shares(fit, shares)

    @classmethod
    def tuned_shares(cls, fit: FitPass, tensors: dict[str, Tensor], total: float) -> Tensor:
        """The shares of neurons that a tuned policy's stages keep, float64 [L, 3], scaled to the mean `total`.

        Nominations that are masks can't be scaled; the other two stages then are.
        """
        meter = _ReadMeter(torch.zeros(fit.codebook.layers, 4, dtype=torch.float64, device=first_device(fit.ffns)))
        fit.run(cls(fit.codebook, fit.predictor, 0), meter)
        sums = distributed.all_sum(meter.sums).cpu()
        shares = sums[:, :3] / sums[:, 3:]
        scaled = shares[:, 1:] if "masks" in tensors else shares
        scaled *= (3 * total * len(shares) - (shares.sum() - scaled.sum())) / scaled.sum()
        return shares.cummin(1).values.clamp(1e-3, 1)

    @classmethod
    def rows_share(cls, fit: FitPass, share: float, lora: int = 0) -> float:
        """The share of bytes that is left for the rows of gate, up and down. Raises UserError if none is.

        lora: rank of the low-rank updates that the policy will have.
        """
        read = cls(fit.codebook, fit.predictor, 0).parameters_read("neuron")
        read += cls.unmerged_parameters(fit.codebook, lora)
        dense = 3 * fit.codebook.hidden_size * fit.codebook.ffn_width * mean_bits(fit.ffns) / FULL_BITS
        left = share - read / dense
        if left < 0.01:
            found = f"needs {share - left:.1%} of the FFN's bytes to find its masks"
            raise UserError(f"policies: {cls.name} {found}; raise bytes={share:g}")
        return min(left, 1.0)

    @classmethod
    def cheapest_shares(cls, fit: FitPass, total: float) -> Tensor:
        """The shares of neurons that the stages of each layer keep, float64 [L, 3]; their mean is `total`.

        A neuron that is dropped costs half the squared gradient to its mask (see `apc.tune.costs`). Each token's
        neurons are ranked by the scores of each stage, in `LEVELS` levels. The shares minimise the cost of the neurons
        below the three levels where the layer cuts.
        """
        policy, L = cls(fit.codebook, fit.predictor, 0), fit.codebook.layers

        def levels(inputs: MaskInputs) -> Tensor:
            """Each neuron's three levels as one number, int64 [n, D]."""
            scores = policy.nomination_scores(inputs), policy.up_scores(inputs), log_energy(inputs.importance)
            gate, up, down = (_levels(each) for each in scores)
            return (gate * LEVELS + up) * LEVELS + down

        shape, device = (L, LEVELS**3), first_device(fit.ffns)
        counts, costs = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        for layer, cells, cost in fit.costs(policy, levels):
            counts[layer] += torch.bincount(cells.flatten(), minlength=LEVELS**3)
            costs[layer].index_add_(0, cells.flatten(), cost.flatten().double())
        counts, costs = (distributed.all_sum(each).cpu().view(L, LEVELS, LEVELS, LEVELS) for each in (counts, costs))
        if not costs.isfinite().all():
            raise UserError("the cost of neurons is not finite; try model.dtype=float32 or bfloat16, or stages.shares")
        return allocate_stages(counts, costs, total)

    @classmethod
    def with_shares(cls, fit: FitPass, shares: Tensor, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors with which the stages keep these shares of the neurons on the fit text, float64 [L, 3].

        Each layer is calibrated under the masks of those before it. tensors: of a tuned policy, whose nominations stay
        if they are masks.
        """
        calibrated = cls.uncalibrated(fit) | (tensors or {})
        if fit.stages.rule == "top":
            D = fit.codebook.widths["neuron"]
            sizes = (shares * D).round().long().clamp(1, D).cummin(1).values
            calibrated["sizes"] = sizes.to(calibrated.pop("thresholds").device)
        codebook = fit.codebook.with_calibrated(cls.name, calibrated, {})
        fit.run(_calibrating(cls, shares)(codebook, fit.predictor, 0), whole=True)
        return calibrated

    @classmethod
    def uncalibrated(cls, fit: FitPass) -> dict[str, Tensor]:
        """The tensors before their calibration."""
        shape = fit.codebook.layers, len(STAGES)
        return {"thresholds": torch.full(shape, -torch.inf, device=first_device(fit.ffns))}


def _calibrating(policy: type[Staged], shares: Tensor) -> type[Staged]:
    """The policy, which calibrates each layer on the first decision that it makes there. shares: float64 [L, 3]."""

    class Calibrating(policy):  # type: ignore[valid-type,misc]
        def decide(self, inputs: MaskInputs) -> MaskDecision:
            if self.nominates_by_stages:  # a first round gives these thresholds
                self.cut(inputs)
            return self.cut(inputs)

        def cut(self, inputs: MaskInputs) -> MaskDecision:
            gate, *rest = shares[inputs.layer].tolist()
            nominated = self.calibrate_nomination(inputs, gate)
            masks = [nominated.mask]
            scores = self.up_scores(inputs), log_energy(inputs.importance)
            for stage, (share, each) in enumerate(zip(rest, scores, strict=True), 1):
                if "sizes" not in self.tensors:
                    self.tensors["thresholds"][inputs.layer, stage] = least_kept(each, share, masks[-1])
                masks.append(masks[-1] & self.kept(inputs.layer, stage, each, masks[-1]))
            return self.in_stages(inputs, nominated, *masks[1:])

    return Calibrating


@dataclass
class _ReadMeter:
    """A meter that sums, for each layer, the shares of neurons that the stages read, and the tokens: float64 [L, 4]."""

    sums: Tensor

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        """Adds the decision for some tokens."""
        n = len(inputs.values)
        for stage, projection in enumerate(STAGES):
            self.sums[inputs.layer, stage] += n * decision.read[projection].double().mean()
        self.sums[inputs.layer, 3] += n


def least_kept(scores: Tensor, share: float, among: Tensor | None = None) -> Tensor:
    """The least of the scores [n, D] to keep, so that this share of all n·D neurons is kept, a float32 [].

    among: bool, like scores or [1, D]; only these neurons can be kept. It is −inf if all of them are.
    """
    count = round(share * scores.numel())
    candidates = scores.flatten() if among is None else scores[among.expand_as(scores)]
    if count >= candidates.numel():
        return scores.new_tensor(-torch.inf)
    place = candidates.numel() - max(1, count)
    if candidates.is_cuda:  # where kthvalue uses one multiprocessor only
        return candidates.sort().values[place]
    return candidates.kthvalue(place + 1).values


def _levels(scores: Tensor) -> Tensor:
    """The level of each neuron's rank in its row, int64 [n, D]: 0 holds the highest scores, LEVELS − 1 the lowest."""
    ranks = torch.empty_like(scores, dtype=torch.int64)
    order = scores.argsort(-1, descending=True)
    levels = torch.arange(scores.shape[-1], device=scores.device) * LEVELS // scores.shape[-1]
    return ranks.scatter_(-1, order, levels.expand_as(order))


class _MaskStages(Staged):
    """A staged policy that nominates masks out of a table; `masks` uint8 [L, K, W] are cut from scores [K, D]."""

    @classmethod
    def uncalibrated(cls, fit: FitPass) -> dict[str, Tensor]:
        """The tensors before their calibration: with empty masks."""
        shape = fit.codebook.layers, cls.rows(fit), ops.row_bytes(fit.codebook.widths["neuron"])
        masks = torch.zeros(shape, dtype=torch.uint8, device=first_device(fit.ffns))
        return super().uncalibrated(fit) | {"masks": masks}

    @classmethod
    def rows(cls, fit: FitPass) -> int:
        """Masks in a layer, K."""
        return fit.codebook.k

    def table(self, inputs: MaskInputs) -> Tensor:
        """The scores that the layer's masks are cut from, float32 [K, D]."""
        return self.codebook.sites[inputs.site].profiles[self.codebook.group(inputs.layer)].float()

    def calibrate_nomination(self, inputs: MaskInputs, share: float) -> MaskDecision:
        """Cuts the layer's masks, unless it has some from tuning; returns the nomination."""
        layer = inputs.layer
        if not self.tensors["masks"][layer].any():
            table = self.table(inputs)
            if "sizes" in self.tensors:
                masks = ops.top_mask(table, int(self.tensors["sizes"][layer, 0]))
            else:
                self.tensors["thresholds"][layer, 0] = least_kept(self.nomination_scores(inputs), share)
                masks = table >= self.tensors["thresholds"][layer, 0]
            self.tensors["masks"][layer] = ops.pack(masks)
        return self.nominate(inputs)


class _ClusterStages(_MaskStages, ClusterPolicy):
    def centroids(self, inputs: MaskInputs) -> Tensor:
        """The layer's masks, uint8 [K, W]; before they are cut, the codebook's centroids."""
        masks = self.codebook.calibrated.get(self.name, {}).get("masks")
        return super().centroids(inputs) if masks is None or not masks[inputs.layer].any() else masks[inputs.layer]

    def nomination_scores(self, inputs: MaskInputs) -> Tensor:
        """The profile of the token's cluster."""
        return self.table(inputs)[self.clusters(inputs)]


def best_clusters(
    inputs: MaskInputs, masks: Tensor, later: Tensor | None, offsets: Tensor | None, correction: Tensor | None
) -> Tensor:
    """The clusters with which the FFN's output changes least, int64 [n].

    The `CANDIDATES` masks that capture most energy are compared by the squared error of the output. The output is that
    of the neurons that all stages keep, plus the cluster's offset and the correction. Captured energy and squared error
    are shares of the token's energy. Masks have different sizes, so each pays `SIZE_PRICE` times the share of neurons
    that it keeps.

    masks: bool [K, D]; later: bool [n, D], the neurons that the stages after gate keep if they are nominated; offsets:
    float32 [K, E]; correction: [n, E].
    """
    h, weights = inputs.values.nan_to_num(nan=0.0), inputs.ffn.down_matrix.to(inputs.values.device)
    total, price = inputs.totals[1].unsqueeze(1), SIZE_PRICE * masks.float().mean(1)
    energy, missing = inputs.energy, None if correction is None else -correction.float()
    if later is not None:
        energy, dropped = energy * later, h.masked_fill(later, 0)
        missing = add_deltas(missing, (dropped @ weights.T.to(h.dtype)).float())
        h = h.masked_fill(~later, 0)
    candidates = (energy @ masks.T.float() / total - price).topk(min(CANDIDATES, len(masks)), dim=1).indices
    errors = []
    for ids in candidates.T:
        error = (h.masked_fill(masks[ids], 0) @ weights.T.to(h.dtype)).float()
        error = error if offsets is None else error - offsets[ids]
        error = error if missing is None else error + missing
        errors.append(error.square().sum(1) / total[:, 0] + price[ids])
    return candidates.gather(1, torch.stack(errors, 1).argmin(1, keepdim=True)).squeeze(1)


class StagedOracle(_ClusterStages, Oracle):
    """The best cluster's neurons, in stages; with a correction of the output if it was tuned with one.

    See `best_clusters`; with stages.rule=top the output is that of all nominated neurons.
    """

    name = "staged-oracle"
    corrected = True
    nominates_by_stages = True
    tunable = True
    color, marker = "#117733", "D"

    @classmethod
    def unsupported(cls, codebook: Codebook, predictor: Predictor | None) -> str | None:
        """Why the policy can't run, calibrated or not; None if it can."""
        tune = codebook.provenance.get("tune", {})
        if tune.get("policy") == cls.name and tune["correction"] and not _corrects(predictor):
            return "was tuned with a correction; give the predictor of its run too"
        return super().unsupported(codebook, predictor)

    @property
    def changes_output(self) -> bool:
        """Whether decisions may have an output delta."""
        return _corrects(self.predictor) or super().changes_output

    def clusters(self, inputs: MaskInputs) -> Tensor:
        """The best clusters, int64 [n]."""
        masks = ops.unpack(self.centroids(inputs), inputs.values.shape[-1])
        offsets = self.codebook.sites[inputs.site].offsets
        offsets = None if offsets is None else offsets[self.codebook.group(inputs.layer)]
        return best_clusters(inputs, masks, self._later(inputs), offsets, self._correction(inputs))

    def _later(self, inputs: MaskInputs) -> Tensor | None:
        """The neurons that the stages after gate keep if they are nominated, bool [n, D]; None if that is not known."""
        tensors = self.codebook.calibrated.get(self.name, {})
        if "thresholds" not in tensors:
            return None
        up, down = tensors["thresholds"][inputs.layer, 1:]
        return (self.up_scores(inputs) >= up) & (log_energy(inputs.importance) >= down)

    def nominate(self, inputs: MaskInputs) -> MaskDecision:
        """The best cluster's neurons, its offset, and the correction."""
        nominated = super().nominate(inputs)
        return replace(nominated, output_delta=add_deltas(nominated.output_delta, self._correction(inputs)))

    def _correction(self, inputs: MaskInputs) -> Tensor | None:
        """The correction of the FFN's output, [n, E]; None without one."""
        if self.predictor is None or not _corrects(self.predictor):
            return None
        hidden = inputs.inputs[inputs.layer].nan_to_num(nan=0.0)
        return self.predictor.layer_outputs(inputs.layer, inputs.site, hidden)[1]

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The centroid, the offset and the correction."""
        correction = self.predictor.parameters_read(site) if self.predictor and _corrects(self.predictor) else 0.0
        return super().parameters_read(site) + correction

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """Those of the correction."""
        return self.predictor.multiplications(site) if self.predictor and _corrects(self.predictor) else 0.0


def _corrects(predictor: Predictor | None) -> bool:
    return predictor is not None and predictor.form == CORRECTION


class StagedPredicted(_ClusterStages, Predicted):
    """The likeliest cluster's neurons, in stages."""

    name = "staged-predicted"
    gap_to: str | None = None
    color, marker = "#332288", "s"

    @classmethod
    def has_kernel_on(cls, device: str) -> bool:
        """On a GPU only."""
        return device == "cuda"

    def kernel_by(self, way: str) -> str | None:
        """cluster, not by numba, for stages that keep neurons by thresholds, with the model's own weights."""
        fits = "sizes" not in self.tensors and not self.adapts_weights and not self.lookahead
        return "cluster" if fits and way != "numba" else None


class StagedNeuron(Staged, NeuronPredictor):
    """The neurons with the highest predicted scores, in stages."""

    name = "staged-neuron"
    color, marker = "#56B4E9", "D"

    @classmethod
    def has_kernel_on(cls, device: str) -> bool:
        """On both."""
        return True

    def kernel_by(self, way: str) -> str | None:
        """stages, for a low-bit copy of the same layer whose stages keep neurons by thresholds.

        On a GPU with the model's own weights only.
        """
        fits = self.predictor.low_bit is not None and "sizes" not in self.tensors and not self.predictor.lookahead
        return "stages" if fits and not (way == "triton" and self.adapts_weights) else None

    def stored_copy(self, layer: int) -> ops.LowBitCopy:
        """The copy that a layer's kernel reads."""
        low_bit = self.predictor.low_bit
        assert low_bit is not None  # `kernel` says so
        scores = low_bit.freeze().layer(layer)
        norms, least = (None if each is None else each[layer] for each in (low_bit.norms, low_bit.input_thresholds))
        return ops.LowBitCopy(
            scores.stored.contiguous(), ops.ScoreCurve(*scores.curve), tuple(low_bit.projections), norms, least
        )

    def nominate(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose scores reach the threshold, or the top scores; and the correction."""
        scores, correction = self.outputs(inputs)
        every = scores.new_ones(1, 1, dtype=torch.bool)
        return MaskDecision(self.kept(inputs.layer, 0, scores, every), correction, self.copy_read(inputs))

    def up_scores(self, inputs: MaskInputs) -> Tensor:
        """The scores by the exact gate; a low-bit copy of up adds its part, an estimate of log u²."""
        scores, copy = super().up_scores(inputs), self.predictor.layer(inputs.layer).scores
        part = None if copy is None else copy.up_part(self.hidden(inputs))
        return scores if part is None else scores + part

    def nomination_scores(self, inputs: MaskInputs) -> Tensor:
        """The predictor's scores."""
        return self.outputs(inputs)[0]


class StagedProx(Staged, Prox):
    """The neurons with the highest scores by Prox's untrained copy, in stages.

    `Codebook.calibrated` also holds the tensors of `prox`: its rule chooses how many bytes the copy takes.
    """

    name = "staged-prox"
    by_default = True
    is_peer = False  # Prox has no stages
    color, marker = "#B22222", "P"

    @classmethod
    def has_kernel_on(cls, device: str) -> bool:
        """On both."""
        return True

    def kernel_by(self, way: str) -> str | None:
        """stages, if they keep neurons by thresholds."""
        return None if "sizes" in self.tensors else "stages"

    def stored_copy(self, layer: int) -> ops.SpacedCopy:
        """The copy that a layer's kernel reads."""
        tensors = self.tensors
        return ops.SpacedCopy(
            tensors["planes"][layer], tensors["spacings"][layer], tensors["norms"][layer], tensors["inputs"][layer]
        )

    def nominate(self, inputs: MaskInputs) -> MaskDecision:
        """The neurons whose scores reach the threshold, or the top scores."""
        every = inputs.values.new_ones(1, 1, dtype=torch.bool)
        nominated = self.kept(inputs.layer, 0, self.nomination_scores(inputs), every)
        return MaskDecision(nominated, read={"copy": self.inputs_read(inputs)})

    def up_scores(self, inputs: MaskInputs) -> Tensor:
        """The scores by the exact gate and the copy's up."""
        assert inputs.gate is not None  # `sees_gate` asks for it
        return log_energy(inputs.measure(inputs.layer, inputs.site, inputs.gate * self.copied(inputs)[1]))

    def nomination_scores(self, inputs: MaskInputs) -> Tensor:
        """The copy's scores, as logarithms of squares."""
        return log_energy(self.scores(inputs))

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """The tensors of `prox` for this share of the bytes, and those of the stages."""
        cls.check_ffns(fit.ffns, share)
        copied = copy.copy(fit)
        copied.codebook = fit.codebook.with_calibrated(cls.name, Prox.calibrate(fit, share), {})
        return super().calibrate(copied, share)

    @classmethod
    def uncalibrated(cls, fit: FitPass) -> dict[str, Tensor]:
        """The tensors before their calibration: with the copy."""
        return super().uncalibrated(fit) | fit.codebook.calibrated[cls.name]


class StagedStatic(_MaskStages, Static):
    """One set of neurons for each layer, in stages."""

    name = "staged-static"
    color, marker = "#999933", "^"

    @classmethod
    def rows(cls, fit: FitPass) -> int:
        """One mask in a layer."""
        return 1

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The layer's mask."""
        return ops.unpack(self.tensors["masks"][inputs.layer], inputs.values.shape[-1])

    def table(self, inputs: MaskInputs) -> Tensor:
        """The mean pattern of all rows, float32 [1, D]."""
        sizes = self.codebook.sites[inputs.site].sizes[self.codebook.group(inputs.layer)].float()
        return (sizes / sizes.sum() @ super().table(inputs)).unsqueeze(0)

    def nomination_scores(self, inputs: MaskInputs) -> Tensor:
        """The mean pattern, for every token."""
        return self.table(inputs).expand(len(inputs.values), -1)
