"""Merges files and overrides into a configuration, and describes every key.

Later sources win: dataclass defaults ← group files (`configs/<group>/<name>.yaml`) ← an experiment or YAML file ←
key=value overrides, group choices first. A name in place of a section chooses a group file: `model=mistral7b`. A run of
the bundled model on the bundled text uses `experiment=demo` unless another experiment is chosen.
"""

import inspect
import math
import re
import sys
import textwrap
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from apc.config.schema import Config, TuneConfig, check_names
from apc.config.values import KINDS, SECTIONS, as_word, number, parse_yaml, typed, unquoted
from apc.utils.errors import UserError, first_line

# In a wheel, configs/ lies in the package; in a checkout, beside it.
_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())

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
    "low-bit-5": "low-bit-1",
    "neuron-5": "neuron-48",
    "static-5": "static",
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
    if experiment is None and _is_bundled(sources := [*_read_files(files), *given]):
        experiment = "demo"
        if any("policies" in source for source in sources) and not any("bytes" in source for source in sources):
            dotlist["bytes"] = None  # the demo's is for its own policies
    if experiment:
        files.insert(0, _group_file("experiment", experiment))
    cfg = _merge([*_read_files(files), *given])
    check_names(cfg)
    return cfg


def load_saved(path: Path, overrides: list[str] | None = None) -> Config:
    """A run's saved configuration, also of version 0.1, with overrides on top. Raises as `load_config` does."""
    values = _read_yaml(path)
    for key in (*RENAMED, *REMOVED):
        if (owner := _owner(values, key)) is not None:
            value = owner.pop(key.rpartition(".")[2])
            if key in RENAMED:
                owner[RENAMED[key].rpartition(".")[2]] = value
            elif not math.isclose(number(key, float, value), now := _now_fixed(key, values)):
                print(f"note: {path}: was made with {key}={value}, which is now {now:g}", file=sys.stderr)
    if data := _owner(values, "data.seq_len"):
        data.setdefault("bos", "false")  # version 0.1 had no BOS token
    trainer = _owner(values, "trainer.precision") or {}
    if (precision := trainer.get("precision")) in ("16-mixed", "64-true"):  # version 0.1 allowed them
        trainer["precision"] = "32-true"
        print(f"note: {path}: was made with trainer.precision={precision}, which is now 32-true", file=sys.stderr)
    names, dotlist = _parse_overrides(overrides or [])
    try:
        return _merge([values, *_read_groups(names), dotlist])
    except UserError as error:
        if overrides:
            raise
        raise UserError(f"{path}: {error}; another version of apc may have written it") from error


def _now_fixed(key: str, values: dict) -> float:
    """The fixed value that replaced a removed key; for two keys it depends on `tune.lr`."""
    lr = number("tune.lr", float, (values.get("tune") or {}).get("lr", TuneConfig.lr))
    return {"tune.lr_scores": 20 * lr, "tune.lr_offsets": 2 * lr}.get(key, REMOVED[key][0])


def split_file(words: list[str]) -> tuple[str | None, list[str]]:
    """The YAML file that a command line begins with (None: none), and its other words."""
    if words and "=" not in words[0] and words[0].endswith((".yaml", ".yml")):
        return words[0], words[1:]
    return None, words


def to_dict(cfg: Config) -> dict:
    """The configuration as nested dictionaries."""
    return asdict(cfg)


def flat(cfg: Config) -> dict[str, object]:
    """All keys with their values; those in sections are dotted."""
    values: dict[str, object] = {}
    for key, value in asdict(cfg).items():
        values |= {f"{key}.{name}": item for name, item in value.items()} if key in SECTIONS else {key: value}
    return values


def overrides_between(base: Config, cfg: Config, leave_out: tuple[str, ...] = ()) -> list[str]:
    """The key=value words that turn `base` into `cfg`, without the sections and keys in `leave_out`."""
    before, after = flat(base), flat(cfg)
    different = {key for key in after if after[key] != before[key]}
    if "sparsity" in different:  # if the density is not given, it follows the sparsity
        different.add("cluster.density")
    changed = [key for key in after if key in different and not {key, key.partition(".")[0]} & {*leave_out}]
    return [f"{key}={as_word(after[key])}" for key in changed]


