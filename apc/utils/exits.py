"""How errors end a command: one line on stderr and an exit code."""

import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from apc.utils.errors import Terminated, UserError, first_line
from apc.utils.files import FULL

GPU_IS_FULL = "error: the GPU has no memory left"  # how the line begins; `apc sweep` looks for it
GO_ON = "the same command with this run.name goes on from here"

_CUDA_IS_FULL = "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"  # from libraries below torch's allocator


@contextmanager
def one_line_errors(after_interrupt: str) -> Iterator[None]:
    """Turns expected errors into one line on stderr and an exit code.

    Exit codes: 2 for UserError, a full disk, or no memory left; 130 for Ctrl-C; 141 if the reader of stdout is gone, as
    with `… | head`; 143 for SIGTERM. after_interrupt: the end of the line, which says what the user can do next.
    """
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        _end(f"error: {'' if rank == '0' else f'(rank {rank}) '}{error}")
    except BrokenPipeError:
        if not nobody_reads():
            raise
        # Python flushes stdout once more on exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        name = error.filename or "a file"
        _end(f"error: {name}: can't be written ({error.strerror}); make room, and {after_interrupt}")
    except (MemoryError, RuntimeError) as error:
        # torch has a class for a GPU without memory, but only a message for the host.
        torch = sys.modules.get("torch")
        on_gpu = torch is not None and (
            isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _CUDA_IS_FULL)
        )
        if isinstance(error, RuntimeError) and not on_gpu and "DefaultCPUAllocator" not in str(error):
            raise
        begin = GPU_IS_FULL if on_gpu else "error: this machine has no memory left"
        advice = (
            "lower trainer.batch_windows, collect.batch_tokens or predictor.batch_tokens, or set collect.storage=disk"
        )
        _end(f"{begin} ({first_line(error)}); {advice}; {after_interrupt}")
    except KeyboardInterrupt:
        _end(f"interrupted; {after_interrupt}", 130)
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the message short
        print(f"terminated; {after_interrupt}", file=sys.stderr)
        raise


def _end(line: str, code: int = 2) -> None:
    print(line, file=sys.stderr)
    sys.exit(code)


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader closed it."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
