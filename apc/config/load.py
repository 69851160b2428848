"""Merges files and overrides into a configuration, and describes every key.

Later sources win: dataclass defaults ← group files (`configs/<group>/<name>.yaml`) ← an experiment or YAML file ←
key=value overrides, group choices first. A name in place of a section chooses a group file: `model=mistral7b`. A run of
the bundled model on the bundled text uses `experiment=demo` unless another experiment is chosen.
"""

import inspect
import re
import sys
import textwrap
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from apc.config.schema import Config
from apc.utils.errors import UserError, first_line

# In a wheel, configs/ lies in the package; in a checkout, beside it.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

# The dataclass of each section, by its key.
SECTIONS = {item.name: type(item.default) for item in fields(Config) if is_dataclass(item.default)}

# Keys of version 0.1, and their new names or why they are gone.
RENAMED = {
    "arms": "policies",
    "collect.hidden": "collect.ffn_inputs",
    "collect.block_tokens": "collect.batch_tokens",
    "predictor.hidden": "predictor.bottleneck",
    "predictor.reads": "predictor.low_bit_projections",
    "predictor.batch": "predictor.batch_tokens",
    "tune.arm": "tune.policy",
    "tune.windows": "tune.batch_windows",
}
REMOVED = {
    "cluster.init_sample": (4096, "k-means++ always samples 4,096 rows of a group"),
    "predictor.weight_decay": (0.01, "it is always 0.01, and 0 for the low-bit form"),
    "tune.budget_windows": (16, "the cost of dropping neurons is always measured on 16 windows"),
    "tune.lr_scores": (2e-2, "it is always 20 times tune.lr"),
    "tune.lr_offsets": (2e-3, "it is always twice tune.lr"),
    "tune.temperature": (0.5, "it is always 0.5"),
}

RENAMED_EXPERIMENTS = {
    "cluster-5": "cluster-k512",
    "cluster-20": "cluster-k2048",
    "low-bit-5": "low-bit-1",
    "low-bit-20": "low-bit-3",
    "neuron-5": "neuron-48",
    "neuron-20": "neuron-196",
    "static-5": "static",
    "oracle-11": "oracle-k2048",
}


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """The typed, validated, read-only configuration from an optional YAML file and key=value overrides.

    Raises UserError for an unknown key (naming the most similar known one), an old key (naming the new one), a wrong
    type, a value out of range, or a missing file.
    """
    names, dotlist = _parse_overrides(overrides or [])
    experiment = names.pop("experiment", None)
    if experiment in RENAMED_EXPERIMENTS:
        raise UserError(f"experiment={experiment}: renamed; write experiment={RENAMED_EXPERIMENTS[experiment]}")
    files = [Path(path)] if path is not None else []
    given = [*_read_groups(names), dotlist]
    if experiment is None and _is_bundled([*_read_files(files), *given]):
        experiment = "demo"
    if experiment:
        files.insert(0, _group_file("experiment", experiment))
    return _merge([*_read_files(files), *given])


def load_saved(path: Path, overrides: list[str] | None = None) -> Config:
    """A run's saved configuration, also of version 0.1, with overrides on top. Raises as `load_config` does."""
    values = _read_yaml(path)
    for key in (*RENAMED, *REMOVED):
        if (owner := _owner(values, key)) is not None:
            value = owner.pop(key.rpartition(".")[2])
            if key in RENAMED:
                OmegaConf.update(values, RENAMED[key], value)
            elif value != REMOVED[key][0]:
                print(f"note: {path}: was made with {key}={value}, which is now {REMOVED[key][0]}", file=sys.stderr)
    precision = OmegaConf.select(values, "trainer.precision")
    if precision in ("16-mixed", "64-true"):  # version 0.1 allowed them
        OmegaConf.update(values, "trainer.precision", "32-true")
        print(f"note: {path}: was made with trainer.precision={precision}, which is now 32-true", file=sys.stderr)
    names, dotlist = _parse_overrides(overrides or [])
    return _merge([values, *_read_groups(names), dotlist])


def to_dict(cfg: Config) -> dict:
    """The configuration as nested dictionaries."""
    return asdict(cfg)


def to_yaml(cfg: Config) -> str:
    """The configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(cfg)))


def as_word(value: object) -> str:
    """A value in the command line's notation."""
    if isinstance(value, list):
        return f"[{','.join(map(as_word, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat(cfg: Config) -> dict[str, object]:
    """All keys with their values; those in sections are dotted."""
    values: dict[str, object] = {}
    for key, value in asdict(cfg).items():
        values |= {f"{key}.{name}": item for name, item in value.items()} if key in SECTIONS else {key: value}
    return values


