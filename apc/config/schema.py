"""Every configuration key: type, default, meaning. The comment above a key is its line in `--help`.

Imports nothing heavy, so that help, `--print-config` and messages about wrong keys are instant. Only the check of
`policies` needs torch; `apc.sparse.policies.check_policies` makes it when a run begins.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from apc.utils.errors import UserError

STAGES = ("collect", "cluster", "predict", "tune", "all")
SITES = ("gate", "up", "neuron", "down")
DTYPES = ("float32", "bfloat16", "float16")
WEIGHTINGS = {"binary": 0, "magnitude": 1, "energy": 2}  # power of the importance; with 0, active neurons count 1
ALGORITHMS = ("lloyd", "apc-paper", "brb-kmeans", "k-majority")  # classes: `apc.cluster.algorithms`
FORMS = ("cluster", "neuron", "low-bit")
PROJECTIONS = ("gate", "up")  # the low-bit form can copy these
BITS = (1, 2, 3, 4)  # per weight of such a copy
STORED_BITS = (2, 3, 4, 6, 8)  # per weight of an FFN that is stored at a few bits
PRECISIONS = ("32-true", "bf16-mixed")  # as Lightning names them


def _choose(config: object, prefix: str, **choices: tuple[str, ...]) -> None:
    """Checks that fields have one of their choices. prefix: the section and a dot."""
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            raise UserError(f"{prefix}{name}={value}: choose {', '.join(known[:-1])} or {known[-1]}")


def _at_least(config: object, prefix: str, **limits: int) -> None:
    for name, least in limits.items():
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"{prefix}{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class RunConfig:
    """The run's name and place."""

    # The run's name and folder. A folder with the same configuration is resumed. null: date and time.
    name: str | None = None
    # The folder that contains the run folders.
    dir: str = "runs"


@dataclass(frozen=True)
class ModelConfig:
    """The model and how it is loaded."""

    # `bundled` (SmolLM2-135M-Instruct), `bundled:gemma3-270m`, a Hugging Face id, a model folder, or a .gguf file.
    path: str = "bundled"
    # float32, bfloat16 or float16. auto: as stored (a .gguf file: float32).
    dtype: str = "auto"
    # cpu, cuda or cuda:N. auto: a GPU where there is one.
    device: str = "auto"
    # auto: one process spreads the layers over all GPUs, for a model too large for one. null: all layers on `device`.
    device_map: str | None = None
    # Branch, tag or commit of a Hugging Face id.
    revision: str | None = None
    # Allow code from the model's repository to run.
    trust_remote_code: bool = False
    # Round the FFN's weights to so many bits each (2, 3, 4, 6 or 8) before anything is measured. null: leave them as
    # they are, and count 16.
    ffn_bits: int | None = None
    # Weights of a neuron's row that share levels, if ffn_bits is given. They add about 16 / ffn_group bits to a weight.
    ffn_group: int = 32
    # Neurons of each FFN that stay at 16 bits, if ffn_bits is given: those with the largest down weights.
    ffn_spared: int = 16

    def __post_init__(self) -> None:
        _choose(self, "model.", dtype=("auto", *DTYPES))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"model.device={self.device}: not a device; choose auto, cpu, cuda or cuda:N")
        if self.device_map not in (None, "auto"):
            raise UserError(f"model.device_map={self.device_map}: choose auto or null")
        if self.ffn_bits is not None and self.ffn_bits not in STORED_BITS:
            known = ", ".join(map(str, STORED_BITS[:-1]))
            raise UserError(f"model.ffn_bits={self.ffn_bits}: choose {known} or {STORED_BITS[-1]}, or null for 16")
        _at_least(self, "model.", ffn_group=1, ffn_spared=0)
        if self.device_map and Path(self.path).suffix == ".gguf":
            raise UserError(
                "model.device_map=auto: a .gguf file is unpacked on one device; give a model folder: model.path=FOLDER"
            )


