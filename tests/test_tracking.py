"""`metrics.jsonl` and W&B get the same numbers, without prompts or network, and a killed run loses nothing."""

import contextlib
import http.server
import json
import math
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from apc.config.schema import TrackingConfig
from apc.run import tracking
from apc.run.callbacks import TrackingLogger
from apc.run.tracking import Tracking, read_metrics
from apc.utils.errors import UserError

OFFLINE = TrackingConfig(wandb="offline")
FAKE_KEY = "0123456789" * 4


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path_factory):
    """A user without a W&B login or setting, in an empty home and an empty working folder."""
    wandb = pytest.importorskip("wandb")
    for name in [name for name in tracking.os.environ if name.startswith("WANDB_")] + ["NETRC"]:
        monkeypatch.delenv(name, raising=False)
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    wandb.teardown()  # W&B reads settings and environment once a session
    yield home
    with contextlib.suppress(ConnectionError):  # one test kills the service
        wandb.teardown()


def records(folder: Path, kind: str, run: int = 0) -> list[dict]:
    """The records of one kind in the `run`-th run under `folder`, from `wandb leet inspect --json`."""
    run_dir = sorted((folder / "wandb").glob("*run-*"))[run]
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_dir)]
    lines = subprocess.run(
        command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
    ).stdout.splitlines()
    return [record[kind] for record in map(json.loads, lines) if record["type"] == kind]


def metrics_of(row: dict) -> dict:
    """A row of either record without the recorder's own keys (time, `_step`, `_runtime`)."""
    return {key: value for key, value in row.items() if "/" in key and not key.startswith("figures")}


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "plot.png"
    Image.new("RGB", (40, 30)).save(path)
    return path


def test_unknown_mode_names_the_key_and_the_choices():
    with pytest.raises(UserError, match=r"tracking\.wandb=on: choose auto, online, offline or disabled"):
        TrackingConfig(wandb="on")


def test_offline_run_reads_back_as_it_was_logged(tmp_path, png, capfd):
    folder = tmp_path / "run"
    cfg = TrackingConfig(wandb="offline", project="p", group="g", tags=["a", "b"], notes="why")
    with Tracking(cfg, folder, "first", {"cluster": {"k": 64}, "sites": ["neuron"]}) as run:
        assert run.wandb_mode == "offline"
        for epoch in range(3):
            run.log({"cluster/epoch": epoch, "cluster/captured": torch.tensor(epoch / 4)})
        run.log({"predictor/step": 10, "predictor/loss": 3.5})
        run.summary({"eval/predicted/perplexity": 22.5})
        run.figure("figures/perplexity", png)
        run.artifact("first codebook", "codebook", png)
        run.table("policies", ["policy", "perplexity"], [["dense", 21.0], ["predicted", "–"], ["static", None]])
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""

    (start,) = records(folder, "run")
    assert start["config"]["update"]["cluster"] == {"k": 64} and start["config"]["update"]["sites"] == ["neuron"]
    shown = [start[key] for key in ("display_name", "project", "run_group", "tags", "notes")]
    assert shown == ["first", "p", "g", ["a", "b"], "why"]

    defined = {
        metric.get("glob_name") or metric["name"]: metric.get("step_metric") for metric in records(folder, "metric")
    }
    assert (
        defined["cluster/*"] == "cluster/epoch"
        and defined["predictor/*"] == "predictor/step"
        and defined["eval/*"] is None
    )

    history = [row["item"] for row in records(folder, "history")]
    logged = [row for row in map(metrics_of, history) if row]
    assert logged == [row for row in map(metrics_of, read_metrics(folder)) if row]
    assert logged[-1] == {"predictor/step": 10, "predictor/loss": 3.5} and len(logged) == 4
    assert any(row.get("figures/perplexity._type") == "image-file" for row in history)
    assert any(row.get("policies.nrows") == 3 for row in history)

    assert {"eval/predicted/perplexity": 22.5} in [summary["update"] for summary in records(folder, "summary")]
    assert read_metrics(folder)[-1]["summary"] == {"eval/predicted/perplexity": 22.5}
    (artifact,) = [artifact for artifact in records(folder, "artifact") if artifact["type"] == "codebook"]
    assert artifact["name"] == "first-codebook" and artifact["manifest"]["contents"][0]["path"] == "plot.png"
    assert records(folder, "exit")[0]["exit_code"] == 0
    assert not list(folder.rglob("code/*.py"))


