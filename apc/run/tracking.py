"""One run's metrics: every number goes to `metrics.jsonl` in the run's folder, and the same numbers to W&B.

The file is the record and W&B its mirror. A run without W&B, offline, or cut off from the server loses nothing.
`Tracking.log` is the one place that metrics go to; Lightning reaches it through `callbacks.TrackingLogger`.
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
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TextIO
from urllib.parse import urlsplit

from apc.config.schema import TrackingConfig
from apc.utils.errors import UserError

if TYPE_CHECKING:
    import wandb

    Mode = Literal["online", "offline", "disabled"]
METRICS_FILE = "metrics.jsonl"
RUN_ID_FILE = "wandb-run-id"

# The x axis of each family of metrics in W&B.
STEP_METRICS = {"cluster": "cluster/epoch", "predictor": "predictor/step", "tune": "tune/step"}

# The metrics that W&B plots by default, about a dozen in a run. The others are in its history, to be plotted by hand.
PANELS = (
    *("cluster/captured", "cluster/changed", "cluster/empty", "tune/divergence", "*/monitor_*_perplexity"),
    *("predictor/loss", "predictor/top1_*", "predictor/captured_energy_hard_*"),
)

# A server that hangs must not stop the run. After this long without a first contact the run goes offline.
INIT_TIMEOUT_S = 20
# The wait for the last uploads. The rest stays on disk, for `wandb sync`.
FINISH_TIMEOUT_S = 120

# WANDB_MODE has older names for two of the modes.
_WANDB_MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


class Tracking:
    """Opens a run's record on rank 0, continues it where the folder already has one, and closes it.

    As a context manager it finishes the run, as failed if the block raised. The folder, created if missing, gets
    `metrics.jsonl` and `wandb/`. name, config: for W&B. Unless `enabled`, every method does nothing.

    A resumed run is one run in W&B too, also offline. W&B then has a folder for each part, all with one run id, and
    `wandb sync FOLDER/wandb` (W&B 0.31 or later) uploads them in order, each after the last step of the one before.

    Raises UserError if the folder can't be written.
    """

    def __init__(self, cfg: TrackingConfig, folder: Path, name: str, config: dict, enabled: bool = True) -> None:
        self.folder = Path(folder)
        self.name = name
        self.wandb_mode: Mode = "disabled"
        self._file: TextIO | None = None
        self._run: wandb.Run | None = None
        self._known_keys: set[str] = set(STEP_METRICS.values())
        self._per_layer: dict[str, dict[str, list]] = {}  # the latest values, by stage and metric
        # Chosen here, so that a failed start online and the offline run after it have one id for `wandb sync`.
        self._new_id = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        if not enabled:
            return
        self._file, before_s = _open_metrics(self.folder)
        self._start = time.monotonic() - before_s
        try:
            self.wandb_mode = choose_mode(cfg.wandb)
        except Exception as error:
            if not is_wandb_failure(error):
                raise
            self._warn_without(error)
        self._run = self._start_wandb(cfg, config)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Writes one line to `metrics.jsonl` and one history row to W&B.

        A metric is a number, a scalar tensor or array; or, in a family like `cluster_layers/`, a list with a value per
        layer. W&B gets the latest lists as a table per stage when the run ends: scalars would make hundreds of panels.
        """
        row = {key: _plain(value) for key, value in metrics.items()}
        self._write(row)
        for key in [key for key, value in row.items() if isinstance(value, list)]:
            family, _, name = key.partition("/")
            self._per_layer.setdefault(family.removesuffix("_layers"), {})[name] = row.pop(key)
        self._send(lambda run: self._log_scalars(run, row))

    def _log_scalars(self, run: wandb.Run, row: dict[str, Any]) -> None:
        for key in row.keys() - self._known_keys:
            step = STEP_METRICS.get(key.partition("/")[0])
            if step and not any(fnmatch(key, panel) for panel in PANELS):
                run.define_metric(key, step_metric=step, hidden=True, summary="none")
        self._known_keys |= row.keys()
        run.log(row)

    def summary(self, values: Mapping[str, object]) -> None:
        """Sets the run's final figures: W&B's summary, and a line `{"summary": values}` in `metrics.jsonl`."""
        plain = {key: _plain(value) for key, value in values.items()}
        self._write({"summary": plain})
        self._send(lambda run: run.summary.update(plain))

    def figure(self, key: str, path: Path) -> None:
        """Shows a PNG in W&B."""
        self._send(lambda run: run.log({key: _wandb().Image(str(path))}))

    def artifact(self, name: str, type: str, path: Path) -> None:
        """Keeps a file as a W&B artifact. Offline, W&B keeps a copy until `wandb sync`."""

        def send(run: wandb.Run) -> None:
            artifact = _wandb().Artifact(re.sub(r"[^\w.-]", "-", name), type)  # W&B refuses other characters
            artifact.add_file(str(path))
            run.log_artifact(artifact)

        self._send(send)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Shows a table in W&B. A column may mix numbers with words, such as a dash."""
        data = [list(row) for row in rows]
        self._send(lambda run: run.log({key: _wandb().Table(list(columns), data, allow_mixed_types=True)}))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the record; a second call does nothing. An exit code other than 0 marks the W&B run as failed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        for stage, values in self._per_layer.items():
            rows = [[layer, *row] for layer, row in enumerate(zip_longest(*values.values()))]
            self.table(f"layers/{stage}", ["layer", *values], rows)
        self._per_layer.clear()
        self._send(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # SystemExit(0) and SystemExit(None) are successful ends.
        failed = kind is not None and not (isinstance(error, SystemExit) and not error.code)
        self.finish(exit_code=int(failed))

    def _write(self, record: dict) -> None:
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        line = {"time": now, "elapsed_s": round(time.monotonic() - self._start, 3), **record}
        self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def _send(self, send: Callable[[wandb.Run], object]) -> None:
        """Calls `send` with the W&B run. If W&B fails, prints that once; the run continues without it."""
        if self._run is None:
            return
        try:
            send(self._run)
        except Exception as error:
            if not is_wandb_failure(error):
                raise
            self._run, self.wandb_mode = None, "disabled"
            path = self.folder / METRICS_FILE
            _warn(f"W&B stopped ({one_line(error)}); metrics go on in {path}, and `wandb sync` can upload the rest")

    def _start_wandb(self, cfg: TrackingConfig, config: dict) -> wandb.Run | None:
        """Starts the W&B run; goes offline if that fails online, and without W&B if it fails offline too."""
        while self.wandb_mode != "disabled":
            try:
                run = self._init_wandb(cfg, config)
            except Exception as error:
                if not is_wandb_failure(error):
                    raise
                if self.wandb_mode == "offline":
                    self.wandb_mode = "disabled"
                    self._warn_without(error)
                    continue
                self.wandb_mode = "offline"
                with contextlib.suppress(ConnectionError):
                    _wandb().teardown()  # otherwise its service keeps the run id of the failed start
                place = self.folder / "wandb"
                _warn(
                    f"W&B could not go online ({one_line(error)}); offline in {place}, upload later with `wandb sync`"
                )
            else:
                if self.wandb_mode == "online":
                    _warn(f"W&B run at {run.url}")
                return run
        return None

    def _warn_without(self, error: Exception) -> None:
        _warn(f"W&B could not start ({one_line(error)}); metrics go to {self.folder / METRICS_FILE} only")

    def _init_wandb(self, cfg: TrackingConfig, config: dict) -> wandb.Run:
        wandb = _wandb()
        # No output, no prompts, not the user's code or repository, and a limit on every wait.
        settings = wandb.Settings(
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
        id_file = self.folder / RUN_ID_FILE
        known_id = id_file.read_text().strip() if id_file.exists() else ""
        run = wandb.init(
            mode=self.wandb_mode,
            project=cfg.project,
            group=cfg.group,
            tags=cfg.tags,
            notes=cfg.notes,
            name=self.name,
            dir=str(self.folder.resolve()),
            config=config,
            id=known_id or self._new_id,
            resume="allow" if known_id else None,  # offline it is for `wandb sync`, which then appends
            reinit="create_new",  # leaves a run of the calling program alone
            settings=settings,
        )
        id_file.write_text(run.id + "\n")  # in a sweep it is the agent's id
        for family, step in STEP_METRICS.items():
            run.define_metric(step, hidden=True)
            run.define_metric(f"{family}/*", step_metric=step)
        run.define_metric("eval/*", summary="last")
        return run


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's `metrics.jsonl`, oldest first. Not-finite numbers are the strings "nan", "inf" and "-inf".

    A last line that a killed run left incomplete is ignored. Raises UserError if there is no such file, or an earlier
    line can't be read.
    """
    path = Path(folder) / METRICS_FILE
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: name the folder of a run of train.py") from None
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
    """Opens `metrics.jsonl` to append; also returns the elapsed seconds of its last line."""
    path = folder / METRICS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before_s = 0.0
        if path.exists():
            _repair_last_line(path)
            last = _parse(path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]) or {}
            before_s = float(last.get("elapsed_s", 0.0))
        return path.open("a", buffering=1, encoding="utf-8"), before_s
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror}): choose another run.dir") from None


