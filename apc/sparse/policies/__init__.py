"""The mask policies by name. A new one is a class in a file of its own and a line in `POLICIES`."""

from apc.cluster.codebook import Codebook
from apc.config.schema import Config
from apc.predict.predictor import Predictor
from apc.sparse.policies.base import MaskDecision, MaskInputs, MaskPolicy, PolicyCost
from apc.sparse.policies.bounds import Dense, Exact, Oracle, ThresholdedOracle
from apc.sparse.policies.fixed import Random, Static
from apc.sparse.policies.neurons import Gate, NeuronPredictor, NeuronThreshold
from apc.sparse.policies.predicted import Predicted, Soft
from apc.utils.errors import UserError

POLICIES: dict[str, type[MaskPolicy]] = {
    policy.name: policy
    for policy in (
        Dense,
        Exact,
        Static,
        Random,
        Oracle,
        ThresholdedOracle,
        Predicted,
        Soft,
        Gate,
        NeuronPredictor,
        NeuronThreshold,
    )
}

__all__ = [
    "POLICIES",
    "MaskDecision",
    "MaskInputs",
    "MaskPolicy",
    "PolicyCost",
    "check_policies",
    "choose_policies",
    "default_policies",
    "facts",
    "make_policy",
    "trains_predictor",
    "tuned_forms",
]


def facts(name: str) -> type[MaskPolicy]:
    """The class of a policy; `MaskPolicy` itself, with neutral facts, for a name that is not registered here."""
    return POLICIES.get(name, MaskPolicy)


def make_policy(name: str, codebook: Codebook, predictor: Predictor | None, seed: int = 0) -> MaskPolicy:
    """Raises UserError for an unknown policy, or one whose inputs are missing."""
    if name not in POLICIES:
        raise UserError(f"policy {name}: unknown; choose {', '.join(POLICIES)}")
    problem = POLICIES[name].missing(codebook, predictor)
    if problem:
        raise UserError(f"policy {name}: {problem}")
    return POLICIES[name](codebook, predictor, seed)


def default_policies() -> list[str]:
    """Those that are evaluated where `policies` is not given."""
    return [name for name, policy in POLICIES.items() if policy.by_default]


def choose_policies(
    asked: list[str] | None, codebook: Codebook, predictor: Predictor | None
) -> tuple[list[str], dict[str, str]]:
    """The policies to run, and why each default that can't run is left out. Raises UserError for one asked for by name."""
    names = asked or default_policies()
    reasons = {name: POLICIES[name].missing(codebook, predictor) for name in names}
    left_out = {name: reason for name, reason in reasons.items() if reason}
    if asked and left_out:
        raise UserError("; ".join(f"policy {name}: {reason}" for name, reason in left_out.items()))
    return [name for name in names if name not in left_out], left_out


def tuned_forms(cfg: Config) -> tuple[str, ...]:
    """The forms of predictor that the tuned policy can use; none: it needs no predictor."""
    return POLICIES[cfg.tune.policy].forms


def trains_predictor(cfg: Config) -> bool:
    """Whether a run trains a predictor: where `stage=predict` asks, or a policy that it tunes or evaluates needs one."""
    if cfg.tune.max_epochs and cfg.stage != "predict":
        return bool(tuned_forms(cfg))
    return cfg.stage == "predict" or any(POLICIES[name].forms for name in cfg.policies or default_policies())


def check_policies(cfg: Config) -> None:
    """Raises UserError where `policies` or `tune.policy` names one that is unknown, or can't run in this configuration."""
    for name in cfg.policies or ():
        if name not in POLICIES:
            raise UserError(f"policies: {name} is unknown; choose from {', '.join(POLICIES)}")
        policy = POLICIES[name]
        if policy.forms and cfg.predictor.form not in policy.forms:
            raise UserError(
                f"policies: {name} needs predictor.form={' or '.join(policy.forms)}, "
                f"this run has predictor.form={cfg.predictor.form}"
            )
        if policy.sites and not set(cfg.sites) <= set(policy.sites):
            raise UserError(f"policies: {name} needs sites=[{','.join(policy.sites)}], this run has sites={cfg.sites}")
    tunable = [name for name, policy in POLICIES.items() if policy.tunable]
    if cfg.tune.policy not in tunable:
        raise UserError(f"tune.policy={cfg.tune.policy}: choose {', '.join(tunable)}")
    if not cfg.tune.max_epochs:
        return
    forms = tuned_forms(cfg)
    if forms and cfg.predictor.form not in forms:
        raise UserError(
            f"tune.policy={cfg.tune.policy} needs predictor.form={' or '.join(forms)}, "
            f"this run has predictor.form={cfg.predictor.form}"
        )
    wanting = [name for name in cfg.policies or () if POLICIES[name].forms]
    if wanting and not forms:
        raise UserError(
            f"policies: {', '.join(wanting)}: no predictor is left where tune.policy={cfg.tune.policy}; "
            "choose other policies or tune another"
        )
