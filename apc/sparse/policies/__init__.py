"""The mask policies by name. A new policy is a class in its own file and an entry in `POLICIES`."""

from apc.cluster.codebook import Codebook
from apc.config.schema import Config, StagesConfig
from apc.data.quantise import FULL_BITS
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import FitPass, MaskDecision, MaskInputs, MaskPolicy, Meter  # noqa: F401  # re-exported
from apc.sparse.policies.bounds import Dense, Exact, Oracle, ThresholdedOracle
from apc.sparse.policies.copies import Prox
from apc.sparse.policies.fixed import Random, Static
from apc.sparse.policies.neurons import NeuronPredictor, NeuronThreshold
from apc.sparse.policies.peers import Cats, RSparse, Teal, Wina
from apc.sparse.policies.planes import BitPlanes
from apc.sparse.policies.predicted import Predicted, Soft
from apc.sparse.policies.staged import StagedNeuron, StagedOracle, StagedPredicted, StagedProx, StagedStatic
from apc.utils.errors import UserError

_BOUNDS_AND_FIXED = Dense, Exact, Static, Random, Oracle, ThresholdedOracle
_PREDICTED = Predicted, Soft, NeuronPredictor, NeuronThreshold
_STAGED = StagedStatic, StagedOracle, StagedPredicted, StagedNeuron, StagedProx
_PEERS = Cats, Teal, Wina, RSparse, Prox
_ALL = *_BOUNDS_AND_FIXED, *_PREDICTED, *_STAGED, *_PEERS, BitPlanes
POLICIES: dict[str, type[MaskPolicy]] = {policy.name: policy for policy in _ALL}
_RENAMED = {"gate": "cats"}


def _unknown(name: str) -> str:
    """What to choose in place of a name that is not in `POLICIES`."""
    return f"renamed; write {_RENAMED[name]}" if name in _RENAMED else f"unknown; choose {', '.join(POLICIES)}"


def total_bytes(cfg: Config, stored_bits: float = FULL_BITS) -> float:
    """The share of the dense FFN's bytes that a run's `calibrated` policies read, of those that it is stored in.

    stored_bits: of a weight, on average. Raises UserError if `bytes`, which is a share of 16 bits, exceeds them.
    """
    if cfg.bytes is None:
        return cfg.cluster.density
    share = cfg.bytes * FULL_BITS / stored_bits
    if share > 1:
        whole = f"the FFNs are stored at {stored_bits:.3g} bits, {stored_bits / FULL_BITS:.3g} of 16"
        raise UserError(f"bytes={cfg.bytes:g}: {whole}; lower bytes")
    return share


def facts(name: str) -> type[MaskPolicy]:
    """The class of a policy, whose attributes state its facts.

    For a name that is not in `POLICIES`, it is the base class `MaskPolicy` with default attributes.
    """
    return POLICIES.get(name, MaskPolicy)


def make_policy(name: str, codebook: Codebook, predictor: Predictor | None, seed: int = 0) -> MaskPolicy:
    """The policy of this name. Raises UserError if it is unknown, or can't run with this codebook and predictor."""
    if name not in POLICIES:
        raise UserError(f"policy {name}: {_unknown(name)}")
    if problem := POLICIES[name].missing(codebook, predictor):
        raise UserError(f"policy {name}: {problem}")
    return POLICIES[name](codebook, predictor, seed)


def chosen_policies(cfg: Config) -> list[str]:
    """The policies to evaluate: `policies`, or the default ones. Some of these are left out if `bytes` is not given."""
    defaults = (name for name, policy in POLICIES.items() if policy.by_default)
    return cfg.policies or [name for name in defaults if cfg.bytes is not None or not POLICIES[name].calibrated]


def default_policy(codebook: Codebook, predictor: Predictor | None) -> str:
    """The policy of `sparsify` if none is named: that which the predictor was trained for, or `static` without one."""
    usable = [policy for policy in POLICIES.values() if policy.in_sparsify and not policy.missing(codebook, predictor)]
    return max(usable, key=lambda policy: bool(policy.forms)).name


def kernel_policies(device: str) -> list[str]:
    """The policies that can skip neurons on a device of this type, cuda or cpu."""
    return [name for name, policy in POLICIES.items() if policy.has_kernel_on(device) and name != "dense"]


