"""A decoding step on a GPU whose layers' matrices take 4 bits a weight: `decode_gpu.py` with `packed_gpu.py`.

Embedding and head stay as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from apc.ops.decode_gpu import StepGPU
from apc.ops.decoder_weights import DecoderWeights, Unsupported
from apc.ops.ffn_arguments import Prediction
from apc.ops.packed import PackedRows
from apc.ops.packed_gpu import Norm, PackedClusterFFN, PackedFFNCall, check_packed, project_packed


class PackedLayer(NamedTuple):
    """A layer's matrices at 4 bits."""

    projections: Sequence[PackedRows]  # of query, key, value and output
    ffn: PackedClusterFFN


class PackedStepGPU(StepGPU):
    """`StepGPU` that reads the layers' matrices at 4 bits.

    Raises Unsupported as `StepGPU` does, and for matrices that the kernels can't read.
    """

    def __init__(self, weights: DecoderWeights, layers: Sequence[PackedLayer]) -> None:
        if len(weights.layers[0].attention.keys) > 1:
            raise Unsupported("steps at 4 bits take one sequence")
        super().__init__(weights)
        self._inputs: list[PackedRows] = []  # projections of query, key and value together
        self._outputs = [layer.projections[-1] for layer in layers]
        try:
            for layer in layers:
                first, *others, output = layer.projections
                self._inputs.append(replace(first, words=torch.cat([each.words for each in (first, *others)])))
                check_packed(self._inputs[-1])
                check_packed(output)
            self._ffns = [PackedFFNCall(layer.ffn, weights.embedding.dtype) for layer in layers]
        except ValueError as error:
            raise Unsupported(str(error)) from error
        # For each layer, the later ones whose clusters it predicts.
        self._predicted: list[list[int]] = [[] for _ in layers]
        for number, ffn in enumerate(self._ffns):
            if ffn.predictor is not None and ffn.source != number:
                self._predicted[ffn.source].append(number)

    @torch.no_grad()
    def error(self) -> float:
        """How far the first layer's products are from the formula's for a random input, relatively; NaN counts too."""
        generator = torch.Generator(self._cos.device).manual_seed(0)
        E, dtype = self._inputs[0].E, self._weights.embedding.dtype
        x = torch.randn((1, E), generator=generator, device=self._cos.device).to(dtype)
        rows = self._inputs[0]
        pairs = [(project_packed(x, rows)[0], x.float() @ rows.unpacked().T), self._ffns[0].with_formula(x)]
        return max(((own.float() - exact).norm() / exact.norm()).nan_to_num(torch.inf).item() for own, exact in pairs)

    @torch.no_grad()
    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [1, V] after a token int64 [1, 1] at a position int64 []; writes its keys and values."""
        weights, epsilon = self._weights, self._weights.epsilon
        residual, added = F.embedding(token[:, 0], weights.embedding), None
        predictions: dict[int, Prediction] = {}
        for number, (ffn, layer) in enumerate(zip(self._ffns, weights.layers, strict=True)):
            attention = self._attentions[number]
            prediction, predicted = predictions.pop(number, None), self._predicted[number]
            later, others = (predicted[0] if predicted else None), predicted[1:]
            norm, listing = Norm(layer.attention.norm, epsilon), ffn.listing(residual, prediction)
            qkv, residual = project_packed(residual, self._inputs[number], attention.bias, None, norm, added, listing)
            attended = self._attend(qkv, attention.weights, position)
            residual, _ = project_packed(attended, self._outputs[number], attention.output_bias, residual)
            decides = ffn.predictor is not None and prediction is None
            hidden, input_norm = residual, None
            if decides or others:  # predictors read the norm, too
                hidden = self._norm(residual, layer.ffn_norm)
            else:
                input_norm = Norm(layer.ffn_norm, epsilon)
            if decides:
                prediction = ffn.predict(hidden)
            predictions |= {other: self._ffns[other].predict(hidden) for other in others}
            added, coming = ffn(hidden, input_norm, prediction, None if later is None else self._ffns[later], listing)
            if later is not None and coming is not None:
                predictions[later] = coming
        return self._project(residual, [weights.head], weights.norm, added)[0]
