"""The staged FFN of a low-bit copy, by its definition in plain torch and on a GPU; `staged_ffn_cpu.py` is for the CPU.

Shape letters: see `apc.ops`; r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from apc.ops.bits import unpack
from apc.ops.copy_scores import nominate_triton
from apc.ops.ffn_arguments import (
    GROUP,
    ActiveNeurons,
    FFNWeights,
    LowBitCopy,
    LowRank,
    OutputDelta,
    Refinement,
    SpacedCopy,
    Stages,
)
from apc.ops.low_bit import low_bit_scores
from apc.ops.predict import bottleneck
from apc.ops.score_curve import ScoreCurve, score_curve
from apc.ops.sparse_ffn import act, sparse_ffn


def staged_ffn(hidden: Tensor, weights: FFNWeights, stages: Stages) -> Tensor:
    """The FFN's output [n, E] for hidden [n, E], in its type; all rows are read.

    A neuron's row of gate counts if its score by the copy reaches the first threshold. Its row of up counts if also
    2 log(|act(g)| · norm), plus what a copy of up adds to the score, reaches the second; its row of down if also
    2 log(|act(g) · u| · norm) reaches the third. A `SpacedCopy` gives ĝ and û, the score is 2 log(|act(ĝ) · û| · norm),
    and it adds 2 log|û|.
    """
    x, down = hidden.float(), weights.down.float()
    values, (*_, kept) = _staged_values(x, weights, stages)
    values = values.masked_fill(~kept, 0)
    output = values @ down + _update(values, stages.low_rank, "down")
    if stages.correction is not None:
        reduce, reduce_bias, correct, correct_bias = (each.float() for each in stages.correction)
        inner = F.silu(F.rms_norm(x, x.shape[-1:]) @ reduce.T + reduce_bias)
        output = output + inner @ correct + correct_bias
    return output.to(hidden.dtype)


def staged_ffn_triton(hidden: Tensor, weights: FFNWeights, stages: Stages) -> Tensor:
    """`staged_ffn` by kernels that read only the rows that count: for up to `MAX_TOKENS` tokens on a GPU.

    Raises ValueError for low-rank updates, which no kernel adds on a GPU, and as `sparse_ffn` does.
    """
    if stages.low_rank is not None:
        raise ValueError("staged_ffn_triton takes no low-rank updates; use staged_ffn")
    copy, threshold = stages.copy, stages.thresholds[0]
    if isinstance(copy, LowBitCopy) and copy.norms is None:
        masks, up_part = _nominate_by_neuron(hidden, copy, threshold)
    else:
        masks, up_part = nominate_triton(hidden, copy, threshold, stages.norms, weights.activation)
    delta = OutputDelta()
    if stages.correction is not None:
        reduce, reduce_bias, correct, correct_bias = stages.correction
        delta = OutputDelta(bottleneck(hidden, reduce, reduce_bias, True), correct, correct_bias)
    refinement = Refinement(stages.thresholds[1:], stages.norms, up_part)
    return sparse_ffn(hidden, weights, ActiveNeurons(masks), delta, "triton", refinement)


def _nominate_by_neuron(hidden: Tensor, copy: LowBitCopy, threshold: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `nominate_triton`, for a copy stored by neuron, of which all inputs take part."""
    masks = low_bit_scores(hidden, copy.planes, copy.curve, threshold, True)
    if copy.projections[-1] != "up":
        return masks, None
    scale, slope, power, bias = copy.curve
    of_up = ScoreCurve(scale[-1:], slope[-1:], power[-1:], torch.zeros_like(bias))
    return masks, low_bit_scores(hidden, copy.planes[:, -1:], of_up, None, True)


def staged_reads(hidden: Tensor, weights: FFNWeights, stages: Stages) -> float:
    """The mean share of rows of gate, up and down that a staged FFN reads for hidden [n, E]."""
    _, masks = _staged_values(hidden.float(), weights, stages)
    return torch.stack(masks).float().mean().item()


def _staged_values(x: Tensor, weights: FFNWeights, stages: Stages) -> tuple[Tensor, list[Tensor]]:
    """act(g) · u float32 [n, D] for x float32 [n, E], and the neurons that each stage keeps, bool [n, D]."""
    gate, up = weights.gate.float(), weights.up.float()
    scores, of_up = _scores(x, stages, weights)
    masks = [scores >= stages.thresholds[0]]
    values = act(x @ gate.T + _update(x, stages.low_rank, "gate"), weights.activation)
    masks.append(masks[-1] & (log_energy(values.abs() * stages.norms) + of_up >= stages.thresholds[1]))
    values = values * (x @ up.T + _update(x, stages.low_rank, "up"))
    masks.append(masks[-1] & (log_energy(values.abs() * stages.norms) >= stages.thresholds[2]))
    return values, masks


def _scores(x: Tensor, stages: Stages, weights: FFNWeights) -> tuple[Tensor, Tensor]:
    """Each neuron's score float32 [n, D], and the part of it that a copy of up adds, 0 without one."""
    copy, (D, E) = stages.copy, weights.gate.shape
    by_input = copy.norms is not None
    index = sum(unpack(plane, D if by_input else E) * 2.0**bit for bit, plane in enumerate(copy.planes))
    levels = index + (0.5 - 2 ** (len(copy.planes) - 1))  # [P, E, D] or [P, D, E]
    if copy.norms is None or copy.least is None:
        levels = levels.transpose(-1, -2)
    else:
        x = x.masked_fill(~(x.abs() * copy.norms >= copy.least), 0)
    if isinstance(copy, SpacedCopy):
        levels = levels * copy.spacings.float().repeat_interleave(GROUP, -1)[..., :D]
        gate, up = torch.einsum("ne,ped->pnd", x, levels)
        return log_energy((act(gate, weights.activation) * up).abs() * stages.norms), log_energy(up.abs())
    products = torch.einsum("ne,ped->npd", x, levels)
    scale, slope, power, bias = (each[None] for each in copy.curve)
    every = score_curve(products[None], scale, slope, power, bias)[0]
    if copy.projections[-1] != "up":
        return every, torch.zeros_like(every)
    no_bias = torch.zeros_like(bias)
    return every, score_curve(products[None, :, -1:], scale[:, -1:], slope[:, -1:], power[:, -1:], no_bias)[0]


def _update(values: Tensor, low_rank: LowRank | None, projection: str) -> Tensor:
    """What the low-rank update of a projection adds to its outputs; 0 without one."""
    if low_rank is None:
        return values.new_zeros(())
    a, b = (each.float() for each in getattr(low_rank, projection))
    return values @ a.T @ b.T


def log_energy(importance: Tensor) -> Tensor:
    """The logarithm of squared importances float32 [...]. Zero and NaN count as the smallest normal number."""
    return 2 * importance.nan_to_num(nan=0.0).clamp_min(torch.finfo(torch.float32).tiny).log()
