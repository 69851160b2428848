"""Makes a Hugging Face model run its FFNs under a policy's masks: `sparsify` and `restore`.

Without a kernel the model runs dense and its activations are masked (`masked_forward.py`), which shows a policy's
quality. With a kernel FFNs compute only the neurons that the mask keeps (`sparse_ffn.py`), which shows its speed.
"""

import math
import warnings
import weakref
from typing import NoReturn

from torch import nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN, check_calls, find_ffns, first_device
from apc.data.hooks import FFNHooks
from apc.data.models import other_weights
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import default_policy, make_policy
from apc.sparse.sparse_ffn import SparseFFNs
from apc.utils.errors import UserError

Handle = FFNHooks | SparseFFNs  # what `sparsify` puts into a model; `remove()` takes it out
_HANDLES: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


def check_fits(ffns: list[FFN], codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless codebook and predictor belong together and have the model's shapes."""
    shape = dict(layers=len(ffns), hidden_size=ffns[0].hidden_size)
    for kind, part in (("codebook", codebook), ("predictor", predictor)):
        for name, value in shape.items() if part is not None else ():
            if getattr(part, name) != value:
                problem = f"it has {name}={getattr(part, name)}, the model {value}; use the {kind} made for this model"
                raise UserError(f"the {kind} belongs to another model: {problem}")
    for site, D in codebook.widths.items():
        if (width := ffns[0].site_width(site)) != D:
            problem = f"it has {D} neurons at {site}, the model has {width}; use the codebook made for this model"
            raise UserError(f"the codebook belongs to another model: {problem}")
    if predictor is None:
        return
    advice = "use the predictor made for this codebook"
    trained_for = predictor.provenance.get("codebook")
    if trained_for and codebook.provenance and trained_for != codebook.provenance:
        raise UserError(f"the predictor belongs to another codebook, by its provenance; {advice}")
    expected = {site: codebook.k if predictor.form == "cluster" else D for site, D in codebook.widths.items()}
    if predictor.outputs != expected:
        problem = f"it has {predictor.outputs} outputs, this codebook needs {expected}"
        raise UserError(f"the predictor belongs to another codebook: {problem}; {advice}")


def sparsify(
    model: nn.Module,
    codebook: Codebook,
    predictor: Predictor | None = None,
    policy: str | None = None,
    seed: int = 0,
    kernel: str | None = None,
    max_sparse_tokens: float | None = None,
    scoring: bool = False,
    strict: bool = False,
) -> nn.Module:
    """The model itself, changed so that its FFNs run under the policy's masks; `restore` or the next call undoes it.

    Args:
        model: a Hugging Face causal language model.
        codebook, predictor: as `Codebook.load` and `Predictor.load` return them; moved to the model's device.
        policy: a name in `apc.sparse.policies.POLICIES`. None: the policy that the predictor was trained for, or
            `static` without a predictor.
        seed: decides the masks of the policy `random`.
        kernel: None masks the activations of a dense forward pass. With a kernel FFNs compute only the neurons that the
            mask keeps: `triton` on an NVIDIA GPU, `numba` on the CPU, `torch` by torch, `auto` by that of the first
            two that the model's device has. Kernels need a policy that knows its masks before the FFN runs, or stages.
        max_sparse_tokens: with a kernel, calls of more tokens run dense, as in prefill. None: `auto` measures the
            crossover (0 if sparse is never faster), `triton` and `numba` use the kernels' limit, and `torch` uses one
            token. math.inf: all calls run sparse.
        scoring: with a kernel, calls of any number of tokens run sparse, so that scores of whole sequences are those of
            the masked model. Without a kernel, masks apply to all tokens anyway.
        strict: decides what happens if the model's weights are not those that the codebook was fitted with. True: an
            error. False: a warning, because a fine-tuned model may be meant. `weights_sample` says which changes are
            missed.

    Raises:
        UserError: codebook or predictor belong to another model, the policy is unknown, its predictor is missing, no
            kernel supports it or what the model's FFNs compute, or the model's FFNs are not supported.
    """
    if scoring and max_sparse_tokens is not None:
        raise UserError(f"scoring=True runs all calls sparse; leave out max_sparse_tokens={max_sparse_tokens}")
    ffns = find_ffns(model)
    check_fits(ffns, codebook, predictor)
    device = first_device(ffns)
    if any(value.is_meta for value in model.parameters()):
        raise UserError("the model's weights are not in memory (device meta, as when offloaded); load all of them")
    if kernel is not None and any(ffn.device != device for ffn in ffns):
        problem = "the model's layers are on several devices, which no kernel supports"
        raise UserError(f"kernel={kernel}: {problem}; use kernel=None")
    if policy is None:
        policy = default_policy(codebook, predictor)
    if policy == "dense":
        return restore(model)
    other = other_weights(model, codebook.provenance)
    if other is not None and strict:
        raise UserError(f"{other.line}; use the codebook made for this model, or apc.sparsify with strict=False")
    if other is not None:
        warnings.warn(other.line, stacklevel=2)
    decider = make_policy(policy, codebook, predictor, seed)
    if kernel is None or decider.kernel_by("torch") in ("masks", "stages"):
        decider = decider.to(device)  # the other kernels copy the tensors they need, and no profiles
    restore(model)
    if kernel is None:
        check_calls(model, ffns)
        _HANDLES[model] = MaskedForward(ffns, decider).hook()
    else:
        sparse = SparseFFNs(ffns, decider, kernel, math.inf if scoring else max_sparse_tokens)
        check_calls(model, ffns)
        _HANDLES[model] = sparse.install(model)
    for ffn in ffns:
        ffn.module.__dict__["__reduce_ex__"] = _refuse_copy
    return model


def _refuse_copy(_protocol: int) -> NoReturn:
    """Replaces an FFN's `__reduce_ex__`, which copy.deepcopy and pickle call: hooks must not be copied with a model."""
    problem = "a model that apc.sparsify changed can't be copied or pickled"
    raise UserError(f"{problem}; call apc.restore(model) first, and apc.sparsify with the copy")


def restore(model: nn.Module) -> nn.Module:
    """The model itself, dense as before `sparsify`; a model that was not changed stays as it is."""
    handle = _HANDLES.pop(model, None)
    if handle is not None:
        handle.remove()
        for module in model.modules():
            module.__dict__.pop("__reduce_ex__", None)
    return model


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of the change that `sparsify` made to a model; None for a model that is dense.

    With a kernel it is a `SparseFFNs`, whose `max_sparse_tokens` may be changed between calls, else an `FFNHooks`.
    """
    return _HANDLES.get(model)