def _repair_last_line(path: Path) -> None:
    """Completes the last line or cuts it off: a killed run may have written a part of it."""
    content = path.read_bytes()
    head, newline, tail = content.rpartition(b"\n")
    if not tail:
        return
    with path.open("r+b") as file:  # in place: the lines before are never at risk
        if _parse(tail) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(len(head + newline))


def choose_mode(wanted: str) -> Mode:
    """The mode for a value of `tracking.wandb`, decided without a prompt and without the network.

    `auto` follows WANDB_MODE or the user's `wandb offline`, and is online only if there is a login. May raise W&B's own
    errors, of any class, for invalid settings: `is_wandb_failure`.
    """
    mode = _WANDB_MODES.get(os.environ.get("WANDB_MODE", "") if wanted == "auto" else wanted)  # None: auto
    if mode in ("offline", "disabled"):
        return mode
    settings = _wandb().setup(_wandb().Settings(silent=True)).settings
    if mode is None and settings.mode in ("offline", "disabled"):
        return _WANDB_MODES[settings.mode]
    if _logged_in(settings):
        return "online"
    if mode == "online":
        _warn("tracking.wandb=online, but there is no W&B login: offline instead; run `wandb login` first")
    return "offline"


def _logged_in(settings: wandb.Settings) -> bool:
    """Whether W&B would find a key in the environment, its settings or netrc. Never prompts, never connects."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key:
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or settings.base_url).netloc
    # W&B 0.31 uses a second host name for its cloud, and accepts the first one's login there.
    hosts = {host, "api.wandb.ai"} if host.endswith("forge.coreweave.com") else {host}
    path = os.environ.get("NETRC") or next(
        (p for p in ("~/.netrc", "~/_netrc") if os.path.exists(os.path.expanduser(p))), "~/.netrc"
    )
    try:
        logins = netrc.netrc(os.path.expanduser(path))
    except (OSError, netrc.NetrcParseError):
        return False
    return any((logins.authenticators(name) or ("", "", ""))[2] for name in hosts)


def _wandb() -> ModuleType:
    """Imports W&B only where it is used, because the import takes a second."""
    import wandb

    return wandb


def _plain(value: Any) -> Any:
    """Tensors and arrays as numbers or lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _finite(value: object) -> object:
    """Not-finite floats, which JSON does not have, as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def is_wandb_failure(error: Exception) -> bool:
    """Whether the error comes out of W&B's code. Many of its errors are not a `wandb.Error`, e.g. of its settings."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").partition(".")[0] == "wandb" for frame, _ in frames)


def one_line(error: Exception) -> str:
    """The error's message in at most 200 characters without a line break."""
    text = " ".join(str(error).split()).partition(" [type=")[0]  # which pydantic adds
    return text[:200] or type(error).__name__


def _warn(line: str) -> None:
    print(f"tracking: {line}", file=sys.stderr)
