"""Every configuration key: its type, its default and what it means. The comment above a key is its line in `--help`.

Imports nothing heavy, so that help, `--print-config` and the message for a wrong key come at once. What depends on
code that imports torch is checked where a run begins: `apc.sparse.policies.check_policies` for `policies`.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from apc.utils.errors import UserError

STAGES = ("collect", "cluster", "predict", "tune", "all")
SITES = ("gate", "up", "neuron", "down")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTINGS = {"binary": 0, "magnitude": 1, "energy": 2}  # the power of the importance; 0: one where a neuron is active
ALGORITHMS = ("lloyd", "apc-paper", "brb-kmeans", "k-majority")  # their classes: `apc.cluster.algorithms`
FORMS = ("cluster", "neuron", "low-bit")
PROJECTIONS = ("gate", "up")  # that the low-bit form can copy
BITS = (1, 2, 3, 4)  # of a weight in that copy
WANDB_MODES = ("auto", "online", "offline", "disabled")


def _choose(key: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{key}={value}: choose {', '.join(known[:-1])} or {known[-1]}")


def _at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and value < least:
        raise UserError(f"{key} must be at least {least}, got {value}")


@dataclass(frozen=True)
class RunConfig:
    # The run's folder. A folder of the same configuration is resumed. null: date and time.
    name: str | None = None
    # Where run folders lie.
    dir: str = "runs"


@dataclass(frozen=True)
class ModelConfig:
    # `bundled`, a Hugging Face id, a model folder, or a .gguf file.
    path: str = "bundled"
    # float32, bfloat16 or float16. auto: as stored (a .gguf file: float32).
    dtype: str = "auto"
    # cpu, cuda or cuda:N. auto: a GPU where there is one.
    device: str = "auto"
    # auto: one process spreads the layers over all GPUs, for a model too large for one. null: all on `device`.
    device_map: str | None = None
    # Branch, tag or commit of a Hugging Face id.
    revision: str | None = None
    # Run code that the model's repository brings along.
    trust_remote_code: bool = False

    def __post_init__(self):
        _choose("model.dtype", self.dtype, ("auto", *DTYPES))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"model.device={self.device}: not a device; choose auto, cpu, cuda or cuda:N")
        if self.device_map not in (None, "auto"):
            raise UserError(f"model.device_map={self.device_map}: choose auto or null")
        if self.device_map and Path(self.path).suffix == ".gguf":
            raise UserError(
                "model.device_map=auto: a .gguf file is unpacked on one device; give a model folder: model.path=FOLDER"
            )


@dataclass(frozen=True)
class DataConfig:
    # Text that is fitted on: `bundled`, a file (.txt .raw .tokens .md .parquet .jsonl), a Hugging Face data set
    # `name[:config[:split]]`, or several: a,b.
    fit: str = "bundled"
    # Text that is scored on: one of the same.
    score: str = "bundled"
    # Tokens in a window.
    seq_len: int = 1024
    # How many windows of the fit text to use, from its start. null: all.
    fit_windows: int | None = None
    # How many windows of the score text to use. null: all.
    score_windows: int | None = None
    # Allow scoring on text that was fitted on. Every table then says so.
    in_sample: bool = False

    def __post_init__(self):
        for role in ("fit", "score"):
            if not all(part.strip() for part in getattr(self, role).split(",")):
                raise UserError(f"data.{role} is empty: give `bundled`, a local file, or a hub id")
            windows = getattr(self, f"{role}_windows")
            if windows is not None and windows < 1:
                raise UserError(f"data.{role}_windows must be at least 1, or null for all, got {windows}")
        _at_least("data.seq_len", self.seq_len, 2)


@dataclass(frozen=True)
class CollectConfig:
    # disk (later runs find the patterns again), memory (of the host) or device (GPU memory).
    storage: str = "disk"
    # Folder for patterns on disk. null: the user's cache.
    dir: str | None = None
    # Also keep each neuron's importance (uint8), which weighted clustering and listwise losses need.
    importance: bool = True
    # The forward pass that patterns are read from: dense, or thresholded (inactive values are zero; the paper).
    forward: str = "dense"
    # The predictor's inputs: stored (bfloat16, beside the patterns) or streamed (the model runs again each epoch).
    ffn_inputs: str = "stored"
    # Windows, spread over the fit text, that the activity thresholds are calibrated on.
    calibration_windows: int = 8
    # Tokens that one step of clustering or of the predictor's training reads, over all processes: raise it with them.
    batch_tokens: int = 16384

    def __post_init__(self):
        _choose("collect.storage", self.storage, ("disk", "memory", "device"))
        _choose("collect.ffn_inputs", self.ffn_inputs, ("stored", "streamed"))
        _choose("collect.forward", self.forward, ("dense", "thresholded"))
        if self.forward == "thresholded" and self.ffn_inputs == "streamed":
            raise UserError(
                "collect.ffn_inputs=streamed runs the dense forward pass again, not the thresholded one; "
                "set collect.ffn_inputs=stored"
            )
        for key in ("calibration_windows", "batch_tokens"):
            _at_least(f"collect.{key}", getattr(self, key), 1)


@dataclass(frozen=True)
class ClusterConfig:
    # Clusters in a codebook.
    k: int = 256
    # Share of ones in every centroid (brb-kmeans, k-majority: in static, random and soft masks only).
    density: float = 0.5
    # How patterns are weighted: binary (the paper), magnitude or energy.
    weighting: str = "energy"
    # layer: a codebook for each layer. pooled: one for all (the paper).
    scope: str = "layer"
    # lloyd, or for binary patterns: apc-paper (clusters of equal size), brb-kmeans, k-majority (Hamming distance).
    algorithm: str = "lloyd"
    # k-majority: how much more a one that the centroid lacks counts than a one too many. 1: the Hamming distance.
    penalty: int = 1
    # Centroids change after each full pass (epoch), or after each step from running sums (step).
    schedule: str = "epoch"
    # First centroids: random, or k-means++ over a sample.
    init: str = "random"
    # Full passes at most.
    max_epochs: int = 20
    # Stop when the captured share rises by less than this in a pass, relative.
    tolerance: float = 1e-4

    def __post_init__(self):
        _choose("cluster.weighting", self.weighting, tuple(WEIGHTINGS))
        _choose("cluster.scope", self.scope, ("layer", "pooled"))
        _choose("cluster.algorithm", self.algorithm, ALGORITHMS)
        _choose("cluster.schedule", self.schedule, ("epoch", "step"))
        _choose("cluster.init", self.init, ("random", "k-means++"))
        for key in ("k", "penalty", "max_epochs"):
            _at_least(f"cluster.{key}", getattr(self, key), 1)
        if not 0 < self.density < 1:
            raise UserError(f"cluster.density must lie between 0 and 1, got {self.density}")
        if self.tolerance < 0:
            raise UserError(f"cluster.tolerance must not be negative, got {self.tolerance}")
        if self.algorithm != "lloyd" and self.weighting != "binary":
            raise UserError(
                f"cluster.algorithm={self.algorithm} clusters binary patterns; "
                f"set cluster.weighting=binary in place of {self.weighting}"
            )
        if self.algorithm != "k-majority" and self.penalty > 1:
            raise UserError(
                f"cluster.penalty={self.penalty} belongs to cluster.algorithm=k-majority; "
                f"leave it out with {self.algorithm}"
            )


@dataclass(frozen=True)
class PredictorConfig:
    # cluster (logits over the clusters), neuron (a score for each neuron) or low-bit (scores from a copy of the weights).
    form: str = "cluster"
    # Width of the bottleneck. In the low-bit form only the correction, which tuning trains, has one.
    bottleneck: int = 256
    # low-bit form: bits of a weight in the copy, 1 to 4.
    bits: int = 1
    # low-bit form: the projections that are copied, [gate], [up] or [gate,up].
    low_bit_projections: list[str] = field(default_factory=lambda: ["gate", "up"])
    # Predict from the FFN input of this many layers earlier. The first layers use the first one.
    lookahead: int = 0
    # ce (cross-entropy; neuron form: binary, on active), listwise (importance) or mix (their sum).
    loss: str = "ce"
    # Peak learning rate of a one-cycle schedule.
    lr: float = 2e-3
    # Tokens in a step, over all processes; all layers at once.
    batch_tokens: int = 1024
    # Passes over the fit text.
    max_epochs: int = 10

    def __post_init__(self):
        _choose("predictor.form", self.form, FORMS)
        _choose("predictor.loss", self.loss, ("ce", "listwise", "mix"))
        for key, least in dict(bottleneck=1, lookahead=0, batch_tokens=1, max_epochs=1).items():
            _at_least(f"predictor.{key}", getattr(self, key), least)
        if self.bits not in BITS:
            raise UserError(f"predictor.bits must be from {min(BITS)} to {max(BITS)}, got {self.bits}")
        chosen = list(self.low_bit_projections)
        if not chosen or [name for name in PROJECTIONS if name in chosen] != chosen:
            raise UserError(f"predictor.low_bit_projections={chosen}: choose [gate], [up] or [gate,up]")
        if self.lr <= 0:
            raise UserError(f"predictor.lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class TuneConfig:
    # Passes over the fit text. 0: no tuning.
    max_epochs: int = 0
    # Whose masks are tuned: predicted, oracle or neuron-predictor.
    policy: str = "predicted"
    # Windows in a step, over all processes.
    batch_windows: int = 4
    # Layers keep more or fewer neurons, by what dropping them costs; the total stays.
    budget: bool = True
    # Also map the predictor's bottleneck to what the FFN's output lacks.
    correction: bool = True
    # Also add a vector for each cluster to the FFN's output.
    offsets: bool = True
    # Peak learning rate of the predictor, in a one-cycle schedule. Masks learn 20 times and offsets twice as fast.
    lr: float = 1e-3
    # Precision, as Lightning names it: 32-true or bf16-mixed. null: bf16-mixed on a GPU, 32-true on a CPU.
    precision: str | None = None

    def __post_init__(self):
        for key, least in dict(max_epochs=0, batch_windows=1).items():
            _at_least(f"tune.{key}", getattr(self, key), least)
        if self.lr <= 0:
            raise UserError(f"tune.lr must be above 0, got {self.lr}")
        if self.precision is not None:
            _choose("tune.precision", self.precision, ("32-true", "bf16-mixed"))


@dataclass(frozen=True)
class MonitorConfig:
    # Held-out windows, from the end of the fit text, that trainings are measured on. 0: none.
    windows: int = 1
    # Passes between these measurements.
    every: int = 5

    def __post_init__(self):
        _at_least("monitor.windows", self.windows, 0)
        _at_least("monitor.every", self.every, 1)


@dataclass(frozen=True)
class TrainerConfig:
    # Processes on a machine, one for each GPU (or CPU process). More than one are started here, unless torchrun did.
    devices: int = 1
    # Machines. More than one needs torchrun on each.
    num_nodes: int = 1
    # Precision of the predictor's training, as Lightning names it: 32-true or bf16-mixed.
    precision: str = "32-true"
    # Windows in one forward pass. null: 1 on a CPU, 8 on a GPU.
    batch_windows: int | None = None
    # Steps of the predictor between logged losses.
    log_every_n_steps: int = 20
    # Steps between checkpoints within an epoch; fewer are written where they would take a tenth of the time.
    checkpoint_every_n_steps: int = 100
    # Keep the checkpoint of a training whose result is saved.
    keep_checkpoints: bool = False
    # Stop each training after so many steps. -1: no limit.
    max_steps: int = -1
    # Show progress bars.
    progress: bool = True

    def __post_init__(self):
        _choose("trainer.precision", self.precision, ("32-true", "bf16-mixed"))
        for key in ("devices", "num_nodes", "batch_windows", "log_every_n_steps", "checkpoint_every_n_steps"):
            _at_least(f"trainer.{key}", getattr(self, key), 1)
        _at_least("trainer.max_steps", self.max_steps, -1)
        if self.max_steps == 0:
            raise UserError("trainer.max_steps=0 trains nothing; give -1 for no limit")


@dataclass(frozen=True)
class TrackingConfig:
    # online, offline or disabled. auto: online where logged in, else offline.
    wandb: str = "auto"
    # W&B project.
    project: str = "apc"
    # W&B group of runs.
    group: str | None = None
    # W&B tags.
    tags: list[str] = field(default_factory=list)
    # W&B notes.
    notes: str | None = None

    def __post_init__(self) -> None:
        _choose("tracking.wandb", self.wandb, WANDB_MODES)


@dataclass(frozen=True)
class Config:
    # Stop after this stage: collect, cluster, predict or tune. all: everything, up to the table.
    stage: str = "all"
    # A run folder. train.py starts from its codebook as clustering left it; evaluate.py evaluates it.
    checkpoint: str | None = None
    # Decides every random number.
    seed: int = 0
    # Where masks apply: [neuron], or some of [gate,up,down].
    sites: list[str] = field(default_factory=lambda: ["neuron"])
    # Target share of inactive neurons.
    sparsity: float = 0.5
    # Which neurons are active: those whose importance reaches the layer's threshold, or each token's own `top` share.
    active: str = "threshold"
    # Mask policies to evaluate. null: dense, exact, static, random, oracle, predicted, soft.
    policies: list[str] | None = None
    # Also decode with each policy that knows its mask before the FFN runs: tokens per second, perplexity, texts.
    speed: bool = False
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    collect: CollectConfig = field(default_factory=CollectConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self):
        _check_sites(self.sites)
        _choose("stage", self.stage, STAGES)
        _choose("active", self.active, ("threshold", "top"))
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity must lie between 0 and 1, got {self.sparsity}")
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")
        if self.policies is not None and not self.policies:
            raise UserError("policies=[]: names none; leave it out for the defaults, or choose some")
        for key, needs_neuron in (("speed=true", self.speed), ("predictor.form=low-bit", self._low_bit)):
            if needs_neuron and self.sites != ["neuron"]:
                raise UserError(f"{key} needs sites=[neuron], this run has sites={self.sites}")
        for key, wanted in (("speed", self.speed), ("tune.max_epochs", self.tune.max_epochs)):
            if wanted and self.model.device_map:
                raise UserError(
                    f"model.device_map={self.model.device_map}: {key}={wanted} needs the model on one device; "
                    "leave one of the two out"
                )
        self._check_tuning()
        if self.cluster.weighting != "binary" and not self.collect.importance:
            raise UserError(
                f"cluster.weighting={self.cluster.weighting} needs importances; "
                "set collect.importance=true or cluster.weighting=binary"
            )
        if self.predictor.loss != "ce" and not self.collect.importance:
            raise UserError(
                f"predictor.loss={self.predictor.loss} needs importances; "
                "set collect.importance=true or predictor.loss=ce"
            )
        if self.data.fit_windows is not None and self.monitor.windows >= self.data.fit_windows:
            raise UserError(
                f"monitor.windows={self.monitor.windows} leaves nothing to fit of "
                f"data.fit_windows={self.data.fit_windows}; lower it"
            )

    @property
    def _low_bit(self) -> bool:
        return self.predictor.form == "low-bit"

    def _check_tuning(self) -> None:
        epochs = self.tune.max_epochs
        if not epochs:
            if self.stage == "tune":
                raise UserError("stage=tune: tune.max_epochs=0 tunes nothing; set tune.max_epochs")
            return
        if self.sites != ["neuron"] or self.cluster.scope != "layer":
            raise UserError(
                f"tune.max_epochs={epochs}: tuning needs sites=[neuron] and cluster.scope=layer, or set tune.max_epochs=0"
            )
        if self.cluster.algorithm != "lloyd":
            raise UserError(
                f"tune.max_epochs={epochs}: tuning needs cluster.algorithm=lloyd in place of {self.cluster.algorithm}"
            )
        processes = self.trainer.devices * self.trainer.num_nodes
        if self.tune.batch_windows < processes:
            raise UserError(
                f"tune.batch_windows={self.tune.batch_windows} is less than a window for each of {processes} processes; "
                "raise it"
            )


def _check_sites(sites: list[str]) -> None:
    """Raises UserError unless `sites` names known sites, each once, and `neuron` alone."""
    if not sites or len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
        raise UserError(f"sites={sites}: choose [neuron], or some of [gate, up, down], each once")
    if "neuron" in sites and len(sites) > 1:
        raise UserError(
            f"sites={sites}: `neuron` is one mask for all three projections and stands alone; "
            "choose [neuron] or [gate,up,down]"
        )
