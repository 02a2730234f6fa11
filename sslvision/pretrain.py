"""The command line of stage one: `python -m sslvision.pretrain recipe=mae`. What it runs is in stage_one.py."""

import os
import sys
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from sslvision import config as cfg
from sslvision.errors import SSLVisionError, UsageError
from sslvision.help import print_help
from sslvision.schema import Pretrain

RUN_FOLDER = "SSLVISION_RUN_FOLDER"  # how a process that Lightning starts learns the folder of the first one
_exit_codes: list[int] = []  # of the runs of this call; Hydra ignores what a run returns
_typed: list[str] = []  # the command line as the person wrote it


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 runtime, 2 usage, 3 data, 4 diverged."""
    _typed[:] = sys.argv[1:]
    # Read when torch is loaded, so set before. On a CPU the threads of a step spin while they wait for one another; beside
    # a second program that does so, a step takes ten times as long and more. So they spin briefly, and then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if {"--help", "-h"} & set(_typed):
        print_help(Console(highlight=False))
        return
    try:
        sys.argv[1:] = cfg.prepare(_typed)
    except UsageError as error:
        sys.exit(_complain(error))
    _run_one()
    sys.exit(max(_exit_codes, default=0))


@hydra.main(version_base="1.3", config_path=None, config_name="pretrain")
def _run_one(composed: DictConfig) -> None:
    """Run one point of the command line; the other points of a sweep run whatever becomes of this one."""
    job = HydraConfig.get()
    sys.argv[1:] = list(job.overrides.task)  # Lightning starts further processes with these words
    number = f"-{job.job.num}" if job.mode is RunMode.MULTIRUN else ""
    try:
        from sslvision.stage_one import pretrain  # seconds of imports, after all that can be refused was

        config = cfg.check(composed)
        pretrain(config, run_folder(config, Path(job.runtime.choices["recipe"]).stem, number), words=_typed)
    except SSLVisionError as error:
        _exit_codes.append(_complain(error))


def run_folder(config: Pretrain, recipe: str, number: str) -> Path:
    """Return the run's folder, the same one in all processes of the run.

    Args:
        config: all settings.
        recipe: the recipe's name, which names the folder if nothing else does.
        number: tells the runs of a sweep apart; empty for a single run.

    Raises:
        UsageError: no name was given where one is needed.
    """
    if "LOCAL_RANK" in os.environ and RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    name = config.name
    if name is None and config.output_dir is None:
        if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
            raise UsageError("The processes of this run must agree on its folder: give it a name, name=...")
        if config.resume == "auto":
            raise UsageError("resume=auto goes on in a folder that has a name: say which, name=... or output_dir=...")
        name = f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(config.output_dir) if config.output_dir else Path("outputs") / str(name)
    suffix = ("-dry-run" if config.dry_run else "") + number
    folder = folder.with_name(folder.name + suffix).absolute()
    os.environ[RUN_FOLDER] = str(folder)
    return folder


def _complain(error: SSLVisionError) -> int:
    """Say what is wrong, once for all processes, and return the exit code."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
    if rank == "0":
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
    return error.exit_code


if __name__ == "__main__":
    main()
