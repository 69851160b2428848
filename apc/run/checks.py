"""Whether a configuration suits the model, checked before any training."""

from apc.config.schema import Config
from apc.config.values import as_word
from apc.data.ffn import FFN, has_experts
from apc.data.quantise import mean_bits
from apc.predict.low_bit import check_projections
from apc.sparse.policies import POLICIES, calibrated_policies, total_bytes, trains_predictor
from apc.utils.errors import UserError


def check_model(cfg: Config, ffns: list[FFN]) -> None:
    """Raises UserError for a setting that the FFNs do not support: a gate that they lack, experts, too few bytes."""
    if trains_predictor(cfg) and cfg.predictor.form == "low-bit":
        check_projections(ffns, cfg.predictor.low_bit_projections)
    for name in cfg.policies or ():
        if problem := POLICIES[name].unsupported_ffns(ffns[0].gated, has_experts(ffns)):
            raise UserError(f"policies: {name} {problem}; leave it out")
    for name in calibrated_policies(cfg):
        POLICIES[name].check_ffns(ffns, total_bytes(cfg, mean_bits(ffns)))
    if has_experts(ffns):
        _check_for_experts(cfg)


def _check_for_experts(cfg: Config) -> None:
    needed = {
        "sites": (cfg.sites, ["neuron"]),
        "cluster.algorithm": (cfg.cluster.algorithm, "lloyd"),
        "collect.ffn_inputs": (cfg.collect.ffn_inputs, "stored"),
        "predictor.lookahead": (cfg.predictor.lookahead, 0),
        "tune.max_epochs": (cfg.tune.max_epochs, 0),
    }
    for key, (value, only) in needed.items():
        if value != only:
            raise UserError(f"{key}={as_word(value)}: the model is a mixture of experts; set {key}={as_word(only)}")
