"""Rules of other authors that need no training, only a sample of fit text.

Shape letters: n tokens, E hidden size, D neurons, L layers, P projections, r rank.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from apc import ops
from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN, first_device
from apc.data.quantise import FULL_BITS, mean_bits
from apc.predict.predictor import Predictor
from apc.sparse.histogram import ThresholdFinder
from apc.sparse.policies.base import PEER_COLOR, FitPass, MaskDecision, MaskInputs, MaskPolicy, subset_bits
from apc.sparse.policies.bounds import Dense
from apc.sparse.policies.budget import allocate_inputs
from apc.sparse.policies.input_costs import SKIPPED, costs
from apc.utils.errors import UserError

RANKS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of r-sparse: the shares of the bytes that its low-rank maps may take


class Peer(MaskPolicy):
    """A policy of other authors, calibrated on fit text. It uses no clusters."""

    is_peer = True
    experts = False
    calibrated = True
    uses_codebook = False
    sites = ("neuron",)

    @classmethod
    def known_before_ffn(cls) -> bool:
        """No: down's inputs are chosen by what gate and up gave."""
        return False

    def tensor(self, name: str, layer: int) -> Tensor:
        """A layer's part of what `calibrate` returned."""
        return self.codebook.calibrated[self.name][name][layer]

    def bytes_left(self, fit: FitPass, share: float) -> float:
        """What `parameters_read` leaves of this share of the stored bytes. Raises UserError if nothing."""
        left = share - self.parameters_read("neuron") / _stored_parameters(fit)
        if left <= 0:
            raise UserError(f"policies: {self.name} reads {share - left:.1%} before any input; raise bytes={share:g}")
        return left


class Cats(Peer):
    """Keeps the neurons whose |act(gate)| reaches their layer's threshold (CATS, Lee et al., 2024, arXiv 2404.08763).

    The gate is read in full; up and down only at the kept neurons. To read a share b of the bytes of three projections,
    the share (3b − 1) / 2 of the neurons is kept.
    """

    name = "cats"
    sees_gate = True
    color, marker = PEER_COLOR, "X"

    @classmethod
    def check_bytes(cls, share: float) -> None:
        """Raises UserError if the gate alone is as much as this share of the bytes."""
        if share <= 1 / 3:
            raise UserError(f"policies: {cls.name} reads the gate in full, a third of the bytes; raise bytes={share:g}")

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """thresholds float32 [L]: counted while each token keeps its own top share of the neurons."""
        cls.check_bytes(share)
        policy = _LargestGates(fit.codebook, None, 0, (3 * share - 1) / 2)
        finder = ThresholdFinder(fit.codebook.layers, first_device(fit.ffns))
        fit.run(policy, _GateCounter(finder))
        finder.narrow(torch.full((fit.codebook.layers,), policy.share, dtype=torch.float64))
        fit.run(policy, _GateCounter(finder))
        return {"thresholds": finder.thresholds()}

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The gates that reach the threshold."""
        return MaskDecision(self.mask(inputs), read={"gate": inputs.values.new_ones(1, 1, dtype=torch.bool)})

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The neurons whose gates reach the threshold."""
        assert inputs.gate is not None  # `sees_gate` asks for it
        return inputs.gate.float().abs() >= self.tensor("thresholds", inputs.layer)


class _LargestGates(Cats):
    """Keeps a share of the neurons, those with the largest |act(gate)|."""

    def __init__(self, codebook: Codebook, predictor: Predictor | None, seed: int, share: float):
        super().__init__(codebook, predictor, seed)
        self.share = share

    def mask(self, inputs: MaskInputs) -> Tensor:
        assert inputs.gate is not None
        return ops.top_mask(inputs.gate.float().abs(), ops.mask_size(inputs.gate.shape[-1], self.share), check=False)


@dataclass
class _GateCounter:
    """A meter that counts |act(gate)|."""

    finder: ThresholdFinder

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        assert inputs.gate is not None
        self.finder.add(inputs.layer, inputs.gate.float().abs())


