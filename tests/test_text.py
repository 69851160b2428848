"""Text → windows: all sources read alike, windows tile the tokens, and score text must not overlap the fit text."""

import json
import random
import time
from functools import partial

import numpy as np
import pytest
import torch

import tiny
from apc.config.load import load_config
from apc.config.schema import DataConfig
from apc.data import overlap, text
from apc.utils import hub
from apc.utils.errors import UserError

WORDS = [f"w{i}" for i in range(97)]
load_windows = partial(text.load_windows, model_type="llama")


@pytest.fixture(scope="module")
def tokenizer():
    """One token per word. Its context of 8 and its BOS token must not affect the windows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[BOS]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]", model_max_length=8)


def _words(count: int, start: int = 0, step: int = 1) -> str:
    return " ".join(WORDS[(start + i * step) % len(WORDS)] for i in range(count))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two texts in the working directory that share no paragraph: fit.txt with 50 words and score.txt with 35."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fit.txt").write_text(_words(50))
    (tmp_path / "score.txt").write_text(_words(35, start=3, step=5))
    return tmp_path


def _config(**changes) -> DataConfig:
    return DataConfig(**{"fit": "fit.txt", "score": "score.txt", "seq_len": 8} | changes)


def test_windows_tile_the_text_without_bos_and_drop_the_tail(files, tokenizer, caplog):
    fit, score = load_windows(_config(), tokenizer)
    ids = [WORDS.index(word) + 2 for word in _words(50).split()]
    assert fit.tokens.dtype == torch.int64 and fit.tokens.tolist() == [ids[i : i + 8] for i in range(0, 48, 8)]
    assert score.tokens.shape == (4, 8)
    assert (fit.source, score.source, fit.documents) == ("fit.txt", "score.txt", 1)
    assert not caplog.records, "no warning about the model's context"


def test_fit_windows_and_score_windows_take_the_first(files, tokenizer):
    everything, _ = load_windows(_config(), tokenizer)
    fit, score = load_windows(_config(fit_windows=2, score_windows=4), tokenizer)
    assert torch.equal(fit.tokens, everything.tokens[:2]) and len(score.tokens) == 4


def test_windows_with_bos_begin_with_it_and_have_each_token_of_the_text_once(files, tokenizer):
    plain = load_windows(_config(seq_len=7), tokenizer)[0]
    for bos, model_type in (("true", "llama"), ("auto", "gemma3_text"), ("auto", "gemma")):
        fit, score = load_windows(_config(bos=bos), tokenizer, model_type=model_type)
        assert (fit.tokens[:, 0] == 1).all() and torch.equal(fit.tokens[:, 1:], plain.tokens)
        assert fit.tokens.shape == (7, 8) and fit.bos == score.bos == "[BOS]" and fit.digest != plain.digest
        assert text.count_windows(_config(bos=bos), "fit", tokenizer, model_type) == 7
    assert load_windows(_config(seq_len=2, bos="true"), tokenizer)[0].tokens.shape == (50, 2)
    for bos, model_type in (("false", "gemma3_text"), ("auto", "llama")):
        fit = load_windows(_config(bos=bos), tokenizer, model_type=model_type)[0]
        assert fit.bos is None and torch.equal(fit.tokens.flatten(), plain.tokens.flatten()[:48])


def test_bos_without_a_bos_token_is_an_error(files, tokenizer):
    assert text.adds_bos(tokenizer)
    without = tiny.make_tokenizer()
    assert not text.adds_bos(without)
    with pytest.raises(UserError, match="^data.bos=true: the model's tokenizer has no BOS token; set data.bos=false$"):
        load_windows(_config(bos="true"), without)
    assert load_windows(_config(), without, model_type="gemma")[0].bos is None
    with pytest.raises(UserError, match="data.bos=maybe: choose auto, true or false"):
        _config(bos="maybe")
    for word in ("data.bos=true", "data.bos=True"):
        assert load_config(None, [word]).data.bos == "true"


def test_too_many_windows_is_an_error_that_names_their_number(files, tokenizer):
    with pytest.raises(UserError, match="data.score_windows=5, but score.txt has 4 windows of 8 tokens"):
        load_windows(_config(score_windows=5), tokenizer)


def test_a_text_shorter_than_a_window_is_an_error(files, tokenizer):
    with pytest.raises(UserError, match="data.score: score.txt has 35 tokens, one window needs 36: lower data.seq_len"):
        load_windows(_config(seq_len=36), tokenizer)


def test_digest_follows_tokens_and_length_but_not_the_path(files, tokenizer):
    digest = load_windows(_config(), tokenizer)[0].digest
    (files / "elsewhere").mkdir()
    (files / "elsewhere" / "copy.md").write_text(_words(50))
    assert load_windows(_config(fit="elsewhere/copy.md"), tokenizer)[0].digest == digest
    (files / "tail.txt").write_text(_words(49))
    assert load_windows(_config(fit="tail.txt"), tokenizer)[0].digest == digest, "tokens outside windows do not count"
    assert load_windows(_config(fit_windows=5), tokenizer)[0].digest != digest
    one_row, two_rows = torch.arange(16).view(1, 16), torch.arange(16).view(2, 8)
    assert text._digest(one_row) != text._digest(two_rows), "same ids, other seq_len"
    (files / "fit.txt").write_text(_words(50, step=2))
    assert load_windows(_config(), tokenizer)[0].digest != digest


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seq_len": 1}, "data.seq_len must be at least 2, got 1"),
        ({"fit_windows": 0}, "data.fit_windows must be at least 1, or null for all, got 0"),
        ({"score_windows": -1}, "data.score_windows must be at least 1, or null for all, got -1"),
        ({"score": ""}, "data.score is empty"),
    ],
    ids=["seq_len", "fit_windows", "score_windows", "score"],
)
def test_a_bad_value_names_its_key(values, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**values)


def test_validation_works_through_omegaconf():
    from omegaconf import OmegaConf

    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.from_dotlist(["seq_len=1"]))
    with pytest.raises(UserError, match="data.seq_len"):
        OmegaConf.to_object(merged)


def test_rows_of_parquet_and_jsonl_are_joined_by_blank_lines(files, tokenizer):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [_words(9), "", _words(20, start=40)]
    parquet.write_table(pa.table({"text": rows, "title": ["a", "b", "c"]}), files / "named.parquet")
    parquet.write_table(pa.table({"content": [*rows, None], "id": [1, 2, 3, 4]}), files / "only.parquet")
    (files / "rows.jsonl").write_text("\n".join(json.dumps({"text": row, "id": 1}) for row in rows) + "\n\n")
    (files / "plain.tokens").write_text("\n\n".join(rows))
    names = ["named.parquet", "only.parquet", "rows.jsonl", "plain.tokens"]
    read = [load_windows(_config(fit=name), tokenizer)[0] for name in names]
    assert len({windows.digest for windows in read}) == 1
    assert [windows.documents for windows in read] == [3, 3, 3, 1]
    assert text._read("rows.jsonl", "fit").joined == "\n\n".join(rows)


def test_columns_of_every_string_type_and_arrow_files_and_saved_datasets_are_read(files):
    import datasets
    import pyarrow as pa
    from pyarrow import ipc, parquet

    rows = ["one two", None, "three"]
    types = {
        "dictionary": pa.dictionary(pa.int32(), pa.string()),
        "large": pa.dictionary(pa.int8(), pa.large_string()),
        "view": pa.string_view(),
    }
    for name, kind in types.items():
        parquet.write_table(pa.table({"text": pa.array(rows).cast(kind), "n": [1, 2, 3]}), files / f"{name}.parquet")
    table = pa.table({"body": rows})
    with ipc.new_file(str(files / "file.arrow"), table.schema) as writer:
        writer.write_table(table)
    with ipc.new_stream(str(files / "stream.arrow"), table.schema) as writer:
        writer.write_table(table)
    saved = datasets.Dataset.from_dict({"text": rows, "n": [1, 2, 3]})
    saved.save_to_disk(files / "saved")
    saved.select([2, 0]).save_to_disk(files / "selected")
    other = datasets.Dataset.from_dict({"text": ["four"]})
    datasets.DatasetDict(train=saved, test=other).save_to_disk(files / "splits")
    datasets.DatasetDict(validation=other).save_to_disk(files / "no-train")
    for name in ("dictionary.parquet", "large.parquet", "view.parquet", "file.arrow", "stream.arrow", "saved"):
        assert text._read(name, "fit").documents == ["one two", "three"], name
    assert text._read("selected", "fit").documents == ["three", "one two"]
    assert text._read("splits", "fit").documents == ["one two", "three"]
    assert text._read("splits", "score").documents == ["four"] == text._read("splits/test", "fit").documents
    assert text._read("splits", "fit").identity != text._read("splits", "score").identity
    with pytest.raises(UserError, match="data.fit: no-train has no split train, only validation: name a"):
        text._read("no-train", "fit")


def test_a_byte_order_mark_is_no_text(files):
    (files / "bom.txt").write_text("one", encoding="utf-8-sig")
    (files / "bom.jsonl").write_text('{"text": "\\ufeffone"}\n', encoding="utf-8-sig")
    assert text._read("bom.txt", "fit").joined == text._read("bom.jsonl", "fit").joined == "one"


def test_unreadable_files_are_named(files, tokenizer):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"a": ["x"], "b": ["y"]}), files / "two.parquet")
    parquet.write_table(pa.table({"text": ["some text"] * 3}), files / "cut.parquet")
    (files / "bad.parquet").write_bytes(b"no parquet")
    (files / "bad.jsonl").write_text('{"text": "x"}\n{"text": 1}\n')
    (files / "surrogate.jsonl").write_text('{"text": "\\ud83d\\ude00"}\n{"text": "a \\ud83d b"}\n')
    (files / "deep.jsonl").write_text('{"text": "a"}\n\n{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (files / "digits.jsonl").write_text('{"text": "a", "x": ' + "1" * 5000 + "}\n")
    whole = (files / "cut.parquet").read_bytes()
    (files / "cut.parquet").write_bytes(whole[:4] + bytes(40) + whole[44:])
    (files / "bad.arrow").write_bytes(b"no arrow")
    (files / "broken").mkdir()
    (files / "broken" / "state.json").write_text("{}")
    (files / "broken.jsonl").write_text('{"text"\n')
    (files / "latin.txt").write_bytes(b"caf\xe9")
    (files / "page.pdf").write_bytes(b"")
    (files / "folder").mkdir()
    for name, message in {
        "surrogate.jsonl": r"line 2 has half a character .\\ud83d, a single surrogate.: remove it",
        "deep.jsonl": r"line 3 can't be read as JSON .maximum recursion depth exceeded",
        "digits.jsonl": r"line 1 can't be read as JSON .Exceeds the limit",
        "bad.arrow": "not an Arrow file, or damaged",
        "broken": "Directory broken is neither a .Dataset. directory",
        "two.parquet": "no column `text` but 2 columns of strings",
        "bad.parquet": "not a parquet file",
        "bad.jsonl": "line 2 has no string `text`",
        "broken.jsonl": "line 1 can't be read as JSON",
        "latin.txt": "not UTF-8 text .byte 3.",
        "page.pdf": "unknown ending",
        "folder": "is a folder",
    }.items():
        with pytest.raises(UserError, match=f"data.fit: .*{name}.*{message}") as caught:
            load_windows(_config(fit=name), tokenizer)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^data.fit: can't read cut.parquet \(.*\): give another file$"):
        load_windows(_config(fit="cut.parquet"), tokenizer)


@pytest.mark.parametrize("missing", ["absent.txt", "./absent", "/no/such/file", "~/absent/x", "here/absent", "a/b/c"])
def test_a_missing_file_is_not_taken_for_a_hub_id(files, tokenizer, missing):
    (files / "here").mkdir()
    with pytest.raises(UserError, match="data.score: file .* does not exist"):
        load_windows(_config(score=missing), tokenizer)


@pytest.mark.parametrize("hub_id", ["imdb", "Salesforce/wikitext:wikitext-2-raw-v1:test", "org/name-v1.5", "org/x:a/b"])
def test_a_hub_id_is_not_taken_for_a_file(files, hub_id):
    assert not text._looks_like_path(hub_id)


LONG = [_words(60, start=i, step=i + 1) for i in range(30)]  # each over 200 characters


def _write(path, paragraphs):
    path.write_text("\n".join(paragraphs))


def test_the_same_text_is_an_error_unless_in_sample(files, tokenizer):
    (files / "copy.txt").write_text(_words(50))
    for score in ("fit.txt", "./fit.txt", "copy.txt"):
        with pytest.raises(UserError, match="data.fit and data.score are the same text .*data.in_sample=true"):
            load_windows(_config(score=score), tokenizer)
    fit, score = load_windows(_config(score="fit.txt", in_sample=True), tokenizer)
    assert fit.digest == score.digest


def test_shared_text_is_an_error_that_states_its_share(files, tokenizer):
    _write(files / "fit.txt", LONG[:20])
    _write(files / "score.txt", [LONG[25], f"  {LONG[3]}\t", LONG[26], LONG[4]])
    with pytest.raises(
        UserError,
        match="^data.score .score.txt. shares 5.% of its sequences of 8 words with data.fit .fit.txt., "
        "at most 15% are allowed: choose other text, or set data.in_sample=true",
    ):
        load_windows(_config(), tokenizer)
    assert 0.45 < load_windows(_config(in_sample=True), tokenizer)[1].overlap < 0.55


def _rewrapped(paragraphs: list[str], words: int) -> str:
    flat = " ".join(paragraphs).split()
    return "\n".join(" ".join(flat[i : i + words]) for i in range(0, len(flat), words))


def _sentences(count: int, words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(count)]


FITTED, OTHER = _sentences(200, 10, seed=1), _sentences(200, 10, seed=2)
SHORT, OTHER_SHORT = _sentences(400, 5, seed=6), _sentences(400, 5, seed=7)
DRAW = random.Random(5)
CHINESE = ["".join(chr(DRAW.randrange(0x4E00, 0x5A00)) for _ in range(40)) for _ in range(60)]


@pytest.mark.parametrize(
    "fit, score, share",
    [
        ("\n".join(FITTED), "\n".join(FITTED[100:150]), 1.0),
        ("\n\n".join(FITTED), "\n".join(FITTED[199:100:-1]), 1.0),
        (" ".join(FITTED), "\n".join(FITTED[50:90]), 1.0),
        ("\n".join(FITTED), " ".join(FITTED[50:90]), 1.0),
        (_rewrapped(FITTED, 12), _rewrapped(FITTED[20:90], 5), 1.0),
        ("\n".join(FITTED), "\n".join(FITTED[40:90]).upper().replace(" ", ",  «") + "!", 1.0),
        ("\n".join(FITTED), "\n".join([*OTHER[:90], *FITTED[:10], *OTHER[90:180], *FITTED[100:110]]), 0.1),
        ("\n".join(FITTED), "\n".join(OTHER), 0.0),
        ("\n".join(SHORT), "\n".join(SHORT[300:20:-3]), 1.0),
        ("\n".join(SHORT), "\n".join([*OTHER_SHORT[:270], *SHORT[300:240:-2]]), 0.1),
        ("\n".join(SHORT), "\n".join(OTHER_SHORT), 0.0),
        ("\n".join(CHINESE), "\n".join(CHINESE[9:2:-1]), 1.0),
        ("\n".join(CHINESE), "".join(CHINESE[3:20]), 1.0),
        ("\n".join(CHINESE[:30]), "\n".join(CHINESE[30:]), 0.0),
    ],
    ids=[
        *("short-lines", "shuffled-lines", "pieces-of-one-line", "one-line-of-pieces", "rewrapped", "case-and-marks"),
        *("a-tenth", "other-text", "short-documents", "a-tenth-of-short-documents", "other-short-documents"),
        *("chinese-shuffled", "chinese-one-line", "other-chinese"),
    ],
)
def test_the_overlap_is_the_share_of_the_score_text_in_the_fit_text(files, fit, score, share):
    (files / "fit.txt").write_text(fit)
    (files / "score.txt").write_text(score)
    (files / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in score.splitlines()))
    for name in ("score.txt", "rows.jsonl"):
        assert text.read_texts(_config(score=name, in_sample=True))[1].overlap == pytest.approx(share, abs=0.02)
        if share > 0.15:
            with pytest.raises(UserError, match="data.score .* shares .*% of its sequences of 8 words"):
                text.read_texts(_config(score=name))
        else:
            text.read_texts(_config(score=name))


def test_the_overlap_of_long_texts_is_that_of_samples_of_bounded_size(monkeypatch):
    fit, score = " ".join(_sentences(4000, 10, seed=3)), " ".join(_sentences(4000, 10, seed=4))
    score += fit[len(fit) // 2 :]
    whole = [overlap.sample(text) for text in (score, fit)]
    monkeypatch.setattr(overlap, "SAMPLE", 2000)
    monkeypatch.setattr(overlap, "_CHUNK", 1000)
    parts = [overlap.sample(text) for text in (score, fit)]
    for part, every in zip(parts, whole, strict=True):
        assert np.array_equal(part.hashes, every.hashes[:2000]), "the same in chunks"
    assert overlap.shared(*whole) == pytest.approx(1 / 3, abs=0.001)
    assert overlap.shared(*parts) == pytest.approx(1 / 3, abs=0.04)


def test_sequences_and_short_lines_are_the_same_in_chunks(monkeypatch):
    draw = random.Random(8)
    lines = [" ".join(draw.choice(WORDS) for _ in range(draw.randrange(13))) for _ in range(600)]
    whole = overlap.sample("\n".join(lines))
    assert whole.short.sum() == len({line for line in lines if 4 <= len(line.split()) < 8})
    for size in (97, 200, 1001):
        monkeypatch.setattr(overlap, "_CHUNK", size)
        parts = overlap.sample("\n".join(lines))
        assert np.array_equal(parts.hashes, whole.hashes) and np.array_equal(parts.short, whole.short)


def test_a_little_shared_text_and_short_lines_are_allowed(files, tokenizer):
    _write(files / "fit.txt", [LONG[0], "See also", _words(20)])
    _write(files / "score.txt", [LONG[0], "See also", _words(20)] + [_words(97, start=i, step=i) for i in range(2, 96)])
    shared = len(LONG[0]) / (files / "score.txt").stat().st_size
    assert 0.005 < shared < 0.01
    load_windows(_config(), tokenizer)


def test_bundled_fit_and_score_are_separate_articles(monkeypatch, tokenizer):
    articles = [_words(60, start=i, step=i + 1) for i in range(11)]
    monkeypatch.setattr(text, "bundled_documents", lambda: articles)
    fit, score = load_windows(DataConfig(seq_len=8), tokenizer)
    assert (fit.source, score.source, fit.documents, score.documents) == ("bundled:fit", "bundled:score", 9, 2)
    assert sorted(text._bundled("fit") + text._bundled("score")) == sorted(articles)
    swapped = load_windows(DataConfig("bundled:score", "bundled:fit", seq_len=8), tokenizer)
    assert [windows.digest for windows in swapped] == [score.digest, fit.digest]
    with pytest.raises(UserError, match="same text .bundled:score."):
        load_windows(DataConfig("bundled:score", "bundled", seq_len=8), tokenizer)
    both = load_windows(DataConfig("bundled:score", "bundled:score", seq_len=8, in_sample=True), tokenizer)
    assert both[0].digest == both[1].digest == score.digest
    with pytest.raises(UserError, match="no bundled text `test`"):
        load_windows(DataConfig("bundled:test", seq_len=8), tokenizer)


def test_real_bundled_text_leaves_enough_tokens_to_score():
    from transformers import AutoTokenizer

    from apc.data.bundled import bundled_model

    fit, score = load_windows(DataConfig(), AutoTokenizer.from_pretrained(bundled_model()))
    assert (fit.documents, score.documents) == (85, 21) and 0 < score.overlap < 0.005
    assert fit.tokens.shape[0] >= 500 and score.tokens.numel() >= 60_000


@pytest.fixture
def closed_hub(monkeypatch, tmp_path):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def test_an_unreachable_hub_is_an_error_within_five_seconds(files, tokenizer, closed_hub):
    before = time.monotonic()
    with pytest.raises(
        UserError, match="data.score: can't reach the hub.*`no-such/set:a:test`.*data.score=path/to/file.txt"
    ):
        load_windows(_config(score="no-such/set:a:test"), tokenizer)
    assert time.monotonic() - before < 5


def test_a_hub_that_never_answers_times_out(monkeypatch):
    import socket

    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        assert hub.hub_reachable(timeout=0.5) is False
        assert time.monotonic() - before < 2


def test_a_name_lookup_that_never_ends_times_out(monkeypatch):
    import socket

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(4))
    before = time.monotonic()
    assert hub.hub_reachable(timeout=0.5) is False
    assert time.monotonic() - before < 2


@pytest.mark.parametrize("status, reachable", [(200, True), (404, True), (503, False)])
def test_a_hub_that_answers_is_reachable_unless_it_is_down(monkeypatch, status, reachable):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from huggingface_hub import constants

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert hub.hub_reachable() is reachable
        server.shutdown()


def test_hub_rows_are_joined_and_config_and_split_are_passed(files, tokenizer, monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split, datasets.config.HF_HUB_OFFLINE))
        return datasets.Dataset.from_dict(
            {"text": [_words(9, step=len(calls)), "", _words(30, step=6 + len(calls))], "n": [1, 2, 3]}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(text, "hub_reachable", lambda: False)
    fit, score = load_windows(_config(fit="org/set", score="org/set:raw:validation"), tokenizer)
    assert calls == [("org/set", None, "train", True), ("org/set", "raw", "validation", True)], (
        "the cache is used if the hub is unreachable"
    )
    assert not datasets.config.HF_HUB_OFFLINE, "offline mode ends"
    assert (fit.source, score.source, fit.documents) == ("org/set::train", "org/set:raw:validation", 3)
    assert text._read("org/set", "score").name == "org/set::test"
    with pytest.raises(UserError, match="same text"):
        load_windows(_config(fit="org/set:raw:test", score="org/set:raw"), tokenizer)


def test_an_error_of_the_hub_is_one_line(files, tokenizer, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(text, "hub_reachable", lambda: True)
    with pytest.raises(
        UserError, match="data.fit: can't load `org/set` from the hub: Config name is missing. Please pick one among"
    ):
        load_windows(_config(fit="org/set"), tokenizer)
    with pytest.raises(UserError, match="too many parts"):
        load_windows(_config(fit="org/set:a:b:c"), tokenizer)


def test_the_fit_text_may_be_several_sources(files, tokenizer):
    (files / "a.txt").write_text(_words(3))
    (files / "b.jsonl").write_text('{"text": "' + _words(2, 3) + '"}\n{"text": "' + _words(1, 5) + '"}\n')
    (files / "c.txt").write_text(_words(4, 9))
    fit, _ = load_windows(DataConfig(f"{files}/a.txt, {files}/b.jsonl", f"{files}/c.txt", seq_len=2), tokenizer)
    (files / "whole.txt").write_text(_words(6))
    whole, _ = load_windows(DataConfig(f"{files}/whole.txt", f"{files}/c.txt", seq_len=2), tokenizer)
    assert torch.equal(fit.tokens, whole.tokens) and fit.source == "a.txt + b.jsonl" and fit.documents == 3
    with pytest.raises(UserError, match="are the same text"):
        load_windows(DataConfig(f"{files}/a.txt,{files}/c.txt", f"{files}/c.txt", seq_len=2), tokenizer)
    with pytest.raises(UserError, match="data.fit is empty"):
        DataConfig(f"{files}/a.txt,")
