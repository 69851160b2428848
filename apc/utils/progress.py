"""One progress bar at a time, on a terminal only: a log file gets whole lines and no bars."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """Counts the steps of a stage and shows one figure beside them. Without a `Progress` it does nothing."""

    def __init__(self, shown: "Progress | None", stage: str, total: float, unit: str) -> None:
        self._shown, self._unit = shown, unit
        self._figure, self._done, self._began = "", 0.0, time.monotonic()
        if shown is not None:
            shown.add_task(stage, total=total, figure="")

    def update(self, steps: float = 1, figure: str | None = None) -> None:
        """Advances the bar by `steps`.

        figure: the text beside the bar. None: units per second if the bar has a unit, else the previous text.
        """
        if self._shown is None:
            return
        self._done += steps
        if figure is not None:
            self._figure = figure
        elif self._unit:
            self._figure = f"{self._done / max(time.monotonic() - self._began, 1e-9):,.0f} {self._unit}/s"
        self._shown.update(self._shown.task_ids[0], advance=steps, figure=self._figure)


@contextmanager
def progress(total: float, stage: str, unit: str = "", enabled: bool = True) -> Iterator[Bar]:
    """A bar of `total` steps on stderr, named by its stage. Lines printed inside the block appear above it.

    unit: what a step is, e.g. `tokens`: the bar then shows tokens per second. The bar appears only if `enabled` is set,
    on rank 0, and if stderr is a terminal.
    """
    from apc.utils import distributed  # imports torch, which the command line does without

    if not (enabled and distributed.is_main() and sys.stderr.isatty()):
        yield Bar(None, stage, total, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[figure]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # Printed lines go through the bar's console only where they would reach the same terminal anyway.
    options: dict[str, Any] = dict(refresh_per_second=4, redirect_stdout=sys.stdout.isatty())
    with Progress(*columns, console=Console(stderr=True), **options) as shown:
        yield Bar(shown, stage, total, unit)


def hide_library_bars() -> None:
    """Switches off the bars of transformers, datasets and the hub, even if transformers is already imported."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ[name] = "1"
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()
