"""The configuration of a run: the dataclasses of `settings.py` and those beside the code that reads them, put together here.

Later sources win: dataclass defaults ← group files (`configs/<group>/<name>.yaml`) ← an experiment or YAML file ← key=value
overrides (group choices among them first). Wherever a section is expected, a bare name chooses a group file: `model=mistral7b`. Without an experiment or file,
`experiment=demo` is taken.
"""

import inspect
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from apc.arms import ARMS
from apc.errors import UserError
from apc.models import ModelConfig
from apc.patterns import CollectConfig, check_sites
from apc.settings import ClusterConfig, PredictorConfig, TuneConfig
from apc.text import DataConfig
from apc.tracking import TrackingConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STAGES = ("collect", "cluster", "predict", "tune", "all")
DEFAULT_ARMS = ("dense", "exact", "static", "random", "oracle", "predicted", "soft")


@dataclass(frozen=True)
class RunConfig:
    name: str | None = None  # the run's folder; an existing one of the same configuration is taken up again; null: date and time
    dir: str = "runs"  # where run folders lie


@dataclass(frozen=True)
class MonitorConfig:
    windows: int = 1  # held-out windows, from the end of the fit text, that figures are watched on during training; 0: none
    every: int = 5  # passes between perplexities of the oracle arm during clustering

    def __post_init__(self):
        if self.windows < 0 or self.every < 1:
            raise UserError(f"monitor.windows must not be negative and monitor.every at least 1, got {self.windows} and {self.every}")


@dataclass(frozen=True)
class TrainerConfig:
    devices: int = 1  # processes on a machine, one for each GPU (or CPU process); more than one starts them, unless torchrun did
    num_nodes: int = 1  # machines; more than one needs torchrun on each, which then says how many there are
    precision: str = "32-true"  # of the predictor's training, as Lightning names it: 32-true, bf16-mixed, …
    batch_windows: int | None = None  # windows in one forward pass; null: 1 on a CPU, 8 on a GPU
    log_every_n_steps: int = 20  # predictor steps between logged losses
    checkpoint_every_n_steps: int = 100  # training steps between checkpoints, besides each epoch's end; fewer where writing would take a tenth of the time
    max_steps: int = -1  # stop each training after so many steps; -1: no limit
    progress: bool = True  # show Lightning's progress bar

    def __post_init__(self):
        if self.precision not in ("32-true", "16-mixed", "bf16-mixed", "64-true"):
            raise UserError(f"trainer.precision={self.precision}: choose 32-true, bf16-mixed, 16-mixed or 64-true")
        least = dict(devices=1, num_nodes=1, batch_windows=1, log_every_n_steps=1, checkpoint_every_n_steps=1, max_steps=-1)
        for key, value in least.items():
            if getattr(self, key) is not None and getattr(self, key) < value:
                raise UserError(f"trainer.{key} must be at least {value}, got {getattr(self, key)}")
        if self.max_steps == 0:
            raise UserError("trainer.max_steps=0 trains nothing; give -1 for no limit")


