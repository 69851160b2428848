"""Reads models whose linear layers are stored at few bits: each becomes a plain layer with the values of its numbers.

The libraries that stored the layers compute the values: transformers while it loads compressed-tensors, fp8
and mxfp4, bitsandbytes and torchao afterwards. Only torchao's int4 layers are computed here, because torchao can't.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn

from apc.utils.errors import UserError

_AT_LOAD = ("compressed-tensors", "fp8", "mxfp4")  # transformers computes the values of these if `dequantize` is set
_AFTERWARDS = ("torchao", "bitsandbytes")
_CONFIGS = {  # transformers' classes with that option
    "compressed-tensors": "CompressedTensorsConfig",
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "gguf": "GgufConfig",
}
_MODULES = {"compressed-tensors": "compressed_tensors", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}
READABLE = (*_AT_LOAD, *_AFTERWARDS)


def stored_by(config: Any) -> str | None:
    """The library or format that packed the weights, such as `torchao`; None if they are plain."""
    packing = getattr(config, "quantization_config", None)
    if packing is None or _entry(packing, "dequantize"):  # true if the weights were unpacked on loading
        return None
    method = _entry(packing, "quant_method")
    return str(getattr(method, "value", method))


def _entry(packing: object, key: str) -> Any:
    """An entry of a quantization config, which is a dictionary or an object; None if it is missing."""
    return packing.get(key) if isinstance(packing, dict) else getattr(packing, key, None)


def check_readable(config: Any) -> None:
    """Raises UserError if a model's weights are packed in a way that can't be read, or not without another package."""
    method = stored_by(config)
    if method is None:
        return
    where = f"{(getattr(config, 'architectures', None) or [type(config).__name__])[0]}: its weights are packed"
    if method not in READABLE:
        other = f"load a float32, bfloat16 or float16 copy, or one packed by {', '.join(READABLE)} or in a .gguf file"
        raise UserError(f"{where} ({method}), which can't be read; {other}")
    packing = config.quantization_config
    groups = list((_entry(packing, "config_groups") or {}).values()) if method == "compressed-tensors" else []
    if any(_scheme(group) != _scheme(groups[0]) for group in groups):
        problem = f"in {len(groups)} different ways (config_groups), and transformers unpacks only one"
        raise UserError(f"{where} {problem}; load a float32, bfloat16 or float16 copy")
    if any(_entry(_entry(group, "weights") or {}, "actorder") in ("group", "dynamic") for group in groups):
        problem = "in groups of columns out of order (actorder=group), which compressed-tensors no longer reads"
        raise UserError(f"{where} {problem}; load a float32, bfloat16 or float16 copy")
    if _entry(packing, "transform_config"):
        problem = "with inputs that are transformed too (transform_config), which is not supported"
        raise UserError(f"{where} {problem}; load a float32, bfloat16 or float16 copy")
    if method in _MODULES and importlib.util.find_spec(_MODULES[method]) is None:
        raise UserError(f"{where} ({method}), and the package that reads them is missing; run pip install {method}")


def _scheme(group: Any) -> tuple:
    return _entry(group, "weights"), _entry(group, "format")


def unpack_at_load(config: Any) -> dict:
    """Options for `from_pretrained` with which transformers unpacks the weights, where it can; changes `config`."""
    if stored_by(config) not in _AT_LOAD:
        return {}
    config.quantization_config = dict(config.quantization_config, dequantize=True)
    return dict(config=config)


@torch.no_grad()
def dequantise(model: nn.Module) -> nn.Module:
    """The model itself, with plain linear layers of its type in place of those that torchao or bitsandbytes packed.

    They take 16 bits a weight. A model that is not packed stays as it is. Layers that also round their inputs do so no
    longer. Raises UserError, and leaves the model as it was, if the layers were packed by another library, or if no
    function unpacks them.
    """
    whole: Any = model
    method = stored_by(getattr(model, "config", None))
    if method == "bitsandbytes":
        return whole.dequantize()
    if method not in (None, "torchao"):
        raise UserError(f"{type(model).__name__}: {advice(method)}")
    packed = {name: value for name, value in model.named_parameters(remove_duplicate=False) if is_torchao(value)}
    unpacked: dict[int, nn.Parameter] = {}  # shared ones stay shared
    for name, value in packed.items():
        if id(value) not in unpacked:
            values = _torchao_values(f"{type(model).__name__}: {name}", value)
            unpacked[id(value)] = nn.Parameter(values.to(getattr(model, "dtype", value.dtype)), False)
    for name, value in packed.items():
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, unpacked[id(value)])
    if method is not None:
        whole.hf_quantizer.remove_quantization_config(model)
    return model


def advice(method: str) -> str:
    """Why a model in memory can't be used with packed weights, and what to do."""
    if method in _AFTERWARDS:
        what = "call apc.dequantise(model) first"
    else:
        what = "load a float32, bfloat16 or float16 copy"
        if method in _CONFIGS:
            what = f"load it with from_pretrained(…, quantization_config={_CONFIGS[method]}(dequantize=True))"
    return f"its weights are packed ({method}); {what}"


def is_torchao(weight: object) -> bool:
    """Whether a weight is one of torchao's tensors, which look like plain ones of their type."""
    return any(kind.__module__.partition(".")[0] == "torchao" for kind in type(weight).__mro__)


def _torchao_values(where: str, weight: Any) -> Tensor:
    """A packed weight's values. Raises UserError if there is no way to compute them."""
    kind = type(weight).__name__
    if getattr(weight, "act_pre_scale", None) is not None:
        problem = "has factors for its inputs (act_pre_scale), which are not supported"
        raise UserError(f"{where} ({kind}) {problem}; load a float32, bfloat16 or float16 copy")
    if kind == "Int4Tensor":
        return _int4_values(weight)
    if type(weight).dequantize is Tensor.dequantize:
        problem = "is in a layout that torchao can't unpack"
        raise UserError(f"{where} ({kind}) {problem}; use int4_packing_format=plain, or load a bfloat16 copy")
    return weight.dequantize()


def _int4_values(weight: Any) -> Tensor:
    """Values of torchao's `Int4Tensor`, float32 [R, E].

    qdata: int8 [R, E / 2], each byte with an even weight's number from −8 to 7 in its lower half and its neighbour's in
    the upper; scale, zero_point: [G, R]. A weight is number · scale + zero_point
    (`int4_row_quantize_zp` and `pack_int4` in mslk.quantize.shuffle).
    """
    data = weight.qdata.view(torch.int8)
    numbers = torch.stack([data << 4 >> 4, data >> 4], dim=2).flatten(1).float()
    scale, zero = (each.float().T.unsqueeze(2) for each in (weight.scale, weight.zero_point))
    return (numbers.unflatten(1, (scale.shape[1], -1)) * scale + zero).flatten(1)