def test_a_block_that_raises_is_a_failed_run(tmp_path):
    with pytest.raises(ValueError), Tracking(OFFLINE, tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 0})
        raise ValueError
    assert records(tmp_path, "exit")[0]["exit_code"] == 1
    run.finish()  # a second time: nothing
    run.log({"cluster/epoch": 1})
    assert len(read_metrics(tmp_path)) == 1


def test_a_clean_sys_exit_is_no_failure(tmp_path):
    with pytest.raises(SystemExit), Tracking(OFFLINE, tmp_path, "n", {}):
        sys.exit(0)
    assert records(tmp_path, "exit")[0]["exit_code"] == 0


def test_resuming_appends_under_the_same_run_id(tmp_path):
    for epoch in range(2):
        with Tracking(OFFLINE, tmp_path, "n", {}) as run:
            run.log({"cluster/epoch": epoch})
    first, second = (records(tmp_path, "run", run=i)[0]["run_id"] for i in range(2))
    assert first == second == (tmp_path / "wandb-run-id").read_text().strip()
    # `wandb sync` appends a part that says `resume`; without it, the part would replace the one before.
    assert [records(tmp_path, "run", run=i)[0].get("resume", False) for i in range(2)] == [False, True]
    lines = read_metrics(tmp_path)
    assert [line["cluster/epoch"] for line in lines] == [0, 1]
    assert lines[1]["elapsed_s"] >= lines[0]["elapsed_s"]


def test_values_per_layer_are_lists_in_the_file_and_one_table_in_wandb(tmp_path):
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        for epoch in range(2):
            run.log(
                {"cluster/epoch": epoch, "cluster_layers/captured": [epoch, 0.5], "cluster_layers/density": [1, None]}
            )
    assert [line["cluster_layers/captured"] for line in read_metrics(tmp_path)] == [[0, 0.5], [1, 0.5]]
    keys = {key for row in records(tmp_path, "history") for key in row["item"] if not key.startswith("_")}
    assert {key.split(".")[0] for key in keys} == {"cluster/epoch", "layers/cluster"}
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/layers/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["layer", "captured", "density"] and content["data"] == [[0, 1, 1], [1, 0.5, None]]


def test_metrics_that_are_no_panels_are_hidden_and_stay_out_of_the_summary(tmp_path):
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 0, "cluster/captured": 0.5, "cluster/seconds": 2.0, "tune/step": 1, "tune/lr": 0.1})
    hidden = {item["name"] for item in records(tmp_path, "metric") if item["options"].get("hidden") and "name" in item}
    assert {"cluster/seconds", "tune/lr"} <= hidden and "cluster/captured" not in hidden
    summary = {key for update in records(tmp_path, "summary") for key in update["update"]}
    assert "cluster/captured" in summary and not {"cluster/seconds", "tune/lr"} & summary
    assert records(tmp_path, "history")[0]["item"]["cluster/seconds"] == 2.0