@dataclass(frozen=True)
class Config:
    stage: str = "all"  # collect, cluster, predict, tune, or all: everything up to the table
    checkpoint: str | None = None  # a run folder: train.py takes its codebook up, as clustering left it; evaluate.py evaluates it
    seed: int = 0
    sites: list[str] = field(default_factory=lambda: ["neuron"])  # [neuron], or some of [gate,up,down]
    sparsity: float = 0.5  # target share of inactive neurons
    active: str = "threshold"  # importance at least the layer's threshold, or among the token's own `top` share
    arms: list[str] | None = None  # what to evaluate; null: dense, exact, static, random, oracle, predicted, soft
    speed: bool = False  # also decode with each arm that knows its mask before: tokens a second, perplexity after a dense prefill, what it says
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
        check_sites(self.sites)
        if self.stage not in STAGES:
            raise UserError(f"stage={self.stage}: choose {', '.join(STAGES)}")
        if self.active not in ("threshold", "top"):
            raise UserError(f"active={self.active}: choose threshold or top")
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity must lie between 0 and 1, got {self.sparsity}")
        if self.seed < 0:
            raise UserError(f"seed must not be negative, got {self.seed}")
        if self.arms is not None and not self.arms:
            raise UserError("arms=[]: names none; leave it out for all, or choose some")
        for arm in self.arms or ():
            if arm != "dense" and arm not in ARMS:
                raise UserError(f"arms: {arm} is unknown; choose from dense, {', '.join(ARMS)}")
            forms = getattr(ARMS.get(arm), "forms", None)
            if forms is not None and self.predictor.form not in forms:
                raise UserError(f"arms: {arm} needs predictor.form={' or '.join(forms)}, this run has predictor.form={self.predictor.form}")
            if arm == "gate" and self.sites != ["neuron"]:
                raise UserError(f"arms: gate needs sites=[neuron], this run has sites={self.sites}")
        if self.speed and self.sites != ["neuron"]:
            raise UserError(f"speed=true: kernels need sites=[neuron], this run has sites={self.sites}")
        for key, wanted in (("speed", self.speed), ("tune.max_epochs", self.tune.max_epochs)):
            if wanted and self.model.device_map:
                raise UserError(f"model.device_map={self.model.device_map}: {key}={wanted} needs the model on one device; leave one of the two out")
        if self.predictor.form == "low-bit" and self.sites != ["neuron"]:
            raise UserError(f"predictor.form=low-bit needs sites=[neuron], this run has sites={self.sites}")
        if self.tune.max_epochs:
            if self.sites != ["neuron"] or self.cluster.scope != "layer":
                raise UserError(f"tune.max_epochs={self.tune.max_epochs}: tuning needs sites=[neuron] and cluster.scope=layer, or set tune.max_epochs=0")
            if self.cluster.algorithm != "lloyd":
                raise UserError(f"tune.max_epochs={self.tune.max_epochs}: tuning needs cluster.algorithm=lloyd in place of {self.cluster.algorithm}")
            if self.tune.windows < self.trainer.devices * self.trainer.num_nodes:
                raise UserError(
                    f"tune.windows={self.tune.windows} is less than a window for each of {self.trainer.devices * self.trainer.num_nodes} processes; raise it"
                )
            if self.tune.forms and self.predictor.form not in self.tune.forms:
                needed = " or ".join(self.tune.forms)
                raise UserError(f"tune.arm={self.tune.arm} needs predictor.form={needed}, this run has predictor.form={self.predictor.form}")
            wanting = [arm for arm in self.arms or () if hasattr(ARMS.get(arm), "forms")]
            if wanting and not self.tune.forms:
                raise UserError(f"arms: {', '.join(wanting)}: no predictor is left where tune.arm={self.tune.arm}; choose other arms or tune another")
        elif self.stage == "tune":
            raise UserError("stage=tune: tune.max_epochs=0 tunes nothing; set tune.max_epochs")
        if self.cluster.weighting != "binary" and not self.collect.importance:
            raise UserError(f"cluster.weighting={self.cluster.weighting} needs importances; set collect.importance=true or cluster.weighting=binary")
        if self.predictor.loss != "ce" and not self.collect.importance:
            raise UserError(f"predictor.loss={self.predictor.loss} needs importances; set collect.importance=true or predictor.loss=ce")
        if self.data.fit_windows is not None and self.monitor.windows >= self.data.fit_windows:
            raise UserError(f"monitor.windows={self.monitor.windows} leaves nothing to fit of data.fit_windows={self.data.fit_windows}; lower it")

    @property
    def with_predictor(self) -> bool:
        """Whether a predictor is trained: not where the arms are named and none of them needs it, or where one is tuned that needs none, unless
        stage=predict asks for it."""
        if self.tune.max_epochs and self.stage != "predict":
            return bool(self.tune.forms)
        return self.stage == "predict" or any(hasattr(ARMS.get(arm), "forms") for arm in self.arms or DEFAULT_ARMS)


