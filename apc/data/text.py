"""Text → token windows: reads a source, checks that fit and score text do not overlap, tokenises, cuts.

A source is `bundled`, a local file, or a dataset of the Hugging Face hub (`name[:config[:split]]`). The fit text may be
several sources separated by commas.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from apc.config.schema import Config, DataConfig
from apc.data.bundled import bundled_documents
from apc.utils.errors import UserError
from apc.utils.hub import hub_offline, hub_reachable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_SUFFIXES = (".txt", ".raw", ".tokens", ".md")
SUFFIXES = (*PLAIN_SUFFIXES, ".parquet", ".jsonl")
SCORE_EVERY = 5  # every fifth bundled article is score text
PARAGRAPH_CHARS = 200  # shorter paragraphs (headings, lists, set phrases) can recur in unrelated texts
SHARED_LIMIT = 0.01  # share of the score text's characters that may also be in the fit text


@dataclass(frozen=True)
class Windows:
    """Token windows of one source.

    tokens: int64 [n, seq_len]; source: its name without folders; documents: number of documents in it; digest: sha256
    of token ids and seq_len alone.
    """

    tokens: torch.Tensor
    source: str
    documents: int
    digest: str

    def split(self, count: int) -> tuple["Windows", "Windows"]:
        """The first `count` windows, and the rest, which may be empty."""
        parts = self.tokens[:count], self.tokens[count:]
        first, rest = (replace(self, tokens=tokens, digest=_digest(tokens)) for tokens in parts)
        return first, rest


@dataclass(frozen=True)
class _Text:
    """A source that has been read."""

    key: str  # the config key that names it
    name: str  # for the user, without folders
    identity: str  # equal for equal sources
    documents: list[str]

    @property
    def joined(self) -> str:
        return "\n\n".join(self.documents)


def load_windows(cfg: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> tuple[Windows, Windows]:
    """Windows of the fit text and of the score text. Raises UserError as `read_texts` and `cut_windows` do."""
    return cut_windows(cfg, *read_texts(cfg), tokenizer)


def read_texts(cfg: DataConfig) -> tuple[_Text, _Text]:
    """The fit text and the score text. Needs no model, so errors show before one is loaded.

    Raises UserError if a source can't be read, or if fit and score text overlap.
    """
    fit, score = _read_role(cfg, "fit"), _read_role(cfg, "score")
    if not cfg.in_sample:
        _check_apart(fit, score)
    return fit, score


def cut_windows(
    cfg: DataConfig, fit: _Text, score: _Text, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Windows, Windows]:
    """Windows of the two texts from `read_texts`. Raises UserError if a text is too short for the windows wanted."""
    return _windows(cfg, fit, tokenizer), _windows(cfg, score, tokenizer)


def on_hub(cfg: DataConfig, role: str) -> bool:
    """Whether any source of the `fit` or `score` text is a dataset of the hub: neither bundled nor a local file."""
    return any(source.partition(":")[0] != "bundled" and not _looks_like_path(source) for source in _sources(cfg, role))


def count_windows(cfg: DataConfig, role: str, tokenizer: "PreTrainedTokenizerBase") -> int:
    """Number of windows in the `fit` or `score` text. Raises UserError as `cut_windows` does."""
    return len(_windows(cfg, _read_role(cfg, role), tokenizer).tokens)


def _windows(cfg: DataConfig, text: _Text, tokenizer: "PreTrainedTokenizerBase") -> Windows:
    """Adjacent windows from the start of the text, without a BOS token; drops a tail shorter than a window."""
    seq_len, limit = cfg.seq_len, getattr(cfg, f"{text.key}_windows".removeprefix("data."))
    # verbose=False: no warning that the text is longer than the model's context, since it is cut into windows.
    ids = torch.tensor(tokenizer(text.joined, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // seq_len
    if not available:
        raise UserError(
            f"{text.key}: {text.name} has {len(ids)} tokens, one window needs {seq_len}: "
            "lower data.seq_len or give more text"
        )
    if limit is not None and limit > available:
        raise UserError(
            f"{text.key}_windows={limit}, but {text.name} has {available} windows of {seq_len} tokens: "
            "lower it, or set it to null"
        )
    tokens = ids[: (limit or available) * seq_len].view(-1, seq_len)
    return Windows(tokens, text.name, len(text.documents), _digest(tokens))


def _digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(f"{tokens.shape[1]}:".encode() + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def _check_apart(fit: _Text, score: _Text) -> None:
    """Raises UserError if both are one source, or if long shared paragraphs exceed SHARED_LIMIT of the score text."""
    remedy = "choose other text, or set data.in_sample=true to score on fitted text"
    fit_text, score_text = fit.joined, score.joined
    if score.identity in fit.identity.split(",") or fit_text == score_text:
        raise UserError(f"data.fit and data.score are the same text ({score.name}): {remedy}")
    known = set(_paragraphs(fit_text))
    shared = [paragraph for paragraph in _paragraphs(score_text) if paragraph in known]
    share = sum(map(len, shared)) / max(len(score_text), 1)
    if share > SHARED_LIMIT:
        raise UserError(
            f"data.score ({score.name}) shares {len(shared)} paragraphs, {share:.0%} of its characters, "
            f"with data.fit ({fit.name}), the first one “{shared[0][:60]}…”: {remedy}"
        )


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of at least PARAGRAPH_CHARS: lines or, if the text has short lines, blocks between blank lines."""
    for block in re.split(r"\n\s*\n", text):
        lines = [line.strip() for line in block.split("\n")]
        long = [line for line in lines if len(line) >= PARAGRAPH_CHARS]
        wrapped = " ".join(lines)
        yield from long or ([wrapped] if len(wrapped) >= PARAGRAPH_CHARS else [])