class Tiny(pl.LightningModule):
    """One weight; logs per step and per epoch, as clustering and predictor do."""

    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"width": 1})
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, index):
        loss = (self.weight * batch).square().mean()
        self.log("predictor/loss", loss, on_step=True, on_epoch=False)
        self.log("cluster/captured", 0.5, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainer_reaches_both_records_once(tmp_path):
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        trainer = pl.Trainer(
            logger=TrackingLogger(run),
            max_epochs=2,
            log_every_n_steps=1,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Tiny(), torch.utils.data.DataLoader(torch.ones(3, 1)))
    lines = read_metrics(tmp_path)
    assert all("epoch" not in line for line in lines)
    assert [line["predictor/step"] for line in lines if "predictor/loss" in line] == list(range(6))
    assert [line["cluster/epoch"] for line in lines if "cluster/captured" in line] == [0, 1]
    assert [metrics_of(row["item"]) for row in records(tmp_path, "history")] == [metrics_of(line) for line in lines]
    assert trainer.log_dir == str(tmp_path)
    assert list((tmp_path / "checkpoints").glob("*.ckpt")), "checkpoints belong in the run's folder"


def test_a_modules_own_step_metric_stays(tmp_path):
    with Tracking(TrackingConfig(wandb="disabled"), tmp_path, "n", {}) as run:
        logger = TrackingLogger(run)
        logger.log_metrics({"cluster/captured": 0.5, "cluster/epoch": 7, "epoch": 0}, step=3)
        logger.log_metrics({"lr-SGD": 0.1, "epoch": 2}, step=5)
        logger.log_metrics({"epoch": 2}, step=5)
    rows = [
        {key: value for key, value in line.items() if key not in ("time", "elapsed_s")}
        for line in read_metrics(tmp_path)
    ]
    assert rows == [{"cluster/captured": 0.5, "cluster/epoch": 7}, {"lr-SGD": 0.1, "epoch": 2}]


def test_disabled_writes_the_file_only(tmp_path, png):
    with Tracking(TrackingConfig(wandb="disabled"), tmp_path / "run", "n", {}) as run:
        run.log({"cluster/captured": 0.5})
        run.figure("f", png)
        run.artifact("a", "codebook", png)
        run.table("t", ["c"], [[1]])
        assert run.wandb_mode == "disabled"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_other_ranks_leave_no_trace(tmp_path):
    with Tracking(OFFLINE, tmp_path / "run", "n", {}, enabled=False) as run:
        run.log({"cluster/captured": 0.5})
        run.summary({"eval/x": 1})
        logger = TrackingLogger(run)
        logger.log_metrics({"cluster/captured": 0.5}, step=0)
    assert run.wandb_mode == "disabled" and not (tmp_path / "run").exists()


def test_not_finite_numbers_stay_visible(tmp_path):
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        run.log(
            {"predictor/step": 1, "predictor/loss": math.nan, "predictor/up": math.inf, "predictor/down": -math.inf}
        )
    (line,) = read_metrics(tmp_path)
    assert (line["predictor/loss"], line["predictor/up"], line["predictor/down"]) == ("nan", "inf", "-inf")
    assert records(tmp_path, "history")[0]["item"]["predictor/loss"] == "NaN"


def write_netrc(path: Path, host: str) -> None:
    path.write_text(f"machine {host}\n  login user\n  password {FAKE_KEY}\n")
    path.chmod(0o600)


def test_auto_is_offline_without_a_login():
    assert tracking.choose_mode("auto") == "offline"


def test_auto_is_online_with_a_key(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    assert tracking.choose_mode("auto") == "online"


@pytest.mark.parametrize(
    ("machine", "base_url", "mode"),
    [
        ("api.wandb.ai", "https://api.wandb.ai", "online"),
        ("api.wandb.ai", None, "online"),
        ("wandb.example.org:8080", "http://wandb.example.org:8080", "online"),
        ("api.wandb.ai", "http://wandb.example.org:8080", "offline"),
        ("github.com", None, "offline"),
    ],
    ids=["cloud", "default-host", "own-server", "login-elsewhere", "other-site"],
)
def test_auto_looks_for_the_servers_own_netrc_entry(monkeypatch, nobody, machine, base_url, mode):
    write_netrc(nobody / ".netrc", machine)
    if base_url:
        monkeypatch.setenv("WANDB_BASE_URL", base_url)
    assert tracking.choose_mode("auto") == mode


def test_netrc_variable_names_the_file(monkeypatch, tmp_path):
    write_netrc(tmp_path / "logins", "api.wandb.ai")
    monkeypatch.setenv("NETRC", str(tmp_path / "logins"))
    assert tracking.choose_mode("auto") == "online"


def test_a_broken_netrc_is_no_login(nobody):
    (nobody / ".netrc").write_text("machine\n???")
    assert tracking.choose_mode("auto") == "offline"


@pytest.mark.parametrize(
    ("variable", "mode"),
    [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online")],
)
def test_auto_followschoose_mode(monkeypatch, variable, mode):
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    monkeypatch.setenv("WANDB_MODE", variable)
    assert tracking.choose_mode("auto") == mode


def test_the_config_goes_beforechoose_mode(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert tracking.choose_mode("disabled") == "disabled"


def test_online_without_a_login_says_so_and_stays_offline(capfd):
    assert tracking.choose_mode("online") == "offline"
    error = capfd.readouterr().err
    assert "there is no W&B login" in error and error.count("\n") == 1


def test_a_server_that_hangs_does_not_stop_the_run(tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 1)
        with Tracking(TrackingConfig(), tmp_path, "n", {}) as run:
            run.log({"cluster/epoch": 0})
            assert run.wandb_mode == "offline"
    error = capfd.readouterr().err
    assert "could not go online" in error and error.count("\n") == 1
    assert records(tmp_path, "history")[0]["item"]["cluster/epoch"] == 0


@pytest.mark.parametrize("mode", ["auto", "offline"])
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("WANDB_CONSOLE", "zzz", "Settings console Input should be 'auto'"),
        ("WANDB_MODE", "zzz", "Settings mode Input should be 'online'"),
        ("WANDB_BASE_URL", "zzz", "Settings base_url Input should be a valid URL"),
        ("WANDB_INIT_TIMEOUT", "soon", "Settings init_timeout Input should be a valid number"),
        ("WANDB_TAGS", "a,,b", "Tag at index 1 is empty"),
        ("WANDB_SERVICE", "zzz", "Failed to parse WANDB_SERVICE='zzz'"),
        ("WANDB_RUN_ID", "a/b", "Run ID cannot contain"),
    ],
)
def test_an_invalid_variable_of_wandb_does_not_stop_the_run(
    tmp_path, monkeypatch, capfd, variable, value, reason, mode
):
    monkeypatch.setenv(variable, value)
    with Tracking(TrackingConfig(wandb=mode), tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 0})
        assert run.wandb_mode == "disabled"
    error = capfd.readouterr().err
    assert re.search(rf"tracking: W&B could not start \(.*{reason}.*metrics\.jsonl only\n$", error)
    assert error.count("\n") == 1 and [line["cluster/epoch"] for line in read_metrics(tmp_path)] == [0]


def test_a_folder_that_wandb_cannot_write_does_not_stop_the_run(tmp_path, monkeypatch, capfd, png):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "file" / "data"))
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        run.artifact("codebook", "codebook", png)
        run.log({"cluster/epoch": 0})
    assert [line["cluster/epoch"] for line in read_metrics(tmp_path)] == [0]
    assert "tracking: W&B stopped (" in capfd.readouterr().err