@dataclass(frozen=True)
class DataConfig:
    """The fit text and the score text."""

    # Fit text: `bundled`, a file (.txt .raw .tokens .md .parquet .jsonl .arrow), a folder that
    # `save_to_disk` wrote, a Hugging Face data set `name[:config[:split]]`, or several of these: a,b.
    fit: str = "bundled"
    # Score text, given in the same way.
    score: str = "bundled"
    # Tokens per window, including the BOS token if there is one.
    seq_len: int = 1024
    # Whether each window begins with the BOS token (never predicted): true, false, or auto (only Gemma models).
    bos: str = "auto"
    # Windows of the fit text, from its start. null: all.
    fit_windows: int | None = None
    # Windows of the score text, from its start. null: all.
    score_windows: int | None = None
    # Allow score text that is also fit text. Every table then says IN-SAMPLE.
    in_sample: bool = False

    def __post_init__(self) -> None:
        for role in ("fit", "score"):
            if not all(part.strip() for part in getattr(self, role).split(",")):
                raise UserError(f"data.{role} is empty: give `bundled`, a local file, or a hub id")
            windows = getattr(self, f"{role}_windows")
            if windows is not None and windows < 1:
                raise UserError(f"data.{role}_windows must be at least 1, or null for all, got {windows}")
        _at_least(self, "data.", seq_len=2)
        object.__setattr__(self, "bos", self.bos.lower())  # W&B's agent writes True and False
        _choose(self, "data.", bos=("auto", "true", "false"))


@dataclass(frozen=True)
class CollectConfig:
    """Collecting activation patterns."""

    # Where patterns are kept: disk (later runs reuse them), memory (the host's) or device (the GPU's).
    storage: str = "disk"
    # Folder for patterns on disk. null: the user's cache folder.
    dir: str | None = None
    # Also keep each neuron's importance (uint8). Weighted clustering and listwise losses need it.
    importance: bool = True
    # Forward pass that patterns are read from: dense, or thresholded (inactive values set to zero, as in the
    # paper).
    forward: str = "dense"
    # Inputs of the predictor: stored (bfloat16, beside the patterns) or streamed (the model runs again each epoch).
    ffn_inputs: str = "stored"
    # Windows for calibrating the activity thresholds, spread over the fit text.
    calibration_windows: int = 8
    # Tokens per block of patterns, i.e. per clustering step, over all processes. Raise it with the number of
    # processes.
    batch_tokens: int = 16384

    def __post_init__(self) -> None:
        _choose(self, "collect.", storage=("disk", "memory", "device"), ffn_inputs=("stored", "streamed"))
        _choose(self, "collect.", forward=("dense", "thresholded"))
        if self.forward == "thresholded" and self.ffn_inputs == "streamed":
            raise UserError(
                "collect.ffn_inputs=streamed runs the dense forward pass again, not the thresholded one; "
                "set collect.ffn_inputs=stored"
            )
        _at_least(self, "collect.", calibration_windows=1, batch_tokens=1)