def _merge(sources: list[dict]) -> Config:
    """The configuration of sources whose scalars are text; a later source wins."""
    base = OmegaConf.structured(Config)
    for node in (base, *(base[name] for name in SECTIONS)):
        OmegaConf.set_readonly(node, False)
    values = [_in_types(source) for source in sources]
    follows = True  # whether the density is 1 - sparsity
    for section in (source.get("cluster") for source in values):
        if isinstance(section, dict) and "density" in section:
            follows = section["density"] is None
            if follows:
                del section["density"]
    try:
        cfg = cast(Config, OmegaConf.to_object(OmegaConf.merge(base, *map(_escaped, values))))
    except OmegaConfBaseException as error:
        raise UserError(_explain(error)) from error
    return replace(cfg, cluster=replace(cfg.cluster, density=round(1 - cfg.sparsity, 12))) if follows else cfg


def _in_types(source: dict) -> dict:
    """A source's values in the types of the schema."""
    return {
        str(key): {str(name): typed(f"{key}.{name}", item) for name, item in value.items()}
        if key in SECTIONS and isinstance(value, dict)
        else typed(key, value)
        for key, value in source.items()
    }


def _escaped(value: Any) -> Any:
    """Values whose texts are escaped, so that OmegaConf reads no `${…}` as interpolation and no `???` as missing."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"^(\\*\?\?\?)$", r"\\\1", re.sub(r"(\\*)\$\{", r"\1\1\\${", value))


def _read_files(files: list[Path]) -> list[dict]:
    """The group files that these files choose, then the files' own values."""
    chosen: dict[str, str] = {}
    values = [_take_groups(_read_yaml(file), chosen) for file in files]
    return [*_read_groups(chosen), *values]


def _is_bundled(sources: list[dict]) -> bool:
    """Whether model and texts are the bundled ones."""
    given: dict[str, dict] = {"model": {}, "data": {}}
    for section, values in given.items():
        for source in sources:
            if isinstance(source.get(section), dict):
                values |= source[section]
    keys = (("model", "path"), ("data", "fit"), ("data", "score"))
    return all(given[section].get(name, "bundled") == "bundled" for section, name in keys)


def _read_groups(names: dict[str, str]) -> list[dict]:
    return [{group: _read_yaml(_group_file(group, name))} for group, name in names.items()]


def _parse_overrides(overrides: list[str]) -> tuple[dict[str, str], dict]:
    """Splits the words into group choices and the values of keys, as text; of a repeated key the last one counts.

    One section may have both: `model=x` and `model.dtype=y`.
    """
    names: dict[str, str] = {}
    values: dict[str, Any] = {}
    for word in overrides:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UserError(f"{word}: not an override; write key=value (python train.py --help lists the keys)")
        if not word.isascii() and re.search("[\ud800-\udfff]", word):
            raise UserError(f"{ascii(word)}: not UTF-8, so it can't be saved in a configuration; use a name in UTF-8")
        if key == "experiment" or key in SECTIONS:
            names[key] = value
            continue
        _check_old(key)
        if not value:
            raise UserError(f"{word}: no value; write {key}=null for none, or leave it out")
        section, dot, name = key.partition(".")
        owner = values.setdefault(section, {}) if dot else values
        if not isinstance(owner, dict):
            raise UserError(f"{key}: unknown key; {section} is not a section")
        owner[name if dot else section] = (
            None if value in ("null", "None") else unquoted(value)
        )  # W&B sweeps write None
    return names, values


def _check_old(key: str) -> None:
    """Raises UserError for a key of version 0.1."""
    if key in RENAMED:
        raise UserError(f"{key}: renamed; write {RENAMED[key]}")
    if key in REMOVED:
        raise UserError(f"{key}: this key was removed ({REMOVED[key][1]}); leave it out")


def _owner(values: dict, key: str) -> dict | None:
    """The section that has this key, or `values` itself; None if the key is not there."""
    section, _, name = key.rpartition(".")
    node = values.get(section) if section else values
    return node if isinstance(node, dict) and name in node else None


def _take_groups(values: dict, chosen: dict[str, str]) -> dict:
    """Moves sections given as a name (`model: bundled`) from `values` to `chosen`.

    Raises UserError for a key of version 0.1.
    """
    for section in SECTIONS:
        if isinstance(values.get(section), str):
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


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: contains no keys; write lines of the form KEY: VALUE")
    return values or {}


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message as one line that begins with the key."""
    key = getattr(error, "full_key", None)
    reason = first_line(error).rstrip(".")
    if isinstance(error, ConfigKeyError) and key:
        like = get_close_matches(key, [*SECTIONS, *flat(Config())], n=1, cutoff=0.5)
        advice = f"did you mean {like[0]}?" if like else "python train.py --help lists the keys"
        return f"{key}: unknown key; {advice}"
    if key in KINDS and ("'None'" in reason or "not Optional" in reason):
        return f"{key}=null: it needs a value, such as its default, {key}={as_word(flat(Config())[key])}"
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
