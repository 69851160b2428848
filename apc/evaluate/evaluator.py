"""Measures policies on scored text: what their masks capture, what they cost, and their perplexity."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import FFN, find_ffns
from apc.data.quantise import mean_bits
from apc.evaluate.metrics import (
    MaskMeter,
    is_below,
    layer_figures,
    layer_reads,
    mask_figures,
    mean_reads,
    perplexity,
    perplexity_ratio,
    site_densities,
    unigram_loss,
    window_losses,
)
from apc.evaluate.tables import shown_perplexity
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import ForwardReader, MaskedForward
from apc.sparse.policies import MaskInputs, MaskPolicy, facts, make_policy
from apc.sparse.sparsify import check_fits
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.progress import Bar
from apc.utils.progress import progress as progress_bar

_LOOK_AT = "check the BOS token, the dtype, the tokenizer (is it the model's own?), the context length and the weights"


class DenseMeters(ForwardReader):
    """Measures the masks of all policies on the activations of one dense forward pass, which stays dense."""

    def __init__(self, ffns: list[FFN], codebook: Codebook, policies: list[MaskPolicy], meters: list[MaskMeter]):
        lookahead = max((policy.lookahead for policy in policies), default=0)
        super().__init__(ffns, codebook, lookahead, any(policy.sees_gate for policy in policies))
        self.policies, self.meters = policies, meters

    def see(self, tokens: MaskInputs) -> None:
        """Measures each policy's masks."""
        for policy, meter in zip(self.policies, self.meters, strict=True):
            meter.add(tokens, policy.decide(tokens))