@dataclass(frozen=True)
class ClusterConfig:
    """Clustering patterns into a codebook."""

    # Clusters in a codebook.
    k: int = 256
    # Share of neurons that every centroid keeps. null or not given: 1 - sparsity. With brb-kmeans and k-majority it
    # applies only to static, random and soft masks.
    density: float = 0.5
    # How patterns are weighted: binary (the paper), magnitude or energy.
    weighting: str = "energy"
    # layer: a codebook per layer. pooled: one for all layers (the paper's).
    scope: str = "layer"
    # lloyd; or, for binary patterns, apc-paper (clusters of equal size), brb-kmeans or k-majority (Hamming distance).
    algorithm: str = "lloyd"
    # k-majority: cost of an active neuron that the centroid lacks; a neuron that only the centroid
    # has costs 1. 1 gives the Hamming distance.
    penalty: int = 1
    # When centroids are updated: after each full pass (epoch), or after each step from running sums (step).
    schedule: str = "epoch"
    # First centroids: random, or k-means++ on a sample.
    init: str = "random"
    # Maximum number of full passes.
    max_epochs: int = 20
    # Stop when a pass raises the captured share by less than this fraction of it.
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        _choose(self, "cluster.", weighting=tuple(WEIGHTINGS), scope=("layer", "pooled"), algorithm=ALGORITHMS)
        _choose(self, "cluster.", schedule=("epoch", "step"), init=("random", "k-means++"))
        _at_least(self, "cluster.", k=1, penalty=1, max_epochs=1)
        if not 0 < self.density < 1:
            raise UserError(f"cluster.density must lie between 0 and 1, got {self.density}")
        if not 0 <= self.tolerance < math.inf:
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
    """The predictor and its training."""

    # cluster (logits over clusters), neuron (a score per neuron) or low-bit (scores from a low-bit copy of weights).
    form: str = "cluster"
    # Width of the bottleneck. In the low-bit form: rank of the correction, which only tuning trains.
    bottleneck: int = 256
    # low-bit form: bits per weight of the copy, 1 to 4.
    bits: int = 1
    # low-bit form: which projections are copied, [gate], [up] or [gate,up].
    low_bit_projections: list[str] = field(default_factory=lambda: ["gate", "up"])
    # low-bit form: share of inputs at which a token reads the copy, those with the largest |input| * column norm; above
    # 0, at most 1. Kernels need 1.
    inputs: float = 1.0
    # Predict from the FFN input of this many layers earlier. The first layers use the first layer's input.
    lookahead: int = 0
    # ce (cross-entropy; the neuron and low-bit forms classify each neuron as active or not), listwise (on
    # importances) or mix (their sum).
    loss: str = "ce"
    # Peak learning rate of a one-cycle schedule.
    lr: float = 2e-3
    # Tokens per step, over all processes. Every step trains all layers.
    batch_tokens: int = 1024
    # Passes over the fit text.
    max_epochs: int = 10

    def __post_init__(self) -> None:
        _choose(self, "predictor.", form=FORMS, loss=("ce", "listwise", "mix"))
        _at_least(self, "predictor.", bottleneck=1, lookahead=0, batch_tokens=1, max_epochs=1)
        if self.bits not in BITS:
            raise UserError(f"predictor.bits must be from {min(BITS)} to {max(BITS)}, got {self.bits}")
        chosen = list(self.low_bit_projections)
        if not chosen or [name for name in PROJECTIONS if name in chosen] != chosen:
            raise UserError(f"predictor.low_bit_projections={chosen}: choose [gate], [up] or [gate,up]")
        if not 0 < self.inputs <= 1:
            raise UserError(f"predictor.inputs must be above 0 and at most 1, got {self.inputs}")
        if self.inputs < 1 and self.form != "low-bit":
            raise UserError(
                f"predictor.inputs={self.inputs}: predictor.form={self.form} reads all inputs; leave it out, or set "
                "predictor.form=low-bit"
            )
        if not 0 < self.lr < math.inf:
            raise UserError(f"predictor.lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class StagesConfig:
    """What staged policies read."""

    # How a stage keeps neurons: threshold (each neuron decides alone; the share is a mean over tokens) or top (each
    # token's top share).
    rule: str = "threshold"
    # Shares of neurons whose rows of gate, up and down are read, such as [0.65,0.5,0.35]. null: chosen for each layer
    # so that the dropped neurons cost least and `bytes` are read in all.
    shares: list[float] | None = None

    def __post_init__(self) -> None:
        _choose(self, "stages.", rule=("threshold", "top"))
        shares = self.shares
        if shares is not None and (len(shares) != 3 or not all(0 < share <= 1 for share in shares)):
            raise UserError(f"stages.shares={shares}: give three shares above 0 and at most 1, of gate, up and down")
        if shares is not None and not shares[0] >= shares[1] >= shares[2]:
            raise UserError(
                f"stages.shares={shares}: a stage reads some of the neurons that the one before read; lower it"
            )


@dataclass(frozen=True)
class TuneConfig:
    """Tuning codebook and predictor through the model."""

    # Passes over the fit text. 0: no tuning.
    max_epochs: int = 0
    # The tuned policy: predicted, oracle, neuron-predictor, staged-predicted, staged-oracle or staged-neuron.
    policy: str = "predicted"
    # Windows per step, over all processes.
    batch_windows: int = 4
    # Give layers different mask sizes with the same total, so that the dropped neurons cost least.
    budget: bool = True
    # Also learn a correction of the FFN's output from the predictor's bottleneck.
    correction: bool = True
    # Also learn a vector per cluster that is added to the FFN's output.
    offsets: bool = True
    # Rank of a LoRA of gate, up and down, which a staged policy adds to the model's weights. 0: weights stay.
    lora: int = 0
    # Peak learning rate of the predictor, in a one-cycle schedule. Masks learn 20 times and offsets twice as fast.
    lr: float = 1e-3
    # Precision, as Lightning names it: 32-true or bf16-mixed. null: bf16-mixed on a GPU, 32-true on a CPU.
    precision: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, "tune.", max_epochs=0, batch_windows=1, lora=0)
        if not 0 < self.lr < math.inf:
            raise UserError(f"tune.lr must be above 0, got {self.lr}")
        if self.precision is not None:
            _choose(self, "tune.", precision=PRECISIONS)


