"""What all commands share: the command line, one run for each point of a sweep, exit codes, and signals."""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from sslvision.cli.commands import has_trainings, work
from sslvision.cli.compose import Run, compose_runs
from sslvision.cli.help import print_help
from sslvision.cli.recipes import COMMANDS, Command
from sslvision.cli.slurm_settings import slurm_jobs
from sslvision.cli.surroundings import surroundings_restored
from sslvision.cli.words import as_settings, split_words
from sslvision.errors import Diverged, SSLVisionError, Stopped, UsageError
from sslvision.runs.redaction import redact
from sslvision.runs.run_folder import RUN_FOLDER
from sslvision.system.failures import explained
from sslvision.system.resuming import command_to_resume
from sslvision.system.signals import (
    NOT_REQUEUED,
    Interrupted,
    end_at_once,
    end_with_launcher,
    raise_interrupted,
    requeue,
    started_by_lightning,
)
from sslvision.workflows.embedding_settings import Embed
from sslvision.workflows.packing_settings import Pack


def main(name: str, words: Sequence[str] | None = None) -> None:
    """Run a command, and exit.

    Exit codes: 0 done, 1 runtime, 2 usage, 3 data, 4 diverged, 5 a file cannot be written; 129 SIGHUP, 130 SIGINT
    (Ctrl-C) and 143 SIGTERM: in training, a checkpoint is saved first. A sweep exits with the largest code of its runs; a
    signal ends all of it.

    Args:
        name: Name of the command.
        words: Command line after the command's name; by default all of it.
    """
    command = COMMANDS[name]
    words = as_settings(list(sys.argv[1:] if words is None else words), command.words)
    # OpenMP reads this when torch is loaded. The threads of a step spin while they wait for one another; beside a second
    # program that does so too, a step takes ten times as long and more. So they spin briefly, and then sleep.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if {"--help", "-h"} & set(words):
        print_help(Console(highlight=False), command)
        return
    end_with_launcher()
    try:
        raise_interrupted()
        code = _run_all(command, words)
    except Interrupted as interrupted:
        code = _complain(_interrupted(interrupted.signum, command, words))
    end_at_once()
    sys.exit(code)


def _run_all(command: Command[Any], words: list[str]) -> int:
    """Compose and check all runs of a command line, then do them one after another; return the largest exit code."""
    try:
        line = split_words(words)
        jobs = slurm_jobs(line.slurm) if line.slurm else None
        runs = compose_runs(line, command)
    except UsageError as error:
        return _complain(error)
    if line.show:
        settings = [dataclasses.asdict(run.settings) for run in runs]
        print(yaml.safe_dump_all(settings, sort_keys=False, allow_unicode=True), end="")
        return 0
    if jobs is not None:
        from sslvision.cli.slurm_array import submit

        try:
            submit(runs, jobs, command)
        except UsageError as error:
            return _complain(error)
        return 0
    codes = [0]
    for run in runs:
        with _command_line(run, words) if line.sweep else contextlib.nullcontext():
            try:
                work(run, words)()
            except Interrupted as interrupted:
                return _complain(_interrupted(interrupted.signum, command, words, run.settings))
            except Exception as error:
                told = explained(error, os.environ.get(RUN_FOLDER))
                if told is None:
                    raise
                codes.append(_complain(told))
                if isinstance(told, Stopped):
                    return told.exit_code
    return max(codes)


@contextlib.contextmanager
def _command_line(run: Run[Any], words: Sequence[str]) -> Iterator[None]:
    """Let one run of a sweep find the command line that it would find alone: Lightning starts processes with sys.argv."""
    argv = list(sys.argv)
    sys.argv[len(argv) - len(words) :] = run.words
    try:
        with surroundings_restored():
            yield
    finally:
        sys.argv[:] = argv


