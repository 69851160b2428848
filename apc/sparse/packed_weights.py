"""A decoder's matrices at 4 bits a weight, as `ops.decode_packed` reads them.

FFNs that `quantise_ffns` stored at 4 bits keep their values. Other matrices are rounded as it does. So where another
library stored a model at 4 bits, gate, up and attention's projections keep their levels, with low and step rounded to 8
bits. Down is rounded anew: its stored groups run along the neurons, those here along a neuron's column.
"""

from collections.abc import Sequence

from torch import Tensor

from apc.data.ffn import LayerFFN
from apc.data.quantise import Levels, nearest_levels, neuron_rows, stored, stored_form
from apc.ops.decode_packed import PackedLayer
from apc.ops.decoder_weights import DecoderWeights, Unsupported
from apc.ops.packed import PackedRows, pack_rows
from apc.ops.packed_gpu import PackedClusterFFN, PackedFFN, SparedNeurons
from apc.ops.rounded import Rows

BITS, GROUP = 4, 32  # of a weight, and weights of a row that share levels


def packed_layers(decoder: DecoderWeights, ffns: Sequence[PackedClusterFFN]) -> list[PackedLayer]:
    """The layers with attention's projections at 4 bits, and these FFNs. Raises Unsupported for odd widths."""
    pairs = zip(decoder.layers, ffns, strict=True)
    return [PackedLayer([*map(_rounded, layer.attention.projections)], ffn) for layer, ffn in pairs]


def packed_ffn(ffn: LayerFFN, activation: str) -> PackedFFN:
    """An FFN's matrices at 4 bits. Raises Unsupported if it is stored at another number of bits."""
    form = stored(ffn)
    if form is not None and form.bits != BITS:
        raise Unsupported(f"{ffn.name}: its FFN is stored at {form.bits} bits (model.ffn_bits), not at {BITS}")
    form = form or stored_form(ffn, BITS, GROUP)
    rows, is_spared = neuron_rows(ffn), form.spared.to(ffn.device)  # a model may have been moved since
    spared = is_spared.nonzero()[:, 0]
    packed = {name: _packed(form.levels[name], matrix, is_spared) for name, matrix in rows.items()}
    exact = SparedNeurons(spared.int(), *(rows[name][spared].detach().contiguous() for name in ("gate", "up", "down")))
    return PackedFFN(packed["gate"], packed["up"], packed["down"], activation, exact)


def _rounded(matrix: Rows) -> PackedRows:
    assert isinstance(matrix, Tensor)  # nothing is rounded yet
    floats = matrix.float()
    return _packed(nearest_levels(floats, BITS, GROUP), floats)


def _packed(levels: Levels, matrix: Tensor, dropped: Tensor | None = None) -> PackedRows:
    """A matrix packed by its levels; rows that are dropped, bool [R], become zero."""
    if matrix.shape[1] % levels.group:
        raise Unsupported(f"a row of {matrix.shape[1]} weights is not cut into whole groups of {levels.group}")
    units = levels.units.to(matrix.device)
    if dropped is not None:
        units = units.masked_fill(dropped[:, None], 0.0)
    try:
        return pack_rows(levels.index(matrix), levels.step, levels.low, units)
    except ValueError as error:
        raise Unsupported(str(error)) from error
