"""What `train.py` and `evaluate.py` share: words of the command line, ranks, and how errors end a run."""

import argparse
import ctypes
import dataclasses
import logging
import os
import secrets
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from apc import signals
from apc.config import Config, describe, load_config, to_yaml
from apc.errors import Terminated, UserError
from apc.files import FULL
from apc.models import resolve_device
from apc.runs import new_name

GO_ON = "the same command with this run.name goes on from here"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main(
    description: str,
    run: Callable[[Config], dict],
    defaults: Callable[[str | None, list[str]], Config] = load_config,
    dry_run: Callable[[Config], str] | None = None,
) -> None:
    """Reads the command line, starts the ranks where there are several, and calls `run(config)`.

    dry_run: what `--dry-run` prints instead; None: there is no such flag. Errors end as in `one_line_errors`.
    """
    with one_line_errors(GO_ON):
        options = _parse(description, dry_run is not None)
        words = options.words
        path = words.pop(0) if words and "=" not in words[0] and words[0].endswith((".yaml", ".yml")) else None
        cfg = defaults(path, words)
        if options.print_config:
            print(to_yaml(cfg), end="")
            return
        if dry_run is not None and options.dry_run:
            quiet_libraries()
            print(dry_run(cfg))
            return
        quiet_libraries()
        _keep_freed_memory()
        signal.signal(signal.SIGTERM, signals.terminate)
        if cfg.model.device_map and int(os.environ.get("WORLD_SIZE", cfg.trainer.devices * cfg.trainer.num_nodes)) > 1:
            raise UserError(f"model.device_map={cfg.model.device_map}: spreads one process over all GPUs; set trainer.devices=1, or leave it out")
        if "WORLD_SIZE" in os.environ:
            check_launched(cfg)
        elif cfg.trainer.devices * cfg.trainer.num_nodes > 1:
            sys.exit(launch(cfg))
        if cfg.run.name is None:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError("run.name: not given; several processes need the same one, write run.name=NAME")
            cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, name=new_name()))
        try:
            run(cfg)
        except BrokenPipeError:
            if _nobody_reads():
                print(f"stdout: what read it has gone; {GO_ON}", file=sys.stderr)
            raise


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
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where what is left to be written goes, which would fail once more
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f"error: {error.filename or 'a file'}: can't be written ({error.strerror}); make room, and {after_interrupt}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch's own: of a GPU a class, of the host a text
        of_gpu = isinstance(error, torch.OutOfMemoryError)
        if isinstance(error, RuntimeError) and not of_gpu and "DefaultCPUAllocator" not in str(error):
            raise
        where = "the GPU" if of_gpu else "this machine"
        said = (str(error).splitlines() or ["no more is known"])[0]
        advice = "lower trainer.batch_windows, collect.block_tokens or predictor.batch, or set collect.storage=disk"
        print(f"error: {where} has no memory left ({said}); {advice}; {after_interrupt}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; {after_interrupt}", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would only end this with less said
        print(f"terminated; {after_interrupt}", file=sys.stderr)
        raise


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parse(description: str, with_dry_run: bool) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=describe())
    parser.add_argument("words", nargs="*", metavar="file.yaml | key=value | group=name", help="a YAML file first, then overrides")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    if with_dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print what the run would take (disk, memory, seconds, estimated) and stop")
    return parser.parse_intermixed_args()


def check_launched(cfg: Config) -> None:
    """Raises UserError where the launcher started another number of processes than the configuration names."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    started = {"devices": local, "num_nodes": int(os.environ["WORLD_SIZE"]) // local}
    for key, count in started.items():
        if getattr(cfg.trainer, key) not in (1, count):
            option = {"devices": "--nproc-per-node", "num_nodes": "--nnodes"}[key]
            raise UserError(
                f"trainer.{key}={getattr(cfg.trainer, key)}: torchrun started {count}; give it {option}={getattr(cfg.trainer, key)}, or leave the key out"
            )


def launch(cfg: Config) -> int:
    """Runs this very command line once for each device, as torchrun does, and returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if cfg.trainer.num_nodes > 1:
        raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes}: start this through torchrun on every machine, with run.name=NAME")
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: srun started {os.environ['SLURM_STEP_NUM_TASKS']} of these, and each would start as many; "
            "start one, srun --ntasks=1, or one torchrun on every machine, srun --ntasks-per-node=1 torchrun …"
        )
    for local_rank in range(cfg.trainer.devices):
        resolve_device(cfg.model.device, local_rank)
    name = [] if cfg.run.name else [f"run.name={new_name()}"]  # one folder for all ranks
    settings = LaunchConfig(1, 1, cfg.trainer.devices, rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=secrets.token_hex(4), max_restarts=0)
    if "OMP_NUM_THREADS" not in os.environ:  # ranks whose threads wait for each other's cores are ten times slower
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // cfg.trainer.devices))
    try:
        elastic_launch(settings, sys.executable)(*sys.argv, *name)
    except SignalException as error:  # after it has ended the ranks
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from error
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                cause = f"{failure.signal_name()}{', as for want of memory' if failure.exitcode == -signal.SIGKILL else ''}"
                print(f"error: rank {rank} was killed ({cause}), and all others with it; {GO_ON}", file=sys.stderr)
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    return 0


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks: each step allocates the same large tensors anew, and fresh pages cost a tenth of a CPU run."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def quiet_libraries() -> None:
    """Leaves warnings and errors of the libraries, not their greetings. Lightning's import takes that back."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
