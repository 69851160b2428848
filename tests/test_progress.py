"""A bar names its stage and figure on a terminal; a log file gets whole lines only."""

import io
import sys

import pytest

from apc.utils import distributed
from apc.utils.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(**options):
    with progress(8, "collect", **options) as bar:
        bar.update(3)
        print("a line")
        bar.update(5)
    return sys.stderr.getvalue()


def test_on_a_terminal_the_bar_shows_stage_and_speed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Terminal())
    output = shown(unit="tokens")
    assert "collect" in output and "100 %" in output and "tokens/s" in output
    assert capsys.readouterr().out == "a line\n"  # stdout is no terminal, so its lines stay there


@pytest.mark.parametrize("reason", ["no-terminal", "switched-off", "rank-1"])
def test_no_bar_is_shown(monkeypatch, reason):
    monkeypatch.setattr(sys, "stderr", io.StringIO() if reason == "no-terminal" else Terminal())
    monkeypatch.setattr(distributed, "is_main", lambda: reason != "rank-1")
    assert shown(enabled=reason != "switched-off") == ""
