"""The weights of a decoder of Llama's kind, as a decoding step on the CPU or on a GPU takes them.

Shape letters: see `apc.ops`; h heads, d size of a head, S tokens that fit into the cache.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apc.ops.rounded import Rows

TYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttentionWeights(NamedTuple):
    """What attention reads in a layer."""

    norm: Tensor  # [E], of the norm before it
    projections: Sequence[Rows]  # of query [h · d, E], key and value [key heads · d, E], and output [E, h · d]
    biases: Sequence[Tensor | None]  # of the projections
    head_norms: Sequence[Tensor | None]  # [d], of each query and each key
    keys: Tensor  # [n, key heads, S, d], the cache
    values: Tensor  # [n, key heads, S, d]


class DenseFFN(NamedTuple):
    """A gated FFN as models store it."""

    gate: Rows  # [D, E]
    up: Rows  # [D, E]
    down: Rows  # [E, D]
    activation: str  # one of `ACTIVATIONS`


class Layer(NamedTuple):
    """A layer: attention, then an FFN, each after a norm."""

    attention: AttentionWeights
    ffn_norm: Tensor  # [E]
    ffn: Any  # a `DenseFFN`, a function from [n, E] to [n, E], or on the CPU `decode_cpu.AnyFFN`


class DecoderWeights(NamedTuple):
    """All weights of a model of Llama's kind, of one type in `TYPES`, or matrices rounded to 8 bits from it."""

    embedding: Tensor  # [V, E], as the model stores it
    layers: Sequence[Layer]
    norm: Tensor  # [E], the last one
    head: Rows  # [V, E]
    cos: Tensor  # [S, d], of the rotary embedding
    sin: Tensor  # [S, d]
    epsilon: float  # of all norms
    scaling: float  # of the products of queries and keys


class Unsupported(ValueError):
    """Weights that the kernel can't read; the message says why."""
