"""Values as text: reads YAML and words of the command line by the schema, and writes them so that they are read back.

The schema decides each value's type, so a text key takes `2024_01_15`, `on` and `007` as they are typed.
"""

import math
import re
import sys
from collections import Counter
from dataclasses import asdict, fields, is_dataclass
from typing import Any, cast, get_args, get_origin

import yaml

from apc.config.schema import Config
from apc.utils.errors import UserError, first_line

# The dataclass of each section, by its key.
SECTIONS: dict[str, Any] = {item.name: type(item.default) for item in fields(Config) if is_dataclass(item.default)}


def _kind(annotation: Any) -> type:
    """The type without `| None` and without the type of a list's items."""
    kind = next((part for part in get_args(annotation) if part is not type(None)), annotation)
    return list if list in (get_origin(annotation), get_origin(kind)) else kind


KINDS = {
    f"{section}.{item.name}".lstrip("."): _kind(item.type)
    for section, kind in {"": Config, **SECTIONS}.items()
    for item in fields(kind)
    if item.name not in SECTIONS
}
_NUMBERS = {
    int: (r"[-+]?[0-9]{1,18}", "a whole number, such as 12"),
    float: (r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", "a finite number, such as 0.5 or 1e-3"),
}
_QUOTED = r"""(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")"""


def to_yaml(cfg: Config) -> str:
    """The configuration as YAML, which is read back as the same configuration."""
    return yaml.dump(asdict(cfg), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_word(value: object) -> str:
    """A value in the command line's notation, which is read back as the same value."""
    if isinstance(value, list):
        plain = [item for item in value if _split(item) == [item] and item[:1] not in ("", "'", '"')]
        return f"[{','.join(item if item in plain else _quoted(item) for item in value)}]"
    if isinstance(value, str):
        return _quoted(value) if value in ("", "null", "None") or re.fullmatch(_QUOTED, value, re.DOTALL) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=sys.maxsize).rstrip("\n")


def unquoted(text: str) -> str:
    """The text without its quotes if one pair encloses all of it; else the text as it is."""
    if not re.fullmatch(_QUOTED, text, re.DOTALL):
        return text
    try:
        return str(parse_yaml(text))
    except ValueError as error:
        raise UserError(f"{text}: can't be read ({error})") from error


def _split(text: str) -> list[str]:
    """The items of a list on the command line; text: what is between the brackets."""
    items, end, comma = [], 0, ","
    while comma:
        match = cast(re.Match, re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*(,|$)", re.DOTALL).match(text, end))
        (item, comma), end = match.groups(), match.end()
        items.append(unquoted(item))
    return items


class Plain(str):
    """A YAML scalar without quotes; only such a scalar can mean null."""


class _TextLoader(yaml.SafeLoader):
    """Reads scalars as text, because the schema decides their types. Refuses a key that is given twice."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}
    yaml_constructors = {
        "tag:yaml.org,2002:str": lambda loader, node: node.value if node.style else Plain(node.value),
        "tag:yaml.org,2002:seq": lambda loader, node: loader.construct_sequence(node, deep=True),
        "tag:yaml.org,2002:map": lambda loader, node: loader.construct_mapping(node, deep=True),
    }

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        counts = Counter(key.value for key in keys)
        if again := next((key for key in reversed(keys) if counts[key.value] > 1), None):
            raise yaml.composer.ComposerError(None, None, f"{again.value} is given twice", again.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader without the schema could take for a number or a date."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = '"' if not text.isprintable() else None if re.match("[A-Za-z_/]", text) else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)
_Dumper.add_multi_representer(str, _Dumper.represent_text)  # OmegaConf has a class of its own for some texts


def parse_yaml(content: str | bytes) -> Any:
    """Parsed YAML with all scalars as text, `Plain` if unquoted. Raises ValueError with a one-line message."""
    try:
        return yaml.load(content, _TextLoader)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error


def typed(key: str, value: object) -> object:
    """A value from YAML, or a text from the command line, in the type that the schema gives this key.

    For an unknown key: the text as it is. Raises UserError, naming the key, for a value of another type.
    """
    kind = KINDS.get(key)
    if value is None or isinstance(value, Plain) and value in ("null", "Null", "NULL", "~", ""):
        return None
    if kind is None:
        return str(value) if isinstance(value, str) else None
    if kind is list:
        return _words(key, value)
    if not isinstance(value, str):
        raise UserError(f"{key}: takes one value, not a list or a section")
    if kind is str:
        return str(value)
    if kind is not bool:
        return number(key, kind, value)
    if value.lower() not in ("true", "false"):
        raise UserError(f"{key}={value}: choose true or false")
    return value.lower() == "true"


def number(key: str, kind: type, value: object) -> float:
    """The number in a text, of type int or float. Raises UserError, naming the key, if it is none or not finite."""
    pattern, meaning = _NUMBERS[kind]
    text = str(value).strip()
    if not re.fullmatch(pattern, text) or not math.isfinite(kind(text)):
        raise UserError(f"{key}={value}: not {meaning}")
    return kind(text)


def _words(key: str, value: object) -> list[str]:
    """A list of words, from a list of YAML or from text such as `[a,b]`."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        value = _split(value[1:-1]) if value[1:-1].strip() else []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise UserError(f"{key}: not a list of words; write {key}=[a,b]")
    return [str(item) for item in value]
