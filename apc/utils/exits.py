"""How errors end a command: one line on stderr and an exit code."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from apc.utils.errors import Terminated, UserError
from apc.utils.files import FULL

GO_ON = "the same command with this run.name goes on from here"


@contextmanager
def one_line_errors(after_interrupt: str) -> Iterator[None]:
    """A UserError, a full disk and want of memory become one line on stderr and exit code 2; Ctrl-C says what comes after it and exits with 130,
    SIGTERM with 143; with 141 where stdout's reader has gone, as of `… | head`."""
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {'' if rank == '0' else f'(rank {rank}) '}{error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        if not nobody_reads():
            raise
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # where what is left to be written goes, which would fail once more
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(
            f"error: {error.filename or 'a file'}: can't be written ({error.strerror}); make room, and {after_interrupt}",
            file=sys.stderr,
        )
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch's own: of a GPU a class, of the host a text
        torch = sys.modules.get("torch")
        of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, RuntimeError) and not of_gpu and "DefaultCPUAllocator" not in str(error):
            raise
        where = "the GPU" if of_gpu else "this machine"
        said = (str(error).splitlines() or ["no more is known"])[0]
        advice = (
            "lower trainer.batch_windows, collect.batch_tokens or predictor.batch_tokens, or set collect.storage=disk"
        )
        print(f"error: {where} has no memory left ({said}); {advice}; {after_interrupt}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would only end this with less said
        print(f"terminated; {after_interrupt}", file=sys.stderr)
        raise


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
