"""The one error that a user can cause: bad input, a missing file, a machine that lacks something."""


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do about it.

    Entry points print it after `error:` and exit with code 2; a traceback would only hide it.
    """


class Terminated(SystemExit):
    """The process was asked to end (SIGTERM, as SLURM sends before it takes a machine back), and what it had is kept. Exit code 143."""

    def __init__(self):
        super().__init__(143)