SECTIONS = {f.name: f.default_factory for f in fields(Config) if f.default_factory is not MISSING and is_dataclass(f.default_factory)}


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The configuration from an optional YAML file and key=value overrides: typed, validated, read-only.

    Raises UserError for an unknown key (with its like), a wrong type, a value out of range, or a file that isn't there.
    """
    base = OmegaConf.structured(Config)
    for node in (base, *(base[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)
    sources = _sources(path, overrides or [])
    try:
        merged = OmegaConf.merge(base, *sources)
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error


def to_dict(cfg: Config) -> dict:
    return asdict(cfg)


def to_yaml(cfg: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def as_word(value: object) -> str:
    """A value as it stands on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def overrides_between(base: Config, cfg: Config, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The key=value words that make `cfg` of `base`; sections and keys in `leave_out` may differ."""
    words = []
    for key, value in asdict(cfg).items():
        other = getattr(base, key)
        if key not in leave_out and key in SECTIONS:
            words += [f"{key}.{name}={as_word(item)}" for name, item in value.items() if f"{key}.{name}" not in leave_out and item != getattr(other, name)]
        elif key not in leave_out and value != other:
            words.append(f"{key}={as_word(value)}")
    return words


def _sources(path: str | Path | None, overrides: list[str]) -> list[DictConfig]:
    """What the files chose of the groups, then the files' own values, then the groups and values of the command line."""
    names, dotlist = _parse_overrides(overrides)
    experiment = names.pop("experiment", "demo" if path is None else None)
    files = [_group_file("experiment", experiment)] if experiment else []
    files += [Path(path)] if path is not None else []
    chosen: dict[str, str] = {}
    values = [_take_groups(_read_yaml(file), chosen) for file in files]
    return [*_read_groups(chosen), *values, *_read_groups(names), dotlist]


def _read_groups(names: dict[str, str]) -> list[DictConfig]:
    return [OmegaConf.create({group: _read_yaml(_group_file(group, name))}) for group, name in names.items()]


def _parse_overrides(overrides: list[str]) -> tuple[dict[str, str], DictConfig]:
    """(group choices, key=value overrides). They are parted first: `model=x` and `model.dtype=y` may stand side by side."""
    names, words = {}, []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"{word}: not an override; write key=value (python train.py --help lists the keys)")
        if key == "experiment" or key in SECTIONS:
            names[key] = value
        else:
            words.append(f"{key}=null" if value == "None" else word)  # W&B sweeps write None for null
    try:
        return names, OmegaConf.from_dotlist(words)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{' '.join(words)}: can't be read as overrides: {str(error).splitlines()[0]}") from error


def _take_groups(values: DictConfig, chosen: dict[str, str]) -> DictConfig:
    """Takes sections given as a bare name out of `values` and notes them in `chosen`."""
    for section in SECTIONS:
        if section in values and isinstance(values[section], str):
            chosen[section] = values.pop(section)
    return values


def _group_file(group: str, name: str) -> Path:
    path = CONFIGS / group / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", str(name)) or not path.is_file():
        known = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
        raise UserError(f"{group}={name}: no such group file; " + (f"choose {', '.join(known)}" if known else f"set {group}.KEY=VALUE instead"))
    return path


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"{path}: holds no keys; write KEY: VALUE lines")
    return values


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line that begins with the key."""
    key = getattr(error, "full_key", None)
    reason = str(error).splitlines()[0].rstrip(".")
    if isinstance(error, ConfigKeyError) and key:
        like = get_close_matches(key, _known_keys(), n=1, cutoff=0.5)
        return f"{key}: unknown key; " + (f"did you mean {like[0]}?" if like else "python train.py --help lists the keys")
    return f"{key}: {reason}" if key else f"configuration: {reason}"


def _known_keys() -> list[str]:
    nested = [f"{section}.{item.name}" for section, kind in SECTIONS.items() for item in fields(kind)]
    return [item.name for item in fields(Config)] + nested


def describe() -> str:
    """All keys with their defaults and meanings, and the group files there are."""
    lines = []
    for name, kind in {"": Config, **SECTIONS}.items():
        lines.append(f"\n{name or 'general'}:")
        comments = _comments(kind)
        for item in fields(kind):
            if item.name in SECTIONS and kind is Config:
                continue
            default = item.default if item.default is not MISSING else item.default_factory()
            key = f"{name + '.' if name else ''}{item.name}"
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default).replace("'", "")
            lines.append(f"  {key + '=' + shown:<40} {comments.get(item.name, '')}".rstrip())
    lines.append("\ngroup files (GROUP=NAME):")
    for folder in sorted(CONFIGS.iterdir()):
        if folder.name in (*SECTIONS, "experiment"):
            lines.append(f"  {folder.name}={'|'.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    return "\n".join(lines)


def _comments(kind: type) -> dict[str, str]:
    """The comment beside each field of a dataclass: it is what the field means."""
    pattern = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(kind)))
