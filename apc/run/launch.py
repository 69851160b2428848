"""Starts one process per device, and checks the processes that another launcher started."""

import os
import secrets
import signal
import sys

from apc.config.schema import Config
from apc.data.models import resolve_device
from apc.run.folder import new_name
from apc.utils.errors import Terminated, UserError
from apc.utils.exits import GO_ON


def check_launched(cfg: Config) -> None:
    """Raises UserError if the launcher started another number of processes than the configuration names."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = int(os.environ["WORLD_SIZE"]) // local
    for key, option, count in (("devices", "--nproc-per-node", local), ("num_nodes", "--nnodes", nodes)):
        wanted = getattr(cfg.trainer, key)
        if wanted not in (1, count):
            raise UserError(
                f"trainer.{key}={wanted}: torchrun started {count}; give it {option}={wanted}, or leave the key out"
            )


def launch(cfg: Config) -> int:
    """Runs this command line once per device, as torchrun does, and returns the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    devices = cfg.trainer.devices
    if cfg.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start this through torchrun on every machine, "
            "with run.name=NAME"
        )
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks > 1:
        raise UserError(
            f"trainer.devices={devices}: srun started this command {tasks} times, and each would start all processes; "
            "start it once (srun --ntasks=1), or one torchrun per machine (srun --ntasks-per-node=1 torchrun …)"
        )
    for local_rank in range(devices):
        resolve_device(cfg.model.device, local_rank)
    name = [] if cfg.run.name else [f"run.name={new_name()}"]  # one folder for all ranks
    run_id = secrets.token_hex(4)
    settings = LaunchConfig(
        1, 1, devices, run_id=run_id, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )
    if "OMP_NUM_THREADS" not in os.environ:  # ranks are ten times slower when their threads compete for cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // devices))
    script = sys.argv[0]
    program = [script] if os.path.isfile(script) else ["-m", *script.split()]  # the command `apc` runs `-m apc COMMAND`
    try:
        elastic_launch(settings, sys.executable)(*program, *sys.argv[1:], *name)
    except SignalException as error:  # the ranks have ended by then
        raise (KeyboardInterrupt if error.sigval == signal.SIGINT else Terminated) from error
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0:
                hint = ", perhaps out of memory" if failure.exitcode == -signal.SIGKILL else ""
                killed = f"rank {rank} was killed ({failure.signal_name()}{hint}), and all others with it"
                print(f"error: {killed}; {GO_ON}", file=sys.stderr)
        return next((failure.exitcode for failure in error.failures.values() if failure.exitcode > 0), 1)
    return 0
