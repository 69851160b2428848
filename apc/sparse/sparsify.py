"""Makes a Hugging Face model run its FFNs under a policy's masks: `sparsify` and `restore`.

A mask multiplies what was computed, which is what a policy costs in quality, or says what is computed at all (`sparse_ffns.py`). Shape letters: n tokens,
E hidden size, D neurons at a site.
"""

import weakref

from torch import nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import FFNHooks, GatedFFN, find_ffns, first_device
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import MaskedForward
from apc.sparse.policies import make_policy
from apc.sparse.sparse_ffn import SparseFFNs
from apc.utils.errors import UserError

_HANDLES: weakref.WeakKeyDictionary[nn.Module, FFNHooks | SparseFFNs] = weakref.WeakKeyDictionary()


def check_fits(ffns: list[GatedFFN], codebook: Codebook, predictor: Predictor | None) -> None:
    """Raises UserError unless codebook and predictor have the model's shapes."""
    have = dict(layers=len(ffns), hidden_size=ffns[0].hidden_size)
    for what, thing in (("codebook", codebook), ("predictor", predictor)):
        for name, value in have.items() if thing is not None else ():
            if getattr(thing, name) != value:
                raise UserError(
                    f"the {what} is of another model: {name} {getattr(thing, name)}, the model's is {value}; give the one made for it"
                )
    for site, D in codebook.widths.items():
        if ffns[0].site_width(site) != D:
            raise UserError(
                f"the codebook is of another model: {D} neurons at {site}, the model has {ffns[0].site_width(site)}; give the one made for it"
            )
    if predictor is not None:
        made_for = predictor.provenance.get("codebook")
        if made_for and codebook.provenance and made_for != codebook.provenance:
            raise UserError("the predictor is of another codebook (its provenance says so); give the one made for it")
        expected = {site: codebook.k if predictor.form == "cluster" else D for site, D in codebook.widths.items()}
        if predictor.outputs != expected:
            raise UserError(
                f"the predictor is of another codebook: it has {predictor.outputs} outputs, the codebook {expected}; give the one made for it"
            )


def sparsify(
    model: nn.Module, codebook: Codebook, predictor: Predictor | None = None, policy: str = "oracle", seed: int = 0, kernel: str | None = None,
    max_sparse_tokens: float | None = None,
) -> nn.Module:  # fmt: skip
    """The model, changed in place so that its FFNs run under the policy's masks; `restore` takes that back.

    Args:
        codebook, predictor: as `Codebook.load` and `Predictor.load` give them; moved to the model's device.
        policy: dense, exact, static, random, oracle, thresholded-oracle, predicted, soft, gate, neuron-predictor or neuron-threshold.
        seed: what the policy `random` draws its masks from.
        kernel: None: masks multiply what was computed, which shows quality. Else FFNs read only what is kept: by Triton kernels (`triton`), by `torch`,
            or `auto`, by kernels where the model is on an NVIDIA GPU. For policies that know their masks before the FFN runs.
        max_sparse_tokens: with a kernel, how many tokens in a call run sparse at most; FFNs of more run dense, as in prefill. None: with `auto` on a GPU what
            is measured there (0 if sparse is never faster, as in small models), else what the kernels take at once, with `torch` 1. math.inf: all run sparse.

    Raises:
        UserError: the shapes are another model's, the policy is unknown, its predictor is missing, or no kernel takes it.
    """
    ffns = find_ffns(model)
    check_fits(ffns, codebook, predictor)
    device = first_device(ffns)
    if kernel is not None and any(ffn.down.weight.device != device for ffn in ffns):
        raise UserError(
            f"kernel={kernel}: the model's layers lie on several devices, which kernels do not take; leave kernel out"
        )
    chosen = None if policy == "dense" else make_policy(policy, codebook, predictor, seed)
    if chosen is not None and (kernel is None or chosen.kernel == "masks"):
        chosen = chosen.to(device)  # the other kernels take along what they need, and no profiles
    restore(model)
    if chosen is not None and kernel is None:
        _HANDLES[model] = MaskedForward(ffns, chosen).hook()
    elif chosen is not None:
        _HANDLES[model] = SparseFFNs(ffns, chosen, kernel, max_sparse_tokens).install()
    return model


def restore(model: nn.Module) -> nn.Module:
    """The model as it was before `sparsify`; does nothing to one that wasn't changed."""
    handle = _HANDLES.pop(model, None)
    if handle is not None:
        handle.remove()
    return model


def handle_of(model: nn.Module) -> FFNHooks | SparseFFNs | None:
    """What `sparsify` put into the model; its `remove()` takes it out. None for a model that is as it was."""
    return _HANDLES.get(model)
