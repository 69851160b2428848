"""A decoding step on a GPU whose layers' matrices take 4 bits a weight: `decode_gpu.py` with `packed_gpu.py`.

Embedding and head stay as they are. Between them all vectors of E values are arranged as packed rows need it.
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
from apc.ops.packed_gpu import PackedClusterFFN, PackedFFNCall, arranged, check_packed, natural, prepare, project_packed


class PackedLayer(NamedTuple):
    """A layer's matrices at 4 bits."""

    projections: Sequence[PackedRows]  # of query, key, value and output
    ffn: PackedClusterFFN


class PackedStepGPU(StepGPU):
    """`StepGPU` that reads the layers' matrices at 4 bits.

    Raises Unsupported as `StepGPU` does, and for matrices that the kernels can't read.
    """

    def __init__(self, weights: DecoderWeights, layers: Sequence[PackedLayer]) -> None:
        super().__init__(weights)
        order = arranged(torch.arange(weights.embedding.shape[1], device=weights.embedding.device))
        self._inputs, self._outputs = [], []  # projections of query, key and value together, and of the output
        self._norms = [
            (arranged(layer.attention.norm.detach()), arranged(layer.ffn_norm.detach())) for layer in weights.layers
        ]
        self._biases = [
            None if attention.output_bias is None else attention.output_bias[order] for attention in self._attentions
        ]
        try:
            for *inputs, output in (layer.projections for layer in layers):
                self._inputs.append(replace(inputs[0], words=torch.cat([each.words for each in inputs])))
                self._outputs.append(replace(output, words=output.words[order]))
            for rows in (*self._inputs, *self._outputs):
                check_packed(rows)
            self._ffns = [PackedFFNCall(layer.ffn, weights.embedding.dtype) for layer in layers]
        except ValueError as error:
            raise Unsupported(str(error)) from error
        self._predicted: list[list[int]] = [
            [] for _ in layers
        ]  # for each layer, the later ones whose clusters it predicts
        for number, ffn in enumerate(self._ffns):
            if ffn.predictor is not None and ffn.source != number:
                self._predicted[ffn.source].append(number)

    @torch.no_grad()
    def __call__(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits [1, V] after a token int64 [1, 1] at a position int64 []; writes its keys and values."""
        weights, epsilon, dtype = self._weights, self._weights.epsilon, self._weights.embedding.dtype
        residual, added = arranged(F.embedding(token[:, 0], weights.embedding)), None
        predictions: dict[int, Prediction] = {}
        for number, ffn in enumerate(self._ffns):
            attention, (norm, ffn_norm) = self._attentions[number], self._norms[number]
            prediction, predicted = predictions.pop(number, None), self._predicted[number]
            later, others = (predicted[0] if predicted else None), predicted[1:]
            hidden, residual, _ = prepare(residual, norm, epsilon, added)
            qkv = project_packed(hidden, self._inputs[number], dtype, attention.bias)
            attended = self._attend(qkv, attention.weights, position, arranged=True)
            residual = project_packed(attended, self._outputs[number], dtype, self._biases[number], residual)
            known = None if prediction is None else prediction.candidates
            hidden, _, kept = prepare(residual, ffn_norm, epsilon, None, ffn.masks, known, ffn.width)
            if ffn.predictor is not None and prediction is None:
                prediction = ffn.predict(hidden)
                _, _, kept = prepare(hidden, None, epsilon, None, ffn.masks, prediction.candidates, ffn.width)
            predictions |= {other: self._ffns[other].predict(hidden) for other in others}
            added, coming = ffn(hidden, kept, prediction, None if later is None else self._ffns[later])
            if later is not None and coming is not None:
                predictions[later] = coming
        residual, added = natural(residual), None if added is None else natural(added)
        return self._project(residual, [weights.head], weights.norm, added)[0]
