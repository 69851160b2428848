"""Runs on windows that begin with a BOS token: the model reads this token and never predicts it."""

import math

import pytest
import torch

import apc
import evaluate
import tiny
import train
from apc.collect.loader import WindowLoader
from apc.config.load import load_config, load_saved
from apc.evaluate.tables import policies_table
from apc.utils.errors import UserError

BOS = tiny.VOCABULARY + 1
RUN = {"policies": "[dense,oracle,predicted]", "tune.max_epochs": 1, "tune.batch_windows": 3, "cluster.max_epochs": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A Gemma 3 model with a BOS token, and two texts."""
    folder = tiny.make_workplace(tmp_path_factory.mktemp("bos"))
    tiny.make_model("gemma3", vocab_size=BOS + 1).save_pretrained(folder / "model")
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tokenizer.save_pretrained(folder / "model")
    return folder


def run(workplace, **changes):
    return train.train(load_config(None, tiny.tiny_overrides(workplace, **(RUN | changes))))


def perplexity(text: list[str], count: int, seq_len: int, bos: bool) -> float:
    """Of the tiny model on the first windows, one token at a time."""
    model = tiny.make_model("gemma3", vocab_size=BOS + 1)
    ids, room, losses = [int(word[1:]) for word in text], seq_len - bos, []
    for window in range(count):
        read = [BOS] * bos + ids[window * room : (window + 1) * room]
        with torch.no_grad():
            scores = model(torch.tensor([read])).logits[0].double().log_softmax(-1)
        losses += [-scores[at, read[at + 1]].item() for at in range(seq_len - 1)]
    assert len(losses) == count * (seq_len - 1)
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("word", "bos"), [("auto", True), ("false", False)])
def test_perplexity_is_that_of_windows_with_the_bos_token(workplace, word, bos):
    results = run(workplace, **{"run.name": f"bos-{word}", "data.bos": word})
    words = (workplace / "score.txt").read_text().split()
    dense = next(record["perplexity"] for record in results["policies"] if record["policy"] == "dense")
    assert dense == pytest.approx(perplexity(words, 4, 32, bos), rel=1e-5)
    assert dense != pytest.approx(perplexity(words, 4, 32, not bos), rel=1e-3)
    conditions = results["conditions"]
    assert conditions["bos"] == ("<bos>" if bos else None) and conditions["tokenizer_adds_bos"] is False
    assert f"windows of 32 · {'BOS' if bos else 'no BOS'}" in policies_table(results, wide=True)
    finished = apc.load_run(workplace / "runs" / f"bos-{word}")
    assert finished.codebook.provenance["bos"] == conditions["bos"]
    again = evaluate.evaluate(evaluate.config_of_run(None, [f"checkpoint={finished.folder.path}"]))
    assert [each["perplexity"] for each in again["policies"]] == [each["perplexity"] for each in results["policies"]]
    with pytest.raises(UserError, match=f"data.bos: the run was fitted with {word}, evaluate.py can't change that"):
        evaluate.config_of_run(None, [f"checkpoint={finished.folder.path}", "data.bos=true"])


def test_bos_and_no_bos_are_other_patterns(workplace):
    text = {
        key: apc.load_run(workplace / "runs" / f"bos-{key}").codebook.provenance["patterns"]
        for key in ("auto", "false")
    }
    assert text["auto"]["text"] != text["false"]["text"] and text["auto"]["weights"] == text["false"]["weights"]
    with pytest.raises(UserError, match="made from other patterns .fit text or windows differ."):
        run(workplace, **{"run.name": "import", "data.bos": "false", "checkpoint": workplace / "runs" / "bos-auto"})


def test_a_configuration_of_version_0_1_has_no_bos(workplace, tmp_path):
    saved = (workplace / "runs" / "bos-auto" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(saved.replace("  bos: auto\n", ""))
    assert load_saved(tmp_path / "config.yaml").data.bos == "false"
    assert load_saved(workplace / "runs" / "bos-auto" / "config.yaml").data.bos == "auto"


def test_windows_at_every_offset_begin_with_the_bos_token():
    text = torch.arange(8 * 4).view(8, 4)
    loader = WindowLoader(torch.cat([torch.full((8, 1), 99), text], dim=1), 3, seed=4, bos=True)
    offsets = set()
    for _ in range(12):
        windows = torch.cat(list(loader))
        assert windows.shape == (6, 5) and (windows[:, 0] == 99).all()
        assert (windows[:, 2:] == windows[:, 1:2] + torch.arange(1, 4)).all(), "tokens that follow each other"
        assert windows[:, 1:].unique().numel() == 24 and int(windows[:, 1:].max()) < 32
        offsets.add(int(windows[0, 1]) % 4)
    assert offsets == {0, 1, 2, 3}