class Teal(Peer):
    """Reads only the inputs of each projection that reach a threshold (TEAL, Liu et al., 2024, arXiv 2408.14690).

    Gate and up read the inputs x with |x| above one threshold of the layer, down the inputs h with |h| above another.
    The budget is allocated by `apc.sparse.policies.budget`, over x, h and all layers. The paper shares out within
    each layer only, by the error of its output, and gives each the same bytes; that gained nothing here (LOG.md).
    """

    name = "teal"
    by_default = True
    masks_input = True
    completes = False
    color, marker = PEER_COLOR, "p"

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """input_thresholds and neuron_thresholds, and the shares of x and h that reach them on the sample.

        All float32 [L]. Thresholds are counted on the dense model, as in the paper.
        """
        rule = cls(fit.codebook, None, 0)
        kept, _ = allocate_inputs(costs(fit, rule), SKIPPED, _weights(fit.codebook), share)
        return cls._thresholds(fit, rule, kept)

    @classmethod
    def _thresholds(cls, fit: FitPass, rule: "Teal", kept: Tensor) -> dict[str, Tensor]:
        """The thresholds that these shares of x and h reach, float64 [L, 2], and the shares."""
        counter = _InputCounter(rule, [ThresholdFinder(len(kept), first_device(fit.ffns)) for _ in range(2)])
        dense = Dense(fit.codebook, None, 0)
        fit.run(dense, counter)
        for finder, shares in zip(counter.finders, kept.T, strict=True):
            finder.narrow(shares)
        fit.run(dense, counter)
        found = [finder.thresholds() for finder in counter.finders]
        names = ("input_thresholds", "neuron_thresholds", "input_shares", "neuron_shares")
        return dict(zip(names, [*found, *kept.float().T.contiguous()], strict=True))

    def input_scores(self, layer: int, hidden: Tensor) -> Tensor:
        """|x|, float32 [n, E]."""
        return hidden.float().abs()

    def neuron_scores(self, layer: int, values: Tensor) -> Tensor:
        """|h|, float32 [n, D]."""
        return values.float().abs()

    def completion(self, layer: int, projection: str, skipped: Tensor) -> Tensor:
        """Nothing stands in for skipped inputs."""
        raise NotImplementedError

    def input_mask(self, layer: int, hidden: Tensor) -> Tensor:
        """The inputs that reach the threshold."""
        return self.input_scores(layer, hidden) >= self.tensor("input_thresholds", layer)

    def mask(self, inputs: MaskInputs) -> Tensor:
        """The inputs of down that reach the threshold."""
        return self.neuron_scores(inputs.layer, inputs.values) >= self.tensor("neuron_thresholds", inputs.layer)

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The inputs of down; gate and up read theirs."""
        read = self.input_mask(inputs.layer, inputs.inputs[inputs.layer])
        return MaskDecision(self.mask(inputs), read={"gate": read, "up": read})

    def choice_bits(self, site: str, densities: list[float]) -> float:
        """Bits for the choice of the inputs of down, and of those of gate and up, at the calibrated shares."""
        shares = self.codebook.calibrated[self.name]["input_shares"].tolist()
        return super().choice_bits(site, densities) + subset_bits(self.codebook.hidden_size, shares)


@dataclass
class _InputCounter:
    """A meter that counts the scores of x and of h."""

    rule: Teal
    finders: list[ThresholdFinder]

    def add(self, inputs: MaskInputs, decision: MaskDecision) -> None:
        layer = inputs.layer
        self.finders[0].add(layer, self.rule.input_scores(layer, inputs.inputs[layer]))
        self.finders[1].add(layer, self.rule.neuron_scores(layer, inputs.values))


def _stored_parameters(fit: FitPass) -> float:
    """The number of 16-bit parameters that take as many bytes as an FFN's stored weights."""
    book = fit.codebook
    return book.projections * book.hidden_size * book.ffn_width * mean_bits(fit.ffns) / FULL_BITS


