"""Errors that end a command with one line instead of a traceback."""


class UserError(Exception):
    """Bad input, a missing file, or a machine that lacks something, in one line: what, where, and what to do."""


class Terminated(SystemExit):
    """SIGTERM asked the process to end, as SLURM does before it takes a machine back. Exit code 143."""

    def __init__(self) -> None:
        super().__init__(143)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
