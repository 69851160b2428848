"""What clustering, the predictor's training and tuning are asked for, apart from the LightningModules that read it: to read a configuration or a finished run
needs no Lightning, which takes seconds to import."""

from dataclasses import dataclass, field

from apc.errors import UserError
from apc.low_bit import READS, SPACING
from apc.patterns import WEIGHTINGS

ALGORITHMS = ("lloyd", "apc-paper", "brb-kmeans", "k-majority")  # their classes: `training.ALGORITHMS`
FORMS = ("cluster", "neuron", "low-bit")
TUNED_ARMS = ("predicted", "oracle", "neuron-predictor")


@dataclass(frozen=True)
class ClusterConfig:
    k: int = 256  # clusters in a codebook
    density: float = 0.5  # share of ones in every centroid (brb-kmeans, k-majority: in static, random and soft masks alone)
    weighting: str = "energy"  # binary (the paper), magnitude or energy
    scope: str = "layer"  # a codebook for each layer, or `pooled`: one for all (the paper)
    algorithm: str = "lloyd"  # or, for binary patterns: apc-paper (clusters of a fixed size), brb-kmeans, k-majority (Hamming, centroids of any density)
    penalty: int = 1  # k-majority: how many times worse a one that the centroid lacks is than a one too many; 1: the Hamming distance
    schedule: str = "epoch"  # centroids change after a full pass (epoch) or after every step from running sums (step)
    init: str = "random"  # random, or k-means++ over a sample
    init_sample: int = 4096  # rows of a group that k-means++ looks at
    max_epochs: int = 20  # full passes at most
    tolerance: float = 1e-4  # stop when the captured share gains less than this, relative, in a pass

    def __post_init__(self):
        choices = dict(weighting=tuple(WEIGHTINGS), scope=("layer", "pooled"), algorithm=ALGORITHMS, schedule=("epoch", "step"))
        for key, known in {**choices, "init": ("random", "k-means++")}.items():
            if getattr(self, key) not in known:
                raise UserError(f"cluster.{key}={getattr(self, key)}: choose {' or '.join(known)}")
        for key in ("k", "penalty", "max_epochs", "init_sample"):
            if getattr(self, key) < 1:
                raise UserError(f"cluster.{key} must be at least 1, got {getattr(self, key)}")
        if not 0 < self.density < 1:
            raise UserError(f"cluster.density must lie between 0 and 1, got {self.density}")
        if self.tolerance < 0:
            raise UserError(f"cluster.tolerance must not be negative, got {self.tolerance}")
        if self.algorithm != "lloyd" and self.weighting != "binary":
            raise UserError(f"cluster.algorithm={self.algorithm} clusters binary patterns; set cluster.weighting=binary in place of {self.weighting}")
        if self.algorithm != "k-majority" and self.penalty > 1:
            raise UserError(f"cluster.penalty={self.penalty} belongs to cluster.algorithm=k-majority; leave it out with {self.algorithm}")


@dataclass(frozen=True)
class PredictorConfig:
    form: str = "cluster"  # cluster: logits over the K clusters; neuron: a score for each neuron (Deja Vu's form); low-bit: the same from a copy of weights
    hidden: int = 256  # width of the bottleneck; the low-bit form has one for what tuning adds to the FFN's output only
    bits: int = 1  # low-bit form: of a weight in the copy, 1 to 4
    reads: list[str] = field(default_factory=lambda: ["gate", "up"])  # low-bit form: the projections that are copied, [gate], [up] or [gate,up]
    lookahead: int = 0  # predict from the FFN input of this many layers earlier; the first layers use the first one
    loss: str = "ce"  # ce (neuron form: binary cross-entropy on active), listwise (importance), mix (their sum)
    lr: float = 2e-3  # peak of a one-cycle schedule
    batch: int = 1024  # tokens in a step, over all ranks, all layers at once
    max_epochs: int = 10
    weight_decay: float = 0.01

    def __post_init__(self):
        for key, known in dict(form=FORMS, loss=("ce", "listwise", "mix")).items():
            if getattr(self, key) not in known:
                raise UserError(f"predictor.{key}={getattr(self, key)}: choose {', '.join(known)}")
        for key, least in dict(hidden=1, lookahead=0, batch=1, max_epochs=1).items():
            if getattr(self, key) < least:
                raise UserError(f"predictor.{key} must be at least {least}, got {getattr(self, key)}")
        if self.bits not in SPACING:
            raise UserError(f"predictor.bits must be from {min(SPACING)} to {max(SPACING)}, got {self.bits}")
        if not self.reads or [name for name in READS if name in self.reads] != list(self.reads):
            raise UserError(f"predictor.reads={list(self.reads)}: choose [gate], [up] or [gate,up]")
        if self.lr <= 0 or self.weight_decay < 0:
            raise UserError(f"predictor.lr must be above 0 and predictor.weight_decay not negative, got {self.lr} and {self.weight_decay}")


@dataclass(frozen=True)
class TuneConfig:
    max_epochs: int = 0  # passes over the fit text, in whole steps; 0: no tuning
    arm: str = "predicted"  # whose masks are tuned: predicted, oracle or neuron-predictor
    windows: int = 4  # windows in a step, over all ranks
    budget: bool = True  # layers keep more or fewer neurons, by what their loss costs, at the same total
    budget_windows: int = 16  # windows that this cost is measured on
    correction: bool = True  # the predictor's bottleneck is also mapped to what the FFN's output lacks
    offsets: bool = True  # a vector for each cluster is added to the FFN's output
    lr: float = 1e-3  # peak of a one-cycle schedule, of the predictor
    lr_scores: float = 2e-2  # the same, of the neurons' scores in a cluster (logarithms)
    lr_offsets: float = 2e-3  # the same, of the offsets
    temperature: float = 0.5  # of the sigmoid in a mask's gradient
    precision: str | None = None  # of the training, as Lightning names it; null: bf16-mixed on a GPU, 32-true on a CPU

    def __post_init__(self):
        if self.arm not in TUNED_ARMS:
            raise UserError(f"tune.arm={self.arm}: choose {', '.join(TUNED_ARMS)}")
        for key, least in dict(max_epochs=0, windows=1, budget_windows=1).items():
            if getattr(self, key) < least:
                raise UserError(f"tune.{key} must be at least {least}, got {getattr(self, key)}")
        for key in ("lr", "lr_scores", "lr_offsets", "temperature"):
            if getattr(self, key) <= 0:
                raise UserError(f"tune.{key} must be above 0, got {getattr(self, key)}")
        if self.precision not in (None, "32-true", "bf16-mixed"):
            raise UserError(f"tune.precision={self.precision}: choose 32-true or bf16-mixed, or null")

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of predictor that the arm can use; none: it needs no predictor."""
        return {"predicted": ("cluster",), "neuron-predictor": ("neuron", "low-bit")}.get(self.arm, ())
