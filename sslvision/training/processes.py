"""How many processes train, what they are told of one another, and how long they wait for one another."""

import atexit
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import pytorch_lightning as L
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy, ParallelStrategy, Strategy, StrategyRegistry

from sslvision.errors import UsageError
from sslvision.system.failures import PROCESS_KILLED
from sslvision.training.sharding import FSDP2

SHARDED = "fsdp2"
REFUSED = {  # beginnings of the names of strategies that train something else than one process would, without a word
    "fsdp": "flattens parameters, so that weight decay spares all of them, and skips an update in one process only",
    "deepspeed": "keeps gradients where neither clipping nor the skipping of non-finite updates sees them",
}


def refuse_wrong(strategy: str, *, pretrains: bool) -> None:
    """Raise UsageError for a strategy that would train something else, without a word, and for shards in fine-tuning."""
    if strategy == SHARDED and not pretrains:
        raise UsageError(
            f"trainer.strategy={SHARDED} is for pretraining only: use trainer.strategy=ddp, and activation_checkpointing=true "
            "or trainer.accumulate_grad_batches=2 if memory is short."
        )
    for beginning, why in REFUSED.items():
        if strategy.startswith(beginning) and strategy != SHARDED:
            raise UsageError(
                f"trainer.strategy={strategy} {why}: use trainer.strategy={SHARDED}, which shards weights and the optimizer's "
                "state over the processes, or trainer.strategy=ddp, if they fit in one device."
            )


def strategy_for(options: Mapping[str, Any], timeout: int) -> Any:
    """Return the strategy for Lightning: `trainer.strategy`, with a timeout wherever it has one.

    Args:
        options: The user's `trainer.*` settings.
        timeout: Seconds that a process waits for the others.
    """
    name, wait = options.get("strategy", "auto"), timedelta(seconds=timeout)
    if name == SHARDED:
        return FSDP2(timeout=wait)
    registered = StrategyRegistry[name]["strategy"] if name in StrategyRegistry.available_strategies() else None
    if isinstance(name, str) and registered is DDPStrategy:
        return DDPStrategy(**{"timeout": wait, **StrategyRegistry[name]["init_params"]})
    return name


def set_timeout(strategy: Strategy, timeout: int) -> None:
    """Set the timeout of a strategy that Lightning has chosen itself, as for several devices without `trainer.strategy`."""
    if isinstance(strategy, DDPStrategy):
        strategy._timeout = timedelta(seconds=timeout)


def join_restarted(strategy: Strategy, environment: Mapping[str, str] = os.environ) -> bool:
    """Join the other processes if torchrun has started all of them again, on one node; return whether it did.

    torchrun (2.14) keeps the store where processes leave their addresses, so that one that is started again finds the address
    of a process that is gone, if it is faster than its successor (pytorch/pytorch#135712). Here each start has keys of its
    own. On several nodes, no number of the start is the same everywhere.

    Args:
        strategy: The Trainer's, before training.
        environment: The environment variables.
    """
    start = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0" or environment.get("GROUP_WORLD_SIZE", "1") != "1" or dist.is_initialized():
        return False
    if not isinstance(strategy, ParallelStrategy) or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    timeout = getattr(strategy, "_timeout", timedelta(seconds=1800))
    address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    dist.init_process_group(
        "nccl" if strategy.root_device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"start {start}", dist.TCPStore(*address, is_master=False, timeout=timeout)),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
        timeout=timeout,
    )
    atexit.register(dist.destroy_process_group)
    return True


def check_processes(devices: int, nodes: int, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the processes that torchrun or SLURM has started with those that the Trainer counts.

    Args:
        devices: Devices of the Trainer on this node.
        nodes: Nodes of the Trainer.
        environment: The environment variables.

    Raises:
        UsageError: They differ. Without this, processes would train alone, side by side in one folder, or wait for others that
            never come.
    """
    started = _started(environment, alone=devices * nodes == 1)
    if started is None or started[1:] == (devices * nodes, nodes):
        return
    who, processes, on_nodes = started
    each, rest = divmod(processes, on_nodes)
    if processes == 1:
        advice = f"Start as many as that (torchrun --nproc-per-node={devices}, or srun --ntasks-per-node={devices})"
    elif rest:
        advice = f"Start equally many on each of the {on_nodes} nodes"
    else:
        advice = f"Set trainer.devices={each} trainer.num_nodes={on_nodes}"
    raise UsageError(
        f"{who} has started {_count(processes, 'process', 'processes')} on {_count(on_nodes, 'node', 'nodes')}, and the "
        f"Trainer counts {devices * nodes}: trainer.devices={devices} x trainer.num_nodes={nodes}. {advice}."
    )


def _started(environment: Mapping[str, str], *, alone: bool) -> tuple[str, int, int] | None:
    """Return who has started the processes, how many, and on how many nodes; None if that is Lightning's to do."""
    if "TORCHELASTIC_RUN_ID" in environment:
        world = int(environment["WORLD_SIZE"])
        return "torchrun", world, int(environment.get("GROUP_WORLD_SIZE", 1))
    interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")  # Lightning then starts processes itself
    if "SLURM_STEP_NUM_TASKS" in environment and not interactive:  # srun
        return "srun", int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", 1))
    # Without srun, Lightning takes the job's tasks for processes; one alone may be trained so.
    if "SLURM_NTASKS" in environment and not interactive and not alone:
        return "SLURM", int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
    return None


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def tell_of_lost_processes(trainer: L.Trainer) -> None:
    """Let the first process say that one which it started was killed, before Lightning kills all others without a word.

    Call it before training: Lightning looks every five seconds, this does every half.
    """
    launcher = getattr(trainer.strategy, "launcher", None)
    if not isinstance(trainer.strategy, ParallelStrategy) or not hasattr(launcher, "procs"):
        return
    threading.Thread(target=_watch, args=(launcher,), daemon=True, name="lost-processes").start()


def _watch(launcher: Any) -> None:
    ended = False
    while not ended:
        time.sleep(0.5)
        ended = bool(launcher.procs) and all(process.poll() is not None for process in launcher.procs)
        for rank, code in lost(launcher.procs):
            print(PROCESS_KILLED.format(rank=rank, signal=-code), file=sys.stderr, flush=True)
            return


def lost(processes: Sequence[subprocess.Popen[bytes]]) -> list[tuple[int, int]]:
    """Return rank and exit code of those that a signal has killed; others have told themselves why they ended."""
    codes = [(rank, process.poll()) for rank, process in enumerate(processes, start=1)]
    return [(rank, code) for rank, code in codes if code is not None and code < 0]
