"""One run's record: every metric goes to `metrics.jsonl` in the run's folder, and the same numbers to W&B.

The file is the record and W&B its mirror: a run without W&B, offline, or cut off from the server in mid-run loses nothing.
`Tracking.log` is the one place where metrics go; Lightning reaches it through `callbacks.TrackingLogger`.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TextIO
from urllib.parse import urlsplit

from apc.config.schema import TrackingConfig
from apc.utils.errors import UserError

if TYPE_CHECKING:
    import wandb
METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "wandb-run-id"

# What each family of metrics is plotted against in W&B.
STEP_METRICS = {
    "cluster": "cluster/epoch",
    "cluster_layers": "cluster/epoch",
    "predictor": "predictor/step",
    "predictor_layers": "predictor/step",
    "tune": "tune/step",
    "tune_layers": "tune/step",
}

# A server that hangs must not stop the run: so long for the first contact, then offline ...
INIT_TIMEOUT_S = 20
# ... and so long for the last uploads. What is left stays on disk, for `wandb sync`.
FINISH_TIMEOUT_S = 120

# WANDB_MODE has older names for two of the modes.
_WANDB_MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


class Tracking:
    """Opens a run's record on rank 0, continues it where the folder already has one, and closes it.

    As a context manager it finishes the run, as failed where the block raised.

    Args:
        cfg: the `tracking.*` keys.
        folder: the run's folder, made if missing. Gets `metrics.jsonl` and `wandb/`.
        name: what W&B shows the run as.
        config: the resolved config, nested, for W&B's config tab.
        enabled: false on ranks other than 0, where every method then does nothing.

    Raises:
        UserError: the folder can't be written.
    """

    def __init__(self, cfg: TrackingConfig, folder: Path, name: str, config: dict, enabled: bool = True) -> None:
        self.folder = Path(folder)
        self.name = name
        self._mode = "disabled"
        self._file: TextIO | None = None
        self._run: wandb.Run | None = None
        # Made here, so that a failed start online and the offline run after it are one run to `wandb sync`.
        self._new_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if not enabled:
            return
        self._file, before_s = _open_metrics(self.folder)
        self._start = time.monotonic() - before_s
        self._mode = _wandb_mode(cfg.wandb)
        self._run = self._start_wandb(cfg, config)

    @property
    def wandb_mode(self) -> str:
        """`online`, `offline` or `disabled`: what W&B really does in this run."""
        return self._mode

    def log(self, metrics: Mapping[str, float]) -> None:
        """Writes one line of metrics to `metrics.jsonl` and one history row to W&B. Takes numbers, and scalar tensors and arrays."""
        numbers = {key: _number(value) for key, value in metrics.items()}
        self._write(numbers)
        self._send(lambda run: run.log(numbers))

    def summary(self, values: Mapping[str, object]) -> None:
        """Sets the run's final figures: W&B's summary, and a line `{"summary": values}` in `metrics.jsonl`."""
        plain = {key: _number(value) for key, value in values.items()}
        self._write({"summary": plain})
        self._send(lambda run: run.summary.update(plain))

    def figure(self, key: str, path: Path) -> None:
        """Shows a PNG in W&B."""

        def send(run: wandb.Run) -> None:
            import wandb

            run.log({key: wandb.Image(str(path))})

        self._send(send)

    def artifact(self, name: str, type: str, path: Path) -> None:
        """Keeps a file, or a folder's files, as a W&B artifact. Offline, W&B copies it aside until `wandb sync`."""

        def send(run: wandb.Run) -> None:
            import wandb

            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type)  # W&B refuses other letters
            (artifact.add_dir if Path(path).is_dir() else artifact.add_file)(str(path))
            run.log_artifact(artifact)

        self._send(send)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Shows a table in W&B. A column may mix numbers with words such as a dash."""

        def send(run: wandb.Run) -> None:
            import wandb

            run.log({key: wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)})

        self._send(send)

    def finish(self, exit_code: int = 0) -> None:
        """Closes the record; a second call does nothing. An exit code other than 0 marks the W&B run as failed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # SystemExit(0) and SystemExit(None) end a program that did well.
        failed = kind is not None and not (isinstance(error, SystemExit) and not error.code)
        self.finish(exit_code=int(failed))

    def _write(self, record: dict) -> None:
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = {"time": now, "elapsed_s": round(time.monotonic() - self._start, 3), **record}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def _send(self, send: Callable[[wandb.Run], object]) -> None:
        """Hands something to W&B; where W&B itself has failed, says so once and goes on without it."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            if not _is_wandb_failure(error):
                raise
            self._run, self._mode = None, "disabled"
            _say(
                f"W&B stopped ({_one_line(error)}); metrics go on in {self.folder / METRICS_FILE}, and `wandb sync` can upload the rest"
            )

    def _start_wandb(self, cfg: TrackingConfig, config: dict) -> wandb.Run | None:
        while self._mode != "disabled":
            try:
                run = self._init_wandb(cfg, config)
            except Exception as error:
                if not _is_wandb_failure(error):
                    raise
                self._fall_back(error)
            else:
                if self._mode == "online":
                    _say(f"W&B run at {run.url}")
                return run
        return None

    def _fall_back(self, error: Exception) -> None:
        """Goes from online to offline, and from offline to no W&B at all, and says so."""
        import wandb

        if self._mode == "online":
            self._mode = "offline"
            with contextlib.suppress(ConnectionError):
                wandb.teardown()  # or its service holds on to the run id of the attempt
            _say(
                f"W&B could not go online ({_one_line(error)}); offline in {self.folder / 'wandb'}, upload later with `wandb sync`"
            )
        else:
            self._mode = "disabled"
            _say(f"W&B could not start ({_one_line(error)}); metrics go to {self.folder / METRICS_FILE} only")

    def _init_wandb(self, cfg: TrackingConfig, config: dict) -> wandb.Run:
        import wandb

        id_file = self.folder / RUN_ID_FILE
        known_id = id_file.read_text().strip() if id_file.exists() else ""
        run = wandb.init(
            mode=self._mode,
            project=cfg.project,
            group=cfg.group,
            tags=cfg.tags,
            notes=cfg.notes,
            name=self.name,
            dir=str(self.folder.resolve()),
            config=config,
            id=known_id or self._new_id,
            resume="allow" if known_id and self._mode == "online" else None,  # offline, W&B can't know the earlier run
            reinit="create_new",  # leaves alone whatever run the calling program has open
            settings=_settings(),
        )
        id_file.write_text(run.id + "\n")  # in a sweep the agent's id, whatever was asked for
        for family, step in STEP_METRICS.items():
            run.define_metric(step, hidden=True)
            run.define_metric(f"{family}/*", step_metric=step)
        run.define_metric("eval/*", summary="last")
        return run


def read_metrics(folder: Path) -> list[dict]:
    """Reads a run's `metrics.jsonl` back, oldest line first. Not-finite numbers are the strings "nan", "inf" and "-inf".

    A last line without its newline is what a killed run leaves, and is ignored if it can't be read.

    Raises:
        UserError: there is no such file, or a line before the last can't be read.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name a run's folder, one that train.py made") from None
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number < len(lines):
            raise UserError(f"{path}, line {number}: not a JSON object; repair or delete that line")
    return records


