"""Text → token windows: reads a source, checks that fit and score text do not overlap, tokenises, cuts.

A source is `bundled`, a local file, a folder that `save_to_disk` of `datasets` wrote, or a dataset of the Hugging Face
hub (`name[:config[:split]]`). The fit text may be several sources separated by commas.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apc.config.schema import Config, DataConfig
from apc.data.bundled import bundled_documents
from apc.data.overlap import WORDS, Sequences, sample, shared
from apc.utils.errors import UserError, first_line
from apc.utils.hub import hub_offline, hub_reachable

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import Schema
    from transformers import PreTrainedTokenizerBase

PLAIN_SUFFIXES = (".txt", ".raw", ".tokens", ".md")
SUFFIXES = (*PLAIN_SUFFIXES, ".parquet", ".jsonl", ".arrow")
SPLITS = {"fit": "train", "score": "test"}  # of a dataset, unless the source names one
SCORE_EVERY = 5  # every fifth bundled article is score text
# Share of the score text's 8-word sequences that may also be in the fit text. Held-out texts share some: the bundled
# ones 0.2 %; test splits with their training splits, in per cent: WikiText-2 0.7, Penn Treebank 2.7, WikiText-103 9.1,
# One Billion Words 13.2 (Radford et al., "Language models are unsupervised multitask learners", 2019, table 6).
SHARED_LIMIT = 0.15
REMEDY = "choose other text, or set data.in_sample=true to score on fitted text"


@dataclass(frozen=True)
class Windows:
    """Token windows of one source.

    tokens: int64 [n, seq_len]; source: its name without folders; documents: number of documents in it; digest: sha256
    of token ids and seq_len alone; bos: the BOS token that every window begins with, or None; sequences: for a fit
    text, a sample of its word sequences; overlap: for a score text, the share of its sequences that the fit text has.
    """

    tokens: torch.Tensor
    source: str
    documents: int
    digest: str
    bos: str | None = None
    sequences: Sequences | None = None
    overlap: float | None = None

    def split(self, count: int) -> tuple["Windows", "Windows"]:
        """The first `count` windows, and the rest, which may be empty."""
        parts = self.tokens[:count], self.tokens[count:]
        first, rest = (replace(self, tokens=tokens, digest=_digest(tokens)) for tokens in parts)
        return first, rest


@dataclass(frozen=True)
class Text:
    """A source that has been read."""

    key: str  # the config key that names it
    name: str  # for the user, without folders
    identity: str  # equal for equal sources
    documents: list[str]
    sequences: Sequences | None = None  # of a fit text
    overlap: float | None = None  # of a score text

    @property
    def joined(self) -> str:
        """The documents with blank lines between them, without byte order marks."""
        return "\n\n".join(document.removeprefix("\ufeff") for document in self.documents)


def load_windows(cfg: DataConfig, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> tuple[Windows, Windows]:
    """Windows of the fit text and of the score text. Raises UserError as `read_texts` and `cut_windows` do."""
    fit, score = read_texts(cfg)
    return cut_windows(cfg, fit, tokenizer, model_type), cut_windows(cfg, score, tokenizer, model_type)


def read_texts(cfg: DataConfig) -> tuple[Text, Text]:
    """The fit text and the score text. Needs no model, so errors show before one is loaded.

    Raises UserError if a source can't be read, or if fit and score text overlap.
    """
    fit, score = _read_role(cfg, "fit"), _read_role(cfg, "score")
    if not cfg.in_sample and (score.identity in fit.identity.split(",") or fit.joined == score.joined):
        raise UserError(f"data.fit and data.score are the same text ({score.name}): {REMEDY}")
    sequences = sample(fit.joined)
    return replace(fit, sequences=sequences), _compared(cfg, score, sequences, fit.name)


def read_score(cfg: DataConfig, sequences: Sequences, fit: str) -> Text:
    """The score text alone. sequences, fit: the fit text's sequences and its name. Raises as `read_texts` does."""
    return _compared(cfg, _read_role(cfg, "score"), sequences, fit)


