"""The doctor reports the state of the machine, what is missing and what to do; its exit code says if a check failed."""

import importlib.metadata

import pytest
import torch

from apc.commands import doctor
from apc.config.load import load_config

REQUIREMENTS = ["torch>=2", "transformers>=5.17,<6", "wandb>=0.31; extra == 'train'", "rich>=13; extra == 'train'"]


def lines(check, *arguments):
    return [finding.line() for finding in check(*arguments)]


def test_a_machine_that_runs_the_tests_has_no_failure(tmp_path, capsys):
    doctor.main([f"run.dir={tmp_path / 'runs'}", f"collect.dir={tmp_path / 'stores'}"])
    output = capsys.readouterr().out
    assert f"ok    torch {torch.__version__.split('+')[0]}" in output and "FAIL" not in output
    assert f"ok    {tmp_path / 'runs'}: " in output or f"note  {tmp_path / 'runs'}: " in output
    assert "0 stores, 0 interrupted" in output and "W&B: " in output and "Hugging Face hub: " in output


def test_missing_and_old_packages_are_named(monkeypatch):
    version = importlib.metadata.version

    def other(name):
        if name in ("torch", "wandb"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIREMENTS)
    monkeypatch.setattr(importlib.metadata, "version", other)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    output = lines(doctor.check_python)
    assert output[0].startswith("FAIL  Python 3.9.1: use a version ")
    assert output[1:] == [
        "FAIL  torch is not installed: pip install 'torch>=2'",
        "FAIL  transformers 1.0: pip install 'transformers<6,>=5.17'",
        "note  wandb not installed; apc train, evaluate and sweep need them, loading a run does not: "
        "pip install 'apc-llm[train]'",
    ]


def test_folders_that_are_full_or_not_writable_are_named(tmp_path, monkeypatch, capsys):
    cfg = load_config(None, [f"run.dir={tmp_path}", f"collect.dir={tmp_path}"])
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1 << 20}))
    assert lines(doctor.check_disk, cfg)[0].startswith(
        f"note  {tmp_path}: 0.0 GiB free: make room, or choose another folder with run.dir=FOLDER"
    )

    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert (
        lines(doctor.check_disk, cfg)[1]
        == f"FAIL  {tmp_path} can't be written (Permission denied): choose another folder with collect.dir=FOLDER"
    )
    with pytest.raises(SystemExit) as end:
        doctor.main([])
    assert end.value.code == 1 and "3 checks failed" in capsys.readouterr().err


def test_no_gpu_is_a_note_with_its_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (line,) = lines(doctor.check_gpu)
    assert line.startswith("note  no GPU, torch")


@pytest.mark.gpu
def test_kernels_are_tried_on_every_gpu():
    output = lines(doctor.check_gpu)
    assert len(output) == 2 * torch.cuda.device_count() and all(line.startswith(("ok", "note")) for line in output)