def overrides_between(base: Config, cfg: Config, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The key=value words that turn `base` into `cfg`, without the sections and keys in `leave_out`."""
    before, after = flat(base), flat(cfg)
    changed = [key for key in after if after[key] != before[key] and not {key, key.partition(".")[0]} & {*leave_out}]
    return [f"{key}={as_word(after[key])}" for key in changed]


def _merge(sources: list[DictConfig]) -> Config:
    base = OmegaConf.structured(Config)
    for node in (base, *(base[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(base, *sources)))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error


def _read_files(files: list[Path]) -> list[DictConfig]:
    """The group files that these files choose, then the files' own values."""
    chosen: dict[str, str] = {}
    values = [_take_groups(_read_yaml(file), chosen) for file in files]
    return [*_read_groups(chosen), *values]


def _is_bundled(sources: list[DictConfig]) -> bool:
    """Whether model and texts are the bundled ones."""
    merged = OmegaConf.unsafe_merge({}, *sources)
    keys = ("model.path", "data.fit", "data.score")
    try:
        return all(OmegaConf.select(merged, key, default="bundled") == "bundled" for key in keys)
    except OmegaConfBaseException:  # a section is not a dictionary; the merge reports it
        return False


def _read_groups(names: dict[str, str]) -> list[DictConfig]:
    return [OmegaConf.create({group: _read_yaml(_group_file(group, name))}) for group, name in names.items()]


def _parse_overrides(overrides: list[str]) -> tuple[dict[str, str], DictConfig]:
    """Splits the words into group choices and key=value overrides.

    One section may have both: `model=x` and `model.dtype=y`.
    """
    names, words = {}, []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"{word}: not an override; write key=value (python train.py --help lists the keys)")
        if key == "experiment" or key in SECTIONS:
            names[key] = value
        else:
            _check_old(key)
            words.append(f"{key}=null" if value == "None" else word)  # W&B sweeps write None for null
    try:
        return names, OmegaConf.from_dotlist(words)
    except (OmegaConfBaseException, YAMLError) as error:
        raise UserError(f"{' '.join(words)}: can't be read as overrides: {first_line(error)}") from error


def _check_old(key: str) -> None:
    """Raises UserError for a key of version 0.1."""
    if key in RENAMED:
        raise UserError(f"{key}: renamed; write {RENAMED[key]}")
    if key in REMOVED:
        raise UserError(f"{key}: this key was removed ({REMOVED[key][1]}); leave it out")


def _owner(values: DictConfig, key: str) -> DictConfig | None:
    """The section that has this key, or `values` itself; None if the key is not there."""
    section, _, name = key.rpartition(".")
    node = values.get(section) if section else values
    return node if isinstance(node, DictConfig) and name in node else None


def _take_groups(values: DictConfig, chosen: dict[str, str]) -> DictConfig:
    """Moves sections given as a name (`model: bundled`) from `values` to `chosen`.

    Raises UserError for a key of version 0.1.
    """
    for section in SECTIONS:
        if section in values and isinstance(values[section], str):
            chosen[section] = values.pop(section)
    for key in (*RENAMED, *REMOVED):
        if _owner(values, key) is not None:
            _check_old(key)
    return values


def _group_file(group: str, name: str) -> Path:
    path = CONFIGS / group / f"{name}.yaml"
    if not re.fullmatch(r"[\w.-]+", str(name)) or not path.is_file():
        known = sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))
        advice = f"choose {', '.join(known)}" if known else f"set {group}.KEY=VALUE instead"
        raise UserError(f"{group}={name}: no such group file; {advice}")
    return path


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {first_line(error)}") from error
    if not isinstance(values, DictConfig):
        raise UserError(f"{path}: contains no keys; write lines of the form KEY: VALUE")
    return values


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message as one line that begins with the key."""
    key = getattr(error, "full_key", None)
    reason = first_line(error).rstrip(".")
    if isinstance(error, ConfigKeyError) and key:
        like = get_close_matches(key, [*SECTIONS, *flat(Config())], n=1, cutoff=0.5)
        advice = f"did you mean {like[0]}?" if like else "python train.py --help lists the keys"
        return f"{key}: unknown key; {advice}"
    return f"{key}: {reason}" if key else f"configuration: {reason}"


def describe() -> str:
    """The text of `--help`: all keys with defaults and meanings, and all group files."""
    defaults = flat(Config())
    lines = []
    for section, kind in {"": Config, **SECTIONS}.items():
        lines.append(f"\n{section or 'general'}:")
        for name, comment in _comments(kind).items():
            if name not in SECTIONS:
                key = f"{section}.{name}".lstrip(".")
                lines += [f"  {key}={as_word(defaults[key])}", textwrap.indent(textwrap.fill(comment, 74), " " * 6)]
    lines.append("\ngroup files (GROUP=NAME):")
    for folder in sorted(CONFIGS.iterdir()):
        if folder.name in (*SECTIONS, "experiment"):
            lines.append(f"  {folder.name}={'|'.join(sorted(file.stem for file in folder.glob('*.yaml')))}")
    return "\n".join(lines)


def _comments(kind: type) -> dict[str, str]:
    """The comment above each field of a dataclass, which explains it."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if comment := re.match(r"    # (.*)", line):
            above.append(comment.group(1))
        else:
            if key := re.match(r"    (\w+): ", line):
                comments[key.group(1)] = " ".join(above)
            above = []
    return comments