@dataclass(frozen=True)
class MonitorConfig:
    """Measurements on held-out text during trainings."""

    # Windows at the end of the fit text held out to measure progress during training. 0: none.
    windows: int = 1
    # Epochs between two measurements.
    every: int = 5

    def __post_init__(self) -> None:
        _at_least(self, "monitor.", windows=0, every=1)


@dataclass(frozen=True)
class TrainerConfig:
    """Devices, precision, checkpoints and progress of all trainings."""

    # Processes per machine, one per GPU (or CPU process). Started here unless torchrun started them.
    devices: int = 1
    # Machines. Several need torchrun on each.
    num_nodes: int = 1
    # Precision of the predictor's training, as Lightning names it: 32-true or bf16-mixed.
    precision: str = "32-true"
    # Windows per forward pass. null: 1 on a CPU, 8 on a GPU.
    batch_windows: int | None = None
    # Steps between two logged losses of the predictor.
    log_every_n_steps: int = 20
    # Steps between two checkpoints within an epoch. Some are skipped if writing them takes over a tenth of the time.
    checkpoint_every_n_steps: int = 100
    # Keep the checkpoint of a training after its result is saved.
    keep_checkpoints: bool = False
    # Stop each training after this many steps. -1: no limit.
    max_steps: int = -1
    # Show progress bars (on a terminal only).
    progress: bool = True

    def __post_init__(self) -> None:
        _choose(self, "trainer.", precision=PRECISIONS)
        _at_least(self, "trainer.", devices=1, num_nodes=1, batch_windows=1, log_every_n_steps=1)
        _at_least(self, "trainer.", checkpoint_every_n_steps=1, max_steps=-1)
        if self.max_steps == 0:
            raise UserError("trainer.max_steps=0 trains nothing; give -1 for no limit")


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases."""

    # online, offline or disabled. auto: online after `wandb login`, else offline.
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
        _choose(self, "tracking.", wandb=("auto", "online", "offline", "disabled"))


@dataclass(frozen=True)
class Config:
    """Every key of a run."""

    # Stop after this stage: collect, cluster, predict or tune. all: run every stage and print the table.
    stage: str = "all"
    # A run folder. train.py starts from a copy of its untuned codebook; evaluate.py evaluates the run.
    checkpoint: str | None = None
    # Seed of all random numbers.
    seed: int = 0
    # Where masks apply: [neuron], or some of [gate,up,down].
    sites: list[str] = field(default_factory=lambda: ["neuron"])
    # Target share of inactive neurons.
    sparsity: float = 0.5
    # Active neurons: those at or above the layer's importance threshold (threshold), or each token's top share (top).
    active: str = "threshold"
    # Mask policies to evaluate. null: dense, exact, static, oracle, predicted, soft; if `bytes` is given, also
    # staged-prox and teal.
    policies: list[str] | None = None
    # Share of the dense FFN's bytes that staged policies and peers read in all, predictor included. null:
    # cluster.density.
    bytes: float | None = None
    # Also measure decoding: tokens per second, perplexity, continuations. true: with all policies that have a kernel
    # on this device. best: with the one of them that has the lowest perplexity, if any.
    speed: str = "false"
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    collect: CollectConfig = CollectConfig()
    cluster: ClusterConfig = ClusterConfig()
    predictor: PredictorConfig = PredictorConfig()
    stages: StagesConfig = StagesConfig()
    tune: TuneConfig = TuneConfig()
    monitor: MonitorConfig = MonitorConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()

    def __post_init__(self) -> None:
        sites, epochs = self.sites, self.tune.max_epochs
        if not sites or len(set(sites)) < len(sites) or not set(sites) <= set(SITES):
            raise UserError(f"sites={sites}: choose [neuron], or some of [gate, up, down], each once")
        if "neuron" in sites and len(sites) > 1:
            raise UserError(
                f"sites={sites}: `neuron` is one mask for all three projections and stands alone; "
                "choose [neuron] or [gate,up,down]"
            )
        object.__setattr__(self, "speed", self.speed.lower())  # W&B's agent writes True
        _choose(self, "", stage=STAGES, active=("threshold", "top"), speed=("false", "true", "best"))
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity must lie between 0 and 1, got {self.sparsity}")
        if self.bytes is not None and not 0 < self.bytes <= 1:
            raise UserError(f"bytes must be above 0 and at most 1, got {self.bytes}")
        shares = self.stages.shares
        if self.bytes is not None and shares is not None and sum(shares) / 3 > self.bytes:
            raise UserError(
                f"stages.shares={shares} add up to {sum(shares) / 3:.3f} of the FFN, more than bytes={self.bytes}; "
                "lower them or raise bytes"
            )
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")
        if self.seed >= 1 << 32:
            raise UserError(f"seed must be below {1 << 32}, got {self.seed}")
        if self.policies is not None and not self.policies:
            raise UserError("policies=[]: names none; leave it out for the defaults, or choose some")
        low_bit = self.predictor.form == "low-bit"
        for key, needs_neuron in (("speed=true", self.speed == "true"), ("predictor.form=low-bit", low_bit)):
            if needs_neuron and sites != ["neuron"]:
                raise UserError(f"{key} needs sites=[neuron], this run has sites={sites}")
        if self.speed == "true" and self.predictor.inputs < 1 and "staged-neuron" not in (self.policies or ()):
            raise UserError(
                f"speed=true: only staged-neuron reads a copy at predictor.inputs={self.predictor.inputs} of its "
                "inputs; leave out speed=true, or set predictor.inputs=1"
            )
        if self.speed == "true" and self.model.ffn_bits:
            raise UserError(
                f"speed=true: kernels read weights of 16 bits, not of model.ffn_bits={self.model.ffn_bits}; "
                "leave one of the two out"
            )
        for key, wanted in (("speed=true", self.speed == "true"), (f"tune.max_epochs={epochs}", epochs)):
            if wanted and self.model.device_map:
                raise UserError(
                    f"model.device_map={self.model.device_map}: {key} needs the model on one device; "
                    "leave one of the two out"
                )
        if epochs:
            self._check_tuning(epochs)
        elif self.stage == "tune":
            raise UserError("stage=tune: tune.max_epochs=0 tunes nothing; set tune.max_epochs")
        weighting, loss = self.cluster.weighting, self.predictor.loss
        for key, value, plain in (("cluster.weighting", weighting, "binary"), ("predictor.loss", loss, "ce")):
            if value != plain and not self.collect.importance:
                raise UserError(f"{key}={value} needs importances; set collect.importance=true or {key}={plain}")
        if self.data.fit_windows is not None and self.monitor.windows >= self.data.fit_windows:
            raise UserError(
                f"monitor.windows={self.monitor.windows} holds out all "
                f"data.fit_windows={self.data.fit_windows}; lower it"
            )

    def _check_tuning(self, epochs: int) -> None:
        if self.sites != ["neuron"] or self.cluster.scope != "layer":
            raise UserError(
                f"tune.max_epochs={epochs}: tuning needs sites=[neuron] and cluster.scope=layer, "
                "or set tune.max_epochs=0"
            )
        if self.cluster.algorithm != "lloyd":
            raise UserError(
                f"tune.max_epochs={epochs}: tuning needs cluster.algorithm=lloyd in place of {self.cluster.algorithm}"
            )
        processes = self.trainer.devices * self.trainer.num_nodes
        if self.tune.batch_windows < processes:
            raise UserError(
                f"tune.batch_windows={self.tune.batch_windows} is less than a window for each of {processes} "
                "processes; raise it"
            )


def check_names(cfg: Config) -> None:
    """Raises UserError for a run.name that can't be a folder in run.dir, or a W&B name that W&B refuses.

    `Config` itself does not check names, so that every saved run still loads.
    """
    name = cfg.run.name
    if name is not None:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(
                f"run.name={name}: not the name of a folder; choose another name, and the place with run.dir=FOLDER"
            )
        if (size := len(name.encode())) > 255:
            raise UserError(f"run.name={name[:20]}…: has {size} bytes, but a folder's name has at most 255; shorten it")
    for tag in cfg.tracking.tags:
        if not 1 <= len(tag) <= 64:
            raise UserError(f"tracking.tags: {tag[:20]}… has {len(tag)} characters; W&B takes 1 to 64")
    project = cfg.tracking.project
    if not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:"):
        raise UserError(f"tracking.project={project[:40]}: W&B takes 1 to 128 characters, without any of / \\ # ? % :")
