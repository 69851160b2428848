"""The doctor says what there is, what is missing and what to do about it; its exit code tells whether anything failed."""

import importlib.metadata

import pytest
import torch

from apc.commands import doctor
from apc.config.load import load_config


def lines(check, *arguments):
    return [finding.line() for finding in check(*arguments)]


def test_a_machine_that_runs_the_tests_is_well(tmp_path, capsys):
    doctor.main([f"run.dir={tmp_path / 'runs'}", f"collect.dir={tmp_path / 'stores'}"])
    said = capsys.readouterr().out
    assert f"ok    torch {torch.__version__.split('+')[0]}" in said and "FAIL" not in said
    assert f"ok    {tmp_path / 'runs'}: " in said or f"note  {tmp_path / 'runs'}: " in said
    assert "0 stores, 0 interrupted" in said and "W&B: " in said and "Hugging Face hub: " in said


def test_missing_and_old_packages_are_named(monkeypatch):
    version = importlib.metadata.version

    def other(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    said = lines(doctor.check_python)
    assert "FAIL  wandb is not installed: pip install 'wandb<1,>=0.31'" in said
    assert "FAIL  transformers 1.0: pip install 'transformers<6,>=5.17'" in said
    assert said[0].startswith("FAIL  Python 3.9.1: use one that is ")


def test_folders_without_room_or_right_are_named(tmp_path, monkeypatch, capsys):
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
    (said,) = lines(doctor.check_gpu)
    assert said.startswith("note  no GPU, torch")


@pytest.mark.gpu
def test_a_gpu_is_tried():
    assert (
        all(line.startswith(("ok", "note")) for line in lines(doctor.check_gpu))
        and len(lines(doctor.check_gpu)) == 2 * torch.cuda.device_count()
    )