@dataclass
class Evaluator:
    """Scores policies on windows; each rank scores its share of them.

    windows: int64 [n, seq_len], each scored alone; batch_windows: windows in one forward pass; seed: decides random
    masks.
    """

    model: nn.Module
    codebook: Codebook
    predictor: Predictor | None
    windows: Tensor
    device: torch.device
    batch_windows: int = 1
    seed: int = 0

    def __post_init__(self):
        self.ffns = find_ffns(self.model)
        check_fits(self.ffns, self.codebook, self.predictor)
        self.stored_bits = mean_bits(self.ffns)
        self.codebook = self.codebook.to(self.device)
        self.predictor = self.predictor.to(self.device) if self.predictor is not None else None
        self.share = range(*distributed.share(len(self.windows)))  # this rank's windows
        self._policy_losses: dict[str, Tensor] = {}  # from the last call of `policies`, float64 [n] each

    def policies(
        self, names: list[str], progress: bool = True, on_record: Callable[[dict], None] = lambda record: None
    ) -> list[dict]:
        """One record per policy (docs/files.md), each measured beside the dense model.

        progress: whether to show a bar; on_record: called with each record as soon as it is complete.
        """
        policies = {name: make_policy(name, self.codebook, self.predictor, self.seed) for name in names}
        masked = [name for name in policies if name != "dense"]
        with progress_bar((1 + len(masked)) * len(self.share), "evaluate", enabled=progress) as bar:
            bar.update(0, "dense")
            records, dense_losses = self._dense(policies, bar)
            if "dense" in records:
                on_record(records["dense"])
            for name in masked:
                bar.update(0, name)
                self._masked(records[name], policies[name], dense_losses, bar)
                on_record(records[name])
        return [records[name] for name in names]

    def warnings(self) -> list[str]:
        """Sentences on losses of the last `policies` that suggest a wrong evaluation; usually empty.

        A dense model should predict the text better than the frequencies of its own tokens do, and a masked model
        should not predict better than the dense one, unless it was tuned.
        """
        dense, unigram, warnings = self._policy_losses["dense"], unigram_loss(self.windows), []
        if dense.mean().item() > unigram:
            shown, frequencies = shown_perplexity(perplexity(dense)), shown_perplexity(math.exp(unigram))
            warnings.append(
                f"the dense model hardly predicts this text: its perplexity is {shown}, that of the text's own token "
                f"frequencies {frequencies}. Ratios to dense mean little; {_LOOK_AT}."
            )
        below = [name for name, losses in self._policy_losses.items() if is_below(losses, dense)]
        is_tuned = bool(self.codebook.provenance.get("tune"))
        for tuned, reason in (
            (False, "Masks only remove neurons, so the evaluation is probably wrong"),
            (True, "Tuning on similar text can do that; if the fit text was not similar, the evaluation is wrong"),
        ):
            if names := [name for name in below if (is_tuned and facts(name).uses_codebook) == tuned]:
                warnings.append(f"{', '.join(names)}: perplexity below the dense model's. {reason}: {_LOOK_AT}.")
        return warnings

    @torch.inference_mode()
    def _losses(self, reader: ForwardReader, meters: list[MaskMeter], bar: Bar) -> Tensor:
        """The loss of each window of all ranks, float64 [n], with the reader's hooks in the model."""
        losses = torch.zeros(len(self.windows), dtype=torch.float64, device=self.device)
        hooks = reader.hook()
        try:
            for start in self.share[:: self.batch_windows]:
                batch = self.windows[start : min(start + self.batch_windows, self.share.stop)].to(self.device)
                first = torch.zeros(batch.shape, dtype=torch.bool, device=self.device)
                first[:, 0] = True
                for meter in meters:
                    meter.first = first.flatten()
                losses[start : start + len(batch)] = window_losses(self.model, batch)
                bar.update(len(batch))
        finally:
            hooks.remove()
        return distributed.all_sum(losses).cpu()

    def _dense(self, policies: dict[str, MaskPolicy], bar: Bar) -> tuple[dict[str, dict], Tensor]:
        """Runs the dense pass. Returns a record per policy with its masks' figures in this pass, and the losses."""
        meters = [MaskMeter(self.codebook, self.device) for _ in policies]
        losses = self._losses(DenseMeters(self.ffns, self.codebook, list(policies.values()), meters), meters, bar)
        problem = not_finite(losses)
        if problem:
            raise UserError(f"the dense model: {problem}; try model.dtype=float32 or bfloat16, or check the weights")
        self._policy_losses = {"dense": losses}
        records = {}
        for (name, policy), meter in zip(policies.items(), meters, strict=True):
            totals = meter.totals().cpu()
            record = {"policy": name, "missing": None, "excludes_finding": policy.is_bound, "masked": None}
            reads = layer_reads(totals, list(self.codebook.sites), self.codebook.projections)
            per_layer = layer_figures(totals) | {"read": reads}
            records[name] = record | mask_figures(totals) | self._reads(totals) | {"per_layer": per_layer}
        if "dense" in policies:
            _complete(records["dense"], policies["dense"], losses, losses, {}, records["dense"])
        return records, losses

    def _masked(self, record: dict, policy: MaskPolicy, dense_losses: Tensor, bar: Bar) -> None:
        """Runs the pass under the policy's own masks. Adds perplexity and the masks' figures in this pass to record."""
        meter = MaskMeter(self.codebook, self.device)
        losses = self._losses(MaskedForward(self.ffns, policy, meter), [meter], bar)
        totals = meter.totals().cpu()
        record["masked"] = mask_figures(totals) | self._reads(totals)
        record["missing"] = not_finite(losses)
        if not record["missing"]:
            self._policy_losses[policy.name] = losses
            densities = site_densities(totals, list(self.codebook.sites), self.codebook.experts)
            _complete(record, policy, losses, dense_losses, densities, record["masked"])

    def _reads(self, totals: Tensor) -> dict[str, dict[str, float]]:
        """The share of each projection's weights that is read, and the bits that are, per weight; totals: a meter's."""
        codebook = self.codebook
        given = totals, list(codebook.sites), codebook.projections, codebook.experts
        return {"read": mean_reads(*given), "bits_read": mean_reads(*given, "bits", self.stored_bits)}


def _complete(record: dict, policy: MaskPolicy, losses: Tensor, dense: Tensor, densities: dict, figures: dict) -> None:
    """Adds perplexity, its ratio to dense and the cost to a record. figures: with `read` and `bits_read`."""
    record["perplexity"] = perplexity(losses)
    record["ratio"], record["ratio_low"], record["ratio_high"] = perplexity_ratio(losses, dense)
    record |= vars(policy.cost(densities, figures["read"], figures["bits_read"]))


def not_finite(losses: Tensor) -> str | None:
    """Names the first window whose loss is NaN or infinite; None if all are finite."""
    bad = (~losses.isfinite()).nonzero()
    return f"the loss of score window {int(bad[0])} is not finite" if len(bad) else None