def usable_policies(cfg: Config, codebook: Codebook, predictor: Predictor | None) -> tuple[list[str], dict[str, str]]:
    """The chosen policies that can run, and the reason for each default policy that can't.

    Raises UserError if a policy that was asked for by name can't run.
    """
    names = chosen_policies(cfg)
    reasons = {name: POLICIES[name].missing(codebook, predictor) for name in names}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if cfg.policies and left_out:
        raise UserError("; ".join(f"policy {name}: {reason}" for name, reason in left_out.items()))
    return [name for name in names if name not in left_out], left_out


def tuned_forms(cfg: Config) -> tuple[str, ...]:
    """The forms of predictor that the tuned policy can use; empty if it needs no predictor."""
    return POLICIES[cfg.tune.policy].forms


def calibrated_policies(cfg: Config) -> list[str]:
    """The policies to evaluate that are calibrated on fit text first."""
    return [name for name in chosen_policies(cfg) if POLICIES[name].calibrated]


def trains_predictor(cfg: Config) -> bool:
    """Whether a run trains a predictor: `stage=predict` asks for it, or a tuned or evaluated policy needs one."""
    if cfg.tune.max_epochs and cfg.stage != "predict":
        return bool(tuned_forms(cfg))
    return cfg.stage == "predict" or any(POLICIES[name].forms for name in chosen_policies(cfg))


def check_policies(cfg: Config) -> None:
    """Raises UserError if a policy in `policies` or `tune.policy` is unknown or can't run in this configuration."""
    for name in cfg.policies or ():
        if name not in POLICIES:
            raise UserError(f"policies: {name} is {_unknown(name)}")
        policy = POLICIES[name]
        _check_form(f"policies: {name}", policy.forms, cfg.predictor.form)
        if policy.sites and not set(cfg.sites) <= set(policy.sites):
            raise UserError(f"policies: {name} needs sites=[{','.join(policy.sites)}], this run has sites={cfg.sites}")
        if policy.ranks_by_planes and cfg.model.ffn_bits is None:
            raise UserError(f"policies: {name} ranks neurons by the bit planes of stored weights; set model.ffn_bits")
    for name in calibrated_policies(cfg) if cfg.model.ffn_bits is None else ():
        POLICIES[name].check_bytes(total_bytes(cfg))
    tunable = [name for name, policy in POLICIES.items() if policy.tunable]
    if cfg.tune.policy not in tunable:
        raise UserError(f"tune.policy={cfg.tune.policy}: choose {', '.join(tunable)}")
    if not cfg.tune.max_epochs:
        return
    if cfg.tune.lora and not POLICIES[cfg.tune.policy].staged:
        staged = ", ".join(name for name in tunable if POLICIES[name].staged)
        raise UserError(f"tune.lora={cfg.tune.lora} needs a staged tune.policy: {staged}")
    forms = tuned_forms(cfg)
    _check_form(f"tune.policy={cfg.tune.policy}", forms, cfg.predictor.form)
    need_predictor = [name for name in cfg.policies or () if POLICIES[name].forms]
    if need_predictor and not forms:
        problem = f"need a predictor, but tune.policy={cfg.tune.policy} trains none"
        raise UserError(f"policies: {', '.join(need_predictor)} {problem}; leave them out or tune another policy")


def check_used(cfg: Config) -> None:
    """Raises UserError if `bytes` or `stages` are set and no policy of the run heeds them."""
    names = [*(chosen_policies(cfg)), *([cfg.tune.policy] if cfg.tune.max_epochs else [])]
    policies = [POLICIES[name] for name in names]
    if cfg.stages != StagesConfig() and not any(policy.staged for policy in policies):
        staged = ", ".join(name for name, policy in POLICIES.items() if policy.staged)
        raise UserError(
            f"stages: no policy of this run has stages; add one to policies ({staged}), or leave stages out"
        )
    if cfg.bytes is not None and not any(policy.calibrated for policy in policies):
        raise UserError(
            f"bytes={cfg.bytes:g}: no policy of this run keeps to a share of bytes; add a staged policy or a peer to "
            "policies, or leave bytes out (cluster.density sets the size of flat masks)"
        )


def _check_form(asking: str, forms: tuple[str, ...], form: str) -> None:
    if forms and form not in forms:
        raise UserError(f"{asking} needs predictor.form={' or '.join(forms)}, this run has predictor.form={form}")