def _weights(codebook: Codebook) -> tuple[float, float]:
    """The shares of an FFN's bytes that x and h decide on."""
    return 1 - 1 / codebook.projections, 1 / codebook.projections


class Wina(Teal):
    """Reads each token's top share of inputs by |input| · column norm (WINA, Chen et al., 2025, arXiv 2505.19427).

    For x, the norm is that of the columns of gate and up together; for h, that of the columns of down. The norms are
    read too. The budget is shared out as for TEAL.
    """

    name = "wina"
    by_default = False
    color, marker = PEER_COLOR, "H"

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """input_norms [L, E], neuron_norms [L, D], and input_shares and neuron_shares [L], float32."""
        norms = {
            "input_norms": torch.stack([_input_norms(ffn).cpu() for ffn in fit.ffns]),
            "neuron_norms": torch.stack([ffn.output_norms().cpu() for ffn in fit.ffns]),
        }
        rule = cls(fit.codebook.with_calibrated(cls.name, norms, {}).to(first_device(fit.ffns)), None, 0)
        kept, _ = allocate_inputs(costs(fit, rule), SKIPPED, _weights(fit.codebook), rule.bytes_left(fit, share))
        return norms | dict(zip(("input_shares", "neuron_shares"), kept.float().T.contiguous(), strict=True))

    def input_scores(self, layer: int, hidden: Tensor) -> Tensor:
        """|x| times the norms, float32 [n, E]."""
        return hidden.float().abs() * self.tensor("input_norms", layer)

    def neuron_scores(self, layer: int, values: Tensor) -> Tensor:
        """|h| times the norms, float32 [n, D]."""
        return values.float().abs() * self.tensor("neuron_norms", layer)

    def input_mask(self, layer: int, hidden: Tensor) -> Tensor:
        """Each token's top inputs."""
        return self._top(self.input_scores(layer, hidden), "input_shares", layer)

    def mask(self, inputs: MaskInputs) -> Tensor:
        """Each token's top inputs of down."""
        return self._top(self.neuron_scores(inputs.layer, inputs.values), "neuron_shares", inputs.layer)

    def _top(self, scores: Tensor, shares: str, layer: int) -> Tensor:
        m = max(1, round(self._shares[shares][layer] * scores.shape[-1]))
        return ops.top_mask(scores, m, check=False)

    @cached_property
    def _shares(self) -> dict[str, list[float]]:
        """The shares by name and layer, on the host, so that no layer waits for the device."""
        made = self.codebook.calibrated[self.name]
        return {name: made[name].tolist() for name in ("input_shares", "neuron_shares")}

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The norms."""
        return self.codebook.hidden_size + self.codebook.ffn_width

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """One for each norm."""
        return self.parameters_read(site)


def _input_norms(ffn: FFN) -> Tensor:
    """The norms of the columns of gate and up together, float32 [E]."""
    return torch.linalg.vector_norm(torch.cat([ffn.projection(name).float() for name in _inputs_of(ffn)]), dim=0)


def _inputs_of(ffn: FFN) -> list[str]:
    """The projections that read the FFN's input."""
    return ["gate", "up"] if ffn.gated else ["up"]


