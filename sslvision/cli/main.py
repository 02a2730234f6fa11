"""What all commands share: reading the command line, one run for each point of a sweep, exit codes, and whose folder it is."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from sslvision.cli import compose as cfg
from sslvision.cli.commands import WORK
from sslvision.cli.help import print_help
from sslvision.cli.run_folders import RUN_FOLDER
from sslvision.errors import Diverged, SSLVisionError, Stopped, UsageError
from sslvision.system.failures import explained
from sslvision.system.signals import (
    NOT_REQUEUED,
    Interrupted,
    end_with_launcher,
    raise_interrupted,
    requeue,
    started_by_lightning,
)

typed: list[str] = []  # the command line as the person wrote it


def main(name: str) -> None:
    """Run a command, and exit.

    Exit codes: 0 done, 1 runtime, 2 usage, 3 data, 4 diverged, 5 a file cannot be written; 129 SIGHUP, 130 SIGINT
    (Ctrl-C) and 143 SIGTERM: in training it is saved first. A sweep exits with the largest code of its runs; a signal ends
    all of it.
    """
    command, typed[:] = cfg.COMMANDS[name], sys.argv[1:]
    # Read when torch is loaded, so set before. On a CPU the threads of a step spin while they wait for one another; beside
    # a second program that does so, a step takes ten times as long and more. So they spin briefly, and then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if {"--help", "-h"} & set(typed):
        print_help(Console(highlight=False), command)
        return
    end_with_launcher()
    try:
        raise_interrupted()
        code = _run(command)
    except Interrupted as interrupted:
        code = _complain(_interrupted(interrupted.signum, command))
    sys.exit(code)


def _run(command: cfg.Command[Any]) -> int:
    try:
        sys.argv[1:] = cfg.prepare(typed, command)
    except UsageError as error:
        return _complain(error)
    exit_codes: list[int] = []  # Hydra ignores what a run returns

    def one(composed: DictConfig) -> None:
        """Run one point of the command line; the other points of a sweep run whatever becomes of this one."""
        job = HydraConfig.get()
        sys.argv[1:] = list(job.overrides.task)  # Lightning starts further processes with these words
        number = f"-{job.job.num}" if job.mode is RunMode.MULTIRUN else ""
        try:
            recipe = Path(job.runtime.choices.get("recipe") or command.name).stem
            WORK[command.name](cfg.check(composed, command), recipe, number, typed)
        except Exception as error:
            told = explained(error, os.environ.get(RUN_FOLDER))
            if told is None:
                raise
            exit_codes.append(_complain(told))
            if isinstance(told, Stopped):
                sys.exit(told.exit_code)

    hydra.main(version_base="1.3", config_path=None, config_name=command.name)(one)()
    return max(exit_codes, default=0)


def _interrupted(signum: int, command: cfg.Command[Any]) -> Stopped:
    """Return in words what a signal outside of training ended."""
    resumes = hasattr(command.kind, "resume")
    left = " The last checkpoint, if there is one, is as it was: resume=auto goes on from it." if resumes else ""
    if signal.Signals(signum).name == "SIGUSR1":
        signum = signal.SIGTERM
        left = f" {requeue() if _rank() == '0' else ''}" if "resume=auto" in typed else f" {NOT_REQUEUED}"
    return Stopped(f"{signal.Signals(signum).name} outside of training.{left}", signum)


def _complain(error: SSLVisionError) -> int:
    """Say what is wrong, once for all processes, and return the exit code."""
    where = ""
    if (rank := _rank()) != "0":
        # The first process has the word, and its exit code is what counts. A launcher that saw another one end with an
        # error before would kill it; when it ends, this one is ended too, and not heard.
        agreed = isinstance(error, Stopped | Diverged | UsageError)  # all processes have come to it together
        with contextlib.suppress(Interrupted):
            time.sleep(60 if agreed and started_by_lightning() else 5)
        if agreed:
            return error.exit_code
        where = f" (process {rank})"
    what = "[bold yellow]stopped" if isinstance(error, Stopped) else "[bold red]error"
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{what}{where}:[/] {escape(str(error))}")
    return error.exit_code


def _rank() -> str:
    """Return the number of this process, as whoever started it says."""
    return next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
