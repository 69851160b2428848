"""Measures policies on scored text: what their masks capture, what they cost, and their perplexity."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apc.cluster.codebook import Codebook
from apc.data.ffn import GatedFFN, find_ffns
from apc.evaluate.metrics import (
    MaskMeter,
    layer_figures,
    mask_figures,
    perplexity,
    perplexity_ratio,
    site_densities,
    window_losses,
)
from apc.predict.predictor import Predictor
from apc.sparse.masked_forward import ForwardReader, MaskedForward
from apc.sparse.policies import MaskInputs, MaskPolicy, make_policy
from apc.sparse.sparsify import check_fits
from apc.utils import distributed
from apc.utils.errors import UserError
from apc.utils.progress import Bar
from apc.utils.progress import progress as progress_bar


class DenseMeters(ForwardReader):
    """Measures the masks of all policies on the activations of one dense forward pass, which stays dense."""

    def __init__(self, ffns: list[GatedFFN], codebook: Codebook, policies: list[MaskPolicy], meters: list[MaskMeter]):
        lookahead = max((policy.lookahead for policy in policies), default=0)
        super().__init__(ffns, codebook, lookahead, any(policy.reads_gate for policy in policies))
        self.policies, self.meters = policies, meters

    def see(self, tokens: MaskInputs) -> None:
        """Measures each policy's masks."""
        for policy, meter in zip(self.policies, self.meters, strict=True):
            meter.add(tokens, policy.decide(tokens).mask)


@dataclass
class Evaluator:
    """Scores policies on windows; each rank scores its share of them.

    windows: int64 [n, seq_len], each scored alone; batch_windows: windows in one forward pass; seed: of random masks.
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
        self.codebook = self.codebook.to(self.device)
        self.predictor = self.predictor.to(self.device) if self.predictor is not None else None

    def policies(
        self, names: list[str], progress: bool = True, on_record: Callable[[dict], None] = lambda record: None
    ) -> list[dict]:
        """One record per policy (docs/files.md), each measured beside the dense model.

        progress: whether to show a bar; on_record: called with each record as soon as it is complete.
        """
        policies = {
            name: make_policy(name, self.codebook, self.predictor, self.seed) for name in names if name != "dense"
        }
        with progress_bar((1 + len(policies)) * len(self._share()), "evaluate", enabled=progress) as bar:
            bar.update(0, "dense")
            records, dense_losses = self._dense(policies, "dense" in names, bar)
            if "dense" in names:
                on_record(records["dense"])
            for name, policy in policies.items():
                bar.update(0, name)
                self._masked(records[name], policy, dense_losses, bar)
                on_record(records[name])
        return [records[name] for name in names]

    def _share(self) -> Tensor:
        """This rank's windows."""
        first, last = distributed.share(len(self.windows))
        return self.windows[first:last]

    @torch.inference_mode()
    def _losses(self, reader: ForwardReader, meters: list[MaskMeter], bar: Bar) -> Tensor:
        """The loss of each window of all ranks, float64 [n], with the reader's hooks in the model."""
        losses = torch.zeros(len(self.windows), dtype=torch.float64, device=self.device)
        begin = distributed.share(len(self.windows))[0]
        hooks = reader.hook()
        try:
            for start in range(0, len(self._share()), self.batch_windows):
                batch = self._share()[start : start + self.batch_windows].to(self.device)
                first = torch.zeros(batch.shape, dtype=torch.bool, device=self.device)
                first[:, 0] = True
                for meter in meters:
                    meter.first = first.flatten()
                losses[begin + start : begin + start + len(batch)] = window_losses(self.model, batch)
                bar.update(len(batch))
        finally:
            hooks.remove()
        return distributed.all_sum(losses).cpu()

    def _dense(self, policies: dict[str, MaskPolicy], with_dense: bool, bar: Bar) -> tuple[dict[str, dict], Tensor]:
        """The dense pass: a record for each policy, with the figures of its masks there, and the dense losses."""
        measured = ({"dense": make_policy("dense", self.codebook, None)} if with_dense else {}) | policies
        meters = [MaskMeter(self.codebook, self.device) for _ in measured]
        losses = self._losses(DenseMeters(self.ffns, self.codebook, list(measured.values()), meters), meters, bar)
        problem = not_finite(losses)
        if problem:
            raise UserError(f"the dense model: {problem}; try model.dtype=float32 or bfloat16, or check the weights")
        records: dict[str, dict] = {}
        for (name, policy), meter in zip(measured.items(), meters, strict=True):
            totals = meter.totals().cpu()
            records[name] = {"policy": name, "missing": None, "excludes_finding": policy.is_bound, "masked": None}
            records[name] |= mask_figures(totals) | {"per_layer": layer_figures(totals)}
        if with_dense:
            self._complete(records["dense"], measured["dense"], losses, losses, {})
        return records, losses

    def _masked(self, record: dict, policy: MaskPolicy, dense_losses: Tensor, bar: Bar) -> None:
        """The pass under the policy's own masks: the record gets its perplexity and the figures of its masks there."""
        meter = MaskMeter(self.codebook, self.device)
        losses = self._losses(MaskedForward(self.ffns, policy, meter), [meter], bar)
        totals = meter.totals().cpu()
        record["masked"] = mask_figures(totals)
        record["missing"] = not_finite(losses)
        if not record["missing"]:
            self._complete(record, policy, losses, dense_losses, site_densities(totals, list(self.codebook.sites)))

    def _complete(
        self, record: dict, policy: MaskPolicy, losses: Tensor, dense_losses: Tensor, densities: dict[str, list[float]]
    ) -> None:
        """Adds perplexity, its ratio to dense and the cost to a record."""
        record["perplexity"] = perplexity(losses)
        record["ratio"], record["ratio_low"], record["ratio_high"] = perplexity_ratio(losses, dense_losses)
        record |= vars(policy.cost(densities))


def not_finite(losses: Tensor) -> str | None:
    """Names the first window whose loss is NaN or infinite; None if all are finite. losses: float64 [n]."""
    bad = (~losses.isfinite()).nonzero()
    return f"the loss of score window {int(bad[0])} is not finite" if len(bad) else None