class RSparse(Teal):
    """TEAL, with a low-rank map of the inputs that each projection skips (Zhang et al., 2025, arXiv 2504.19449).

    The map is the best approximation of the projection's weights of rank r, from their singular value decomposition.
    Its r·(E + D) parameters are read for each token, so fewer inputs are. The rank is the one of `RANKS` for which the
    shared-out budget costs least on the sample.
    """

    name = "r-sparse"
    by_default = False
    adds_to_projections = True
    changes_output = True
    completes = True
    color, marker = PEER_COLOR, ">"

    @classmethod
    def calibrate(cls, fit: FitPass, share: float) -> dict[str, Tensor]:
        """As for TEAL, with inner_P float16 [L, r, inputs] and outer_P [L, outputs, r] for each projection P."""
        E, D = fit.codebook.hidden_size, fit.codebook.ffn_width
        each = (E + D) * fit.codebook.projections / _stored_parameters(fit)  # the share of bytes that a rank takes
        ranks = [max(1, round(part * share / each)) for part in RANKS]
        largest = low_rank_maps(fit.ffns, min(E, max(ranks)))
        tried = []
        for rank in ranks:
            maps = {
                name: (value[:, :rank] if name.startswith("inner") else value[..., :rank]).contiguous()
                for name, value in largest.items()
            }
            rule = cls(fit.codebook.with_calibrated(cls.name, maps, {}).to(first_device(fit.ffns)), None, 0)
            kept, cost = allocate_inputs(costs(fit, rule), SKIPPED, _weights(fit.codebook), rule.bytes_left(fit, share))
            tried.append((cost, rank, rule, kept, maps))
        _, _, rule, kept, maps = min(tried, key=lambda one: one[:2])
        return cls._thresholds(fit, rule, kept) | maps

    @classmethod
    def calibrated_bytes(cls, codebook: Codebook) -> int:
        """Bytes of the low-rank maps at most."""
        dense = codebook.projections * codebook.hidden_size * codebook.ffn_width
        return round(max(RANKS) * 2 * dense * codebook.layers)

    def completion(self, layer: int, projection: str, skipped: Tensor) -> Tensor:
        """The low-rank map of the skipped inputs."""
        inner, outer = (self.tensor(f"{part}_{projection}", layer).to(skipped.dtype) for part in ("inner", "outer"))
        return skipped @ inner.T @ outer.T

    def projection_delta(self, layer: int, projection: str, hidden: Tensor) -> Tensor:
        """The low-rank map of the inputs that gate and up skip."""
        skipped = hidden.masked_fill(self.input_mask(layer, hidden), 0)
        return self.completion(layer, projection, skipped)

    def decide(self, inputs: MaskInputs) -> MaskDecision:
        """The inputs of down, and the low-rank map of those that it skips."""
        decision = super().decide(inputs)
        skipped = inputs.values.masked_fill(decision.mask, 0)
        return replace(decision, output_delta=self.completion(inputs.layer, "down", skipped))

    def parameters_read(self, site: str, copy: float | None = None) -> float:
        """The low-rank maps."""
        maps = self.codebook.calibrated[self.name]
        return sum(value[0].numel() for name, value in maps.items() if name.startswith(("inner", "outer")))

    def multiplications(self, site: str, copy: float | None = None) -> float:
        """One for each parameter of the low-rank maps."""
        return self.parameters_read(site)


def low_rank_maps(ffns: list[FFN], rank: int) -> dict[str, Tensor]:
    """The low-rank maps of all projections, float16, on the host; see `RSparse.calibrate`."""
    maps: dict[str, Tensor] = {}
    for name in _inputs_of(ffns[0]) + ["down"]:
        pairs = [_low_rank(ffn.down_matrix if name == "down" else ffn.projection(name), rank) for ffn in ffns]
        maps[f"inner_{name}"] = torch.stack([inner for inner, _ in pairs])
        maps[f"outer_{name}"] = torch.stack([outer for _, outer in pairs])
    return maps


def _low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors of weight [outputs, inputs]: inner [rank, inputs], outer [outputs, rank], float16, on the host.

    Their product is its best approximation of this rank. The singular vectors of the shorter side are the eigenvectors
    of a Gram matrix.
    """
    matrix = weight.detach().float()
    tall = matrix.shape[0] > matrix.shape[1]
    vectors = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
    inner, outer = (vectors.T, matrix @ vectors) if tall else (vectors.T @ matrix, vectors)
    return inner.half().cpu(), outer.half().cpu()