def _sources(cfg: DataConfig, role: str) -> list[str]:
    source = getattr(cfg, role)
    if role == "score" or Path(source).expanduser().exists():
        return [source]
    return [part.strip() for part in source.split(",")]


def _read_role(cfg: DataConfig, role: str) -> _Text:
    """The text that `data.fit` or `data.score` names, its sources concatenated."""
    texts = [_read(source, role) for source in _sources(cfg, role)]
    if len(texts) == 1:
        return texts[0]
    name, identity = " + ".join(text.name for text in texts), ",".join(text.identity for text in texts)
    return _Text(texts[0].key, name, identity, [document for text in texts for document in text.documents])


def _read(source: str, role: str) -> _Text:
    key = f"data.{role}"
    name, _, part = source.partition(":")
    if name == "bundled":
        part = part or role
        if part not in ("fit", "score"):
            raise UserError(f"{key}: no bundled text `{part}`: use `bundled`, `bundled:fit` or `bundled:score`")
        return _Text(key, f"bundled:{part}", f"bundled:{part}", _bundled(part))
    if _looks_like_path(source):
        path = Path(source).expanduser()
        return _Text(key, path.name, str(path.resolve()), _read_file(path, key))
    return _read_hub(source, role)


def _bundled(part: str) -> list[str]:
    documents = bundled_documents()
    score = documents[SCORE_EVERY - 1 :: SCORE_EVERY]
    return score if part == "score" else [text for i, text in enumerate(documents, 1) if i % SCORE_EVERY]


def _looks_like_path(source: str) -> bool:
    """Whether a source is a path and not a hub id, which is `name` or `org/name`."""
    path = Path(source).expanduser()
    return (
        path.exists()
        or path.suffix.lower() in SUFFIXES
        or source.startswith(("/", "./", "../", "~"))
        or "\\" in source
        or len(Path(source.partition(":")[0]).parts) > 2
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _read_file(path: Path, key: str) -> list[str]:
    """The documents of a local file: the whole file if it is plain text, else one per row. Raises UserError."""
    if not path.is_file():
        missing = "does not exist: give an existing file, `bundled`, or a hub id"
        raise UserError(f"{key}: file {path} {'is a folder: name a file in it' if path.is_dir() else missing}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{key}: file {path} has an unknown ending: use one of {' '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return _read_parquet(path, key)
        return _read_jsonl(path, key) if suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise UserError(f"{key}: can't read {path} ({error.strerror or error}): give another file") from error


def _read_parquet(path: Path, key: str) -> list[str]:
    from pyarrow import ArrowInvalid, parquet, types

    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise UserError(f"{key}: {path} is not a parquet file: give another file") from error
    columns = file.schema_arrow
    strings = [each.name for each in columns if types.is_string(each.type) or types.is_large_string(each.type)]
    column = _text_column(strings, path.name, key)
    return [row for row in file.read([column])[column].to_pylist() if row is not None]


def _read_jsonl(path: Path, key: str) -> list[str]:
    documents = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{key}: {path} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON ({error.msg}): fix it or give another file") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"{where} has no string `text`: every line needs one")
            documents.append(row["text"])
    return documents


def _text_column(strings: list[str], name: str, key: str) -> str:
    """The column `text`, or the only column of strings. Raises UserError if there is neither."""
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UserError(
            f"{key}: {name} has no column `text` but {len(strings)} columns of strings {strings}: rename one to `text`"
        )
    return strings[0]


def _read_hub(source: str, role: str) -> _Text:
    """A dataset of the hub or in its cache. Raises UserError if it can't be loaded; within 5 s if offline."""
    key, parts = f"data.{role}", source.split(":")
    if len(parts) > 3:
        raise UserError(f"{key}: `{source}` has too many parts: a hub id is `name[:config[:split]]`")
    name, config, split = parts + [""] * (3 - len(parts))
    split = split or {"fit": "train", "score": "test"}[role]
    reachable = hub_reachable()
    import datasets

    try:
        with hub_offline(not reachable):
            rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        remedy = f"or use {key}=path/to/file.txt"
        if reachable:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"{key}: can't load `{source}` from the hub: {reason}: correct the id, {remedy}") from error
        raise UserError(f"{key}: can't reach the hub, and `{source}` is not in its cache: connect, {remedy}") from error
    types = {column: getattr(feature, "dtype", None) for column, feature in rows.features.items()}
    strings = [column for column, dtype in types.items() if dtype in ("string", "large_string")]
    documents = [row for row in rows[_text_column(strings, source, key)] if row is not None]
    full_name = f"{name}:{config}:{split}"
    return _Text(key, full_name, full_name, documents)


def split_windows(cfg: Config, fit: Windows, scored: Windows) -> tuple[Windows, Windows, Windows]:
    """Windows to fit on, to monitor on and to score. The monitor takes the last windows of the fit text.

    Raises UserError if no window is left to fit on.
    """
    count = len(fit.tokens) - cfg.monitor.windows
    if count < 1:
        raise UserError(
            f"data.fit: {fit.source} has {len(fit.tokens)} windows and monitor.windows={cfg.monitor.windows} "
            "leaves none to fit; give more text"
        )
    return *fit.split(count), scored