def _interrupted(signum: int, command: Command[Any], words: Sequence[str], settings: Any = None) -> Stopped:
    """Return the message for a signal outside of training: what is left, and how to go on.

    Args:
        signum: The signal.
        command: The command.
        words: Its command line.
        settings: The settings of the run that was interrupted, if one had begun.
    """
    name = signal.Signals(signum).name
    if has_trainings(settings):
        told = f"{name}. {_left_of_trainings(command, words, settings)}"
    elif isinstance(settings, Embed | Pack):
        told = (
            f"{name}. The files that are written are kept, and the same command goes on: "
            f"{shlex.join(['python', '-m', f'sslvision.{command.name}', *redact(_without_overwrite(words))])}"
        )
    else:
        told = f"{name} outside of training.{_left_of_run(settings) if name != 'SIGUSR1' else ''}"
    if name != "SIGUSR1":
        return Stopped(told, signum)
    why_not = _why_not_requeued(words, settings)
    outcome = why_not or (requeue() if _rank() == "0" else "")
    return Stopped(f"{told} {outcome}", signal.SIGTERM)


def _left_of_run(settings: Any) -> str:
    """Return how to go on with a run that was interrupted outside of training; nothing if it leaves nothing to resume."""
    folder = os.environ.get(RUN_FOLDER)
    if not hasattr(settings, "resume") or not folder:
        return ""
    if any(Path(folder).glob("checkpoints/*.ckpt")):
        return f" The last checkpoint is intact; resume with: {command_to_resume(folder)}"
    in_use = settings.resume is None and not settings.overwrite and (Path(folder) / "config.yaml").is_file()
    named = settings.name is not None or settings.output_dir is not None
    add = ", with overwrite=true, as its folder is in use" if in_use and named else ""
    return f" No checkpoint was saved before: start it again{add}."


def _why_not_requeued(words: Sequence[str], settings: Any) -> str:
    """Return why SLURM should not start the same command line again; nothing if it should, because that goes on.

    Args:
        words: The command line.
        settings: The settings of the run that was interrupted; None if none had begun.
    """
    keeps = has_trainings(settings) or isinstance(settings, Embed | Pack)
    if keeps and settings.overwrite:
        return "The job is not requeued: its command has overwrite=true, which would delete what is kept."
    if keeps and getattr(settings, "dry_run", False):
        return "The job is not requeued, as a dry run begins anew."
    if keeps:
        return ""
    if settings is not None and not hasattr(settings, "resume"):
        return "The job is not requeued: this command begins anew each time. Submit it with a longer --time."
    if getattr(settings, "resume", None) != "auto" and "resume=auto" not in words:
        return NOT_REQUEUED
    folder, starts = os.environ.get(RUN_FOLDER), int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    if folder and starts >= 3 and not any(Path(folder).glob("checkpoints/*.ckpt")):
        return (
            f"The job is not requeued: in none of its {starts} starts was there time for an update. Submit it with a longer "
            "--time, or a --signal nearer to its end."
        )
    return ""


def _left_of_trainings(command: Command[Any], words: Sequence[str], settings: Any) -> str:
    """Return how many trainings of a comparison or ladder are kept, and the command that goes on with the others."""
    if settings.dry_run:
        return "This was a dry run, which is not resumed: start it again."
    folder = Path(os.environ.get(RUN_FOLDER, ""))
    if hasattr(settings, "ranges"):
        record, end = (folder / "steps.jsonl", "}\n") if settings.search is None else (folder / "trials.csv", "\n")
    else:
        record, end = folder / ("rungs.jsonl" if hasattr(settings, "rungs") else "cells.jsonl"), "}\n"
    ended = sum(line.endswith(end) for line in record.open()) if record.is_file() else 0
    ended -= record.suffix == ".csv" and ended > 0  # its first line has the names of columns
    kept = "1 training has ended and is" if ended == 1 else f"{ended} trainings have ended and are"
    again = _without_overwrite(words)
    left_out = ""
    if settings.overwrite:
        left_out = " (without overwrite=true, which would delete them)"
        again += ["overwrite=false"] if len(again) == len(words) else []  # it is the recipe's
    line = shlex.join(["python", "-m", f"sslvision.{command.name}", *redact(again)])
    return f"{kept} kept in {folder}; the one under way begins anew. The same command goes on{left_out}: {line}"


def _without_overwrite(words: Sequence[str]) -> list[str]:
    return [word for word in words if word.split("=")[0] != "overwrite"]


def _complain(error: SSLVisionError) -> int:
    """Print what is wrong, once for all processes, and return the exit code."""
    where = ""
    if (rank := _rank()) != "0":
        # The first process reports, and its exit code counts. A launcher that saw another process end with an error before
        # would kill it; when it ends, this one is ended too, and prints nothing.
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
    """Return the number of this process, as its launcher tells it."""
    return next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), "0")
