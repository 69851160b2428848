"""After a crash at any moment files are whole or absent, and a run resumes to the same result.

The tests would notice a missing flush.
"""

import json

import crash
import pytest
import torch
from test_store import run_collect

import tiny
import train
from apc import load_run
from apc.collect import store
from apc.collect.store import PatternStore
from apc.config.load import load_config
from apc.utils import files
from apc.utils.errors import UserError
from apc.utils.files import write_atomic


def check_write(folder, **options):
    (folder / "a.json").write_bytes(b"old")
    with crash.watched(folder, **options) as disk:
        write_atomic(folder / "a.json", b"new and longer")
    assert len(disk.images) >= 2 and all(image["a.json"] in (b"old", b"new and longer") for image in disk.images)
    after = [disk._all_names(), disk._flushed_names(folder.stat().st_ino, "")]  # a crash after the call returned
    assert all(image["a.json"] == b"new and longer" for image in after)


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    check_write(tmp_path)


@pytest.mark.parametrize("what", ["contents are not flushed", "names are not flushed", "written in place"])
def test_a_missing_flush_is_noticed(tmp_path, monkeypatch, what):
    counts = lambda path: (
        path.is_dir() if what == "contents are not flushed" else path.is_file() or what != "names are not flushed"
    )
    if what == "written in place":
        monkeypatch.setattr(
            files,
            "replace_durably",
            lambda temporary, path: (path.write_bytes(temporary.read_bytes()), temporary.unlink()),
        )
    with pytest.raises(AssertionError):
        check_write(tmp_path, counts=counts)


def digests(source):
    manifest = json.loads((source.path / "manifest.json").read_text())
    return [{name: entry["sha256"] for name, entry in shard["files"].items()} for shard in manifest["shards"]]


def check_collecting(tmp_path, monkeypatch, **options):
    monkeypatch.setattr(store, "SHARD_BYTES", 20_000)
    folder = tmp_path / "watched"
    folder.mkdir()
    with crash.watched(folder, **options) as disk:
        expected = digests(run_collect(folder))
    assert len(expected) > 2 and len(disk.images) > 40
    for number, image in enumerate(disk.images[::4] + disk.images[-2:]):
        source = run_collect(crash.restore(image, tmp_path / f"after-{number}"))
        assert digests(source) == expected
        PatternStore(source.path)  # verifies the checksums
        assert not any(path.suffix in (".tmp", ".partial") for path in source.path.parent.rglob("*"))


def test_collecting_resumes_after_any_crash(tmp_path, monkeypatch):
    check_collecting(tmp_path, monkeypatch)


def test_arrays_without_a_flush_are_noticed(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="bytes, the manifest says"):
        check_collecting(tmp_path, monkeypatch, counts=lambda path: not path.name.endswith(".npy.tmp"))


@pytest.mark.parametrize("stage", ["cluster", "predict", "tune"])
def test_training_resumes_after_any_crash(tmp_path, stage):
    place = tiny.make_workplace(tmp_path / "place")
    settings = {
        "trainer.checkpoint_every_n_steps": 1,
        "collect.storage": "memory",
        "cluster.max_epochs": 3,
        "predictor.max_epochs": 1,
    }
    settings |= {
        "tune.max_epochs": 1,
        "tune.batch_windows": 5,
        "predictor.bottleneck": 8,
        "monitor.windows": 0,
        "data.fit_windows": 16,
        "collect.batch_tokens": 256,
    }

    def run(folder, stage):
        words = tiny.tiny_overrides(place, **settings, **{"run.dir": folder, "stage": stage})
        train.train(load_config(None, words))
        return load_run(folder / "run")

    before = {"cluster": None, "predict": "cluster", "tune": "predict"}[stage]
    folder = tmp_path / "watched"
    folder.mkdir()
    if before:
        run(folder, before)
    with crash.watched(folder) as disk:
        whole = run(folder, stage)
    images = [image for image in disk.images if image]
    chosen = {round(at) for at in torch.linspace(0, len(images) - 1, 7).tolist()}
    for number in sorted(chosen):
        again = run(crash.restore(images[number], tmp_path / f"after-{number}"), stage)
        for name, value in whole.codebook.sites["neuron"].tensors().items():
            assert torch.equal(value, again.codebook.sites["neuron"].tensors()[name]), (number, name)
        if whole.predictor is not None:
            found = again.predictor.state_dict()
            assert all(torch.equal(value, found[name]) for name, value in whole.predictor.state_dict().items()), number