class LoginOnly(http.server.BaseHTTPRequestHandler):
    """A W&B server that accepts a run and then never answers again."""

    accepted: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.accepted or not self.path.startswith("/graphql"):
            threading.Event().wait()
        asked = json.loads(body)
        self.accepted.append(asked["variables"]["name"])
        project = {"id": "p", "name": "apc", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b",
            "name": self.accepted[0],
            "displayName": "n",
            "description": "",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        answer = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


def test_a_server_that_hangs_after_the_login_does_not_stop_the_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(LoginOnly, "accepted", [])
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT_S", 1)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), LoginOnly) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        with Tracking(TrackingConfig(), tmp_path, "n", {}) as run:
            assert run.wandb_mode == "online" and LoginOnly.accepted
            for epoch in range(20):
                run.log({"cluster/epoch": epoch})
        server.shutdown()
    assert "W&B stopped (Timed out" in capfd.readouterr().err
    assert [line["cluster/epoch"] for line in read_metrics(tmp_path)] == list(range(20))
    assert len(records(tmp_path, "history")) == 20  # `wandb sync` can upload them later


def test_a_service_that_dies_does_not_stop_the_run(tmp_path, capfd):
    psutil = pytest.importorskip("psutil")
    with Tracking(OFFLINE, tmp_path, "n", {}) as run:
        (service,) = [child for child in psutil.Process().children() if "wandb" in child.name()]
        service.kill()
        service.wait()
        for epoch in range(3):
            run.log({"cluster/epoch": epoch})
    assert [line["cluster/epoch"] for line in read_metrics(tmp_path)] == [0, 1, 2]
    assert "W&B stopped" in capfd.readouterr().err


def test_a_torn_last_line_is_ignored_and_mended(tmp_path):
    cfg = TrackingConfig(wandb="disabled")
    with Tracking(cfg, tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"time": "2026-01-01", "cluster/ep')
    assert len(read_metrics(tmp_path)) == 1
    with Tracking(cfg, tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 1})
    assert [line["cluster/epoch"] for line in read_metrics(tmp_path)] == [0, 1]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"cluster/epoch": 0}')
    with Tracking(TrackingConfig(wandb="disabled"), tmp_path, "n", {}) as run:
        run.log({"cluster/epoch": 1})
    assert [line["cluster/epoch"] for line in read_metrics(tmp_path)] == [0, 1]


@pytest.mark.parametrize("bad", ["{torn", "[1]", "\x00\x00"])
def test_a_bad_line_in_the_middle_is_named(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n' + bad + '\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_a_folder_without_a_record_is_named(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl does not exist"):
        read_metrics(tmp_path)