def _parse(line: bytes) -> dict | None:
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return None


def _open_metrics(folder: Path) -> tuple[TextIO, float]:
    """Opens `metrics.jsonl` to append; returns the file and the seconds that its last line had reached."""
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before_s = 0.0
        if path.exists():
            _mend(path)
            last = _parse(path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]) or {}
            before_s = float(last.get("elapsed_s", 0.0))
        return path.open("a", buffering=1, encoding="utf-8"), before_s
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): choose another run.dir") from None


def _mend(path: Path) -> None:
    """Ends the file with a whole line, or a line that a killed run left torn would come to stand in the middle."""
    content = path.read_bytes()
    head, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    with path.open("r+b") as file:  # in its place: what is before the last line is never at risk
        if _parse(tail) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(len(head + newline))


def _wandb_mode(wanted: str) -> str:
    """Decides between `online`, `offline` and `disabled`, without a prompt and without the network.

    `auto` follows WANDB_MODE (or what `wandb offline` has set), and goes online only where a login is found.
    """
    if wanted == "auto":
        wanted = _WANDB_MODES.get(os.environ.get("WANDB_MODE", ""), "auto")
    if wanted in ("offline", "disabled"):
        return wanted
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    if wanted == "auto" and settings.mode in ("offline", "disabled"):
        return settings.mode
    if _logged_in(settings):
        return "online"
    if wanted == "online":
        _say("W&B is to be online, but no login was found: offline instead; run `wandb login` first")
    return "offline"


def _logged_in(settings: wandb.Settings) -> bool:
    """Whether W&B would find a key, as it looks for one itself: environment, settings, netrc. Never asks, never connects."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.base_url).netloc
    # W&B 0.31 reaches its cloud under a second name, and takes the first one's login for it.
    hosts = {host, "api.wandb.ai"} if host.endswith("forge.coreweave.com") else {host}
    path = os.environ.get("NETRC") or next(
        (p for p in ("~/.netrc", "~/_netrc") if os.path.exists(os.path.expanduser(p))), "~/.netrc"
    )
    try:
        logins = netrc.netrc(os.path.expanduser(path))
    except (OSError, netrc.NetrcParseError):
        return False
    return any((logins.authenticators(name) or ("", "", ""))[2] for name in hosts)


def _settings() -> wandb.Settings:
    """Quiet, never a prompt, nothing about the user's code or repository, and an end to every wait."""
    import wandb

    return wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        init_timeout=INIT_TIMEOUT_S,
        finish_timeout=FINISH_TIMEOUT_S,
        finish_timeout_raises=True,  # `silent` would hide its warning
    )


def _number(value: object) -> object:
    """A plain number for a scalar tensor or array; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: object) -> object:
    """Not-finite floats, which JSON can't hold, as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _is_wandb_failure(error: Exception) -> bool:
    """Whether W&B or the way to its service failed, not the caller: much of what it raises is no `wandb.Error`."""
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("wandb.")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _say(line: str) -> None:
    print(f"tracking: {line}", file=sys.stderr)