def cut_windows(cfg: DataConfig, text: Text, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> Windows:
    """Adjacent windows from the start of a text; drops a tail shorter than a window.

    model_type: from the model's configuration. Raises UserError if the text is too short for the windows wanted, or
    windows need a BOS token and the tokenizer has none.
    """
    seq_len, limit = cfg.seq_len, getattr(cfg, f"{text.key}_windows".removeprefix("data."))
    bos = _bos(cfg, tokenizer, model_type)
    room = seq_len if bos is None else seq_len - 1
    # verbose=False: no warning that the text is longer than the model's context, since it is cut into windows.
    ids = torch.tensor(tokenizer(text.joined, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(ids) // room
    if not available:
        raise UserError(
            f"{text.key}: {text.name} has {len(ids)} tokens, one window needs {room}: "
            "lower data.seq_len or give more text"
        )
    if limit is not None and limit > available:
        raise UserError(
            f"{text.key}_windows={limit}, but {text.name} has {available} windows of {seq_len} tokens: "
            "lower it, or set it to null"
        )
    tokens = ids[: (limit or available) * room].view(-1, room)
    if bos is not None:
        tokens = torch.cat([torch.full_like(tokens[:, :1], tokenizer.bos_token_id), tokens], dim=1)
    return Windows(tokens, text.name, len(text.documents), _digest(tokens), bos, text.sequences, text.overlap)


def _bos(cfg: DataConfig, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> str | None:
    """The token that windows begin with. `auto` follows lm-evaluation-harness: BOS for Gemma models only."""
    if cfg.bos == "false" or (cfg.bos == "auto" and "gemma" not in model_type):
        return None
    if cfg.bos == "true" and tokenizer.bos_token is None:
        raise UserError("data.bos=true: the model's tokenizer has no BOS token; set data.bos=false")
    return tokenizer.bos_token


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer by itself begins a text with its BOS token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def check_positions(cfg: DataConfig, config: Any) -> None:
    """Raises UserError if windows are longer than the model's context. config: the model's, from transformers."""
    inner = config.get_text_config()
    positions = getattr(inner, "max_position_embeddings", None)
    factor = (getattr(inner, "rope_parameters", None) or {}).get("factor") or 1  # some give positions before scaling
    if positions and cfg.seq_len > positions * factor:
        raise UserError(
            f"data.seq_len={cfg.seq_len}: the model has {positions} positions (max_position_embeddings); "
            f"set data.seq_len={positions} or less"
        )


def on_hub(cfg: DataConfig, role: str) -> bool:
    """Whether any source of the `fit` or `score` text is a dataset of the hub: neither bundled nor a local file."""
    return any(source.partition(":")[0] != "bundled" and not _looks_like_path(source) for source in _sources(cfg, role))


def count_windows(cfg: DataConfig, role: str, tokenizer: "PreTrainedTokenizerBase", model_type: str) -> int:
    """Number of windows in the `fit` or `score` text. Raises UserError as `cut_windows` does."""
    return len(cut_windows(cfg, _read_role(cfg, role), tokenizer, model_type).tokens)


def _digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(f"{tokens.shape[1]}:".encode() + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def _compared(cfg: DataConfig, score: Text, fit: Sequences, fit_name: str) -> Text:
    """The score text with its overlap. Raises UserError if that exceeds SHARED_LIMIT, unless data.in_sample."""
    share = shared(sample(score.joined), fit)
    if share > SHARED_LIMIT and not cfg.in_sample:
        raise UserError(
            f"data.score ({score.name}) shares {share:.0%} of its sequences of {WORDS} words with data.fit "
            f"({fit_name}), at most {SHARED_LIMIT:.0%} are allowed: {REMEDY}"
        )
    return replace(score, overlap=share)


def _sources(cfg: DataConfig, role: str) -> list[str]:
    source = getattr(cfg, role)
    if role == "score" or Path(source).expanduser().exists():
        return [source]
    return [part.strip() for part in source.split(",")]


def _read_role(cfg: DataConfig, role: str) -> Text:
    """The text that `data.fit` or `data.score` names, its sources concatenated."""
    texts = [_read(source, role) for source in _sources(cfg, role)]
    if len(texts) == 1:
        return texts[0]
    name, identity = " + ".join(text.name for text in texts), ",".join(text.identity for text in texts)
    return Text(texts[0].key, name, identity, [document for text in texts for document in text.documents])


def _read(source: str, role: str) -> Text:
    key = f"data.{role}"
    name, _, part = source.partition(":")
    if name == "bundled":
        part = part or role
        if part not in ("fit", "score"):
            raise UserError(f"{key}: no bundled text `{part}`: use `bundled`, `bundled:fit` or `bundled:score`")
        return Text(key, f"bundled:{part}", f"bundled:{part}", _bundled(part))
    if _looks_like_path(source):
        path = Path(source).expanduser()
        if (path / "dataset_dict.json").is_file():
            path = _split_folder(path, role)
        return Text(key, path.name, str(path.resolve()), _read_file(path, key))
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


def _split_folder(path: Path, role: str) -> Path:
    """The folder of the `train` or `test` split in a folder that `save_to_disk` of a DatasetDict wrote."""
    if (path / SPLITS[role] / "state.json").is_file():
        return path / SPLITS[role]
    splits = sorted(each.parent.name for each in path.glob("*/state.json"))
    raise UserError(
        f"data.{role}: {path} has no split {SPLITS[role]}, only {', '.join(splits) or 'none'}: name a split's folder"
    )


def _read_file(path: Path, key: str) -> list[str]:
    """The documents of a file or a saved dataset: a plain-text file is one, else each row is one. Raises UserError."""
    suffix = path.suffix.lower()
    try:
        if (path / "state.json").is_file():
            return _read_saved(path, key)
        if not path.is_file():
            missing = "does not exist: give an existing file, `bundled`, or a hub id"
            raise UserError(f"{key}: file {path} {'is a folder: name a file in it' if path.is_dir() else missing}")
        if suffix not in SUFFIXES:
            raise UserError(f"{key}: file {path} has an unknown ending: use one of {' '.join(SUFFIXES)}")
        if suffix in (".parquet", ".arrow"):
            return _read_table(path, key)
        return _read_jsonl(path, key) if suffix == ".jsonl" else [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise UserError(
            f"{key}: can't read {path} ({error.strerror or first_line(error)}): give another file"
        ) from error


def _read_table(path: Path, key: str) -> list[str]:
    """The rows of a .parquet or an .arrow file, which may be an IPC file or a stream."""
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            column = _text_column(_string_columns(file.schema_arrow), path.name, key)
            return _strings(file.read([column])[column].to_pylist())
        with pyarrow.memory_map(str(path)) as mapped:
            try:
                table = ipc.open_file(mapped).read_all()
            except pyarrow.ArrowInvalid:
                mapped.seek(0)
                table = ipc.open_stream(mapped).read_all()
            return _strings(table[_text_column(_string_columns(table.schema), path.name, key)].to_pylist())
    except UnicodeDecodeError:
        raise
    except (pyarrow.ArrowException, ValueError, KeyError) as error:
        kind = "a parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
        raise UserError(
            f"{key}: {path} is not {kind} file, or damaged ({first_line(error)}): give another file"
        ) from error


def _read_saved(path: Path, key: str) -> list[str]:
    """The rows of a folder that `save_to_disk` of a Dataset wrote."""
    import datasets

    try:
        return _rows(datasets.load_from_disk(str(path)), path.name, key)
    except (ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{key}: {path}: can't be loaded ({first_line(error)}): save the dataset again") from error


def _string_columns(schema: "Schema") -> list[str]:
    """Names of the columns of strings, including dictionary-encoded ones."""
    from pyarrow import types

    plain = (types.is_string, types.is_large_string, types.is_string_view)
    stored = {each.name: each.type.value_type if types.is_dictionary(each.type) else each.type for each in schema}
    return [name for name, kind in stored.items() if any(is_kind(kind) for is_kind in plain)]


def _read_jsonl(path: Path, key: str) -> list[str]:
    documents = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{key}: {path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = getattr(error, "msg", None) or first_line(error)
                raise UserError(f"{where} can't be read as JSON ({reason}): fix it or give another file") from error
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise UserError(f"{where} has no string `text`: every line needs one")
            try:
                row["text"].encode()
            except UnicodeEncodeError as error:
                half = ascii(row["text"][error.start])[1:-1]
                raise UserError(f"{where} has half a character ({half}, a single surrogate): remove it") from error
            documents.append(row["text"])
    return documents


def _strings(rows: Iterable[str | None]) -> list[str]:
    return [row for row in rows if row is not None]


def _rows(dataset: "Dataset", name: str, key: str) -> list[str]:
    types = {column: getattr(feature, "dtype", None) for column, feature in dataset.features.items()}
    strings = [column for column, dtype in types.items() if dtype in ("string", "large_string", "string_view")]
    return _strings(dataset[_text_column(strings, name, key)])


def _text_column(strings: list[str], name: str, key: str) -> str:
    """The column `text`, or the only column of strings. Raises UserError if there is neither."""
    if "text" in strings:
        return "text"
    if len(strings) != 1:
        raise UserError(
            f"{key}: {name} has no column `text` but {len(strings)} columns of strings {strings}: rename one to `text`"
        )
    return strings[0]


def _read_hub(source: str, role: str) -> Text:
    """A dataset of the hub or in its cache. Raises UserError if it can't be loaded; within 5 s if offline."""
    key, parts = f"data.{role}", source.split(":")
    if len(parts) > 3:
        raise UserError(f"{key}: `{source}` has too many parts: a hub id is `name[:config[:split]]`")
    name, config, split = parts + [""] * (3 - len(parts))
    split = split or SPLITS[role]
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
    full_name = f"{name}:{config}:{split}"
    return Text(key, full_name, full_name, _rows(rows, source, key))


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
