"""Runs as jobs of SLURM, by submitit: a run as one job, those of a sweep as one job array.

Every job runs the command line of its run with `output_dir=`, which is fixed when it is submitted, and with `resume=auto`.
SLURM sends SIGUSR1 before the time limit; the run saves its state and requeues its job (system/signals.py), which then begins
with the same command line and resumes. submitit's own way (SIGUSR2, and a copy of the arguments for each restart) is not used.
"""

import importlib.util
import math
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from sslvision.cli.commands import folder_of, has_trainings
from sslvision.cli.compose import Run
from sslvision.cli.recipes import Command
from sslvision.cli.slurm_settings import SlurmJobs
from sslvision.cli.surroundings import surroundings_restored
from sslvision.errors import UsageError
from sslvision.runs.redaction import redact

LOGS = "slurm-jobs"  # folder beside the run folders


def runs_under_slurm(kind: type[Any]) -> bool:
    """Return whether runs with settings of this class can be submitted: those that have a folder of their own."""
    return {"name", "output_dir"} <= {field.name for field in fields(kind)}


def submit(runs: Sequence[Run[Any]], jobs: SlurmJobs, command: Command[Any]) -> None:
    """Submit runs to SLURM, and print their jobs, folders and logs.

    Args:
        runs: The runs, composed and checked.
        jobs: What they need.
        command: Their command.

    Raises:
        UsageError: A run cannot be a job, submitit or SLURM is absent, or SLURM refuses; nothing is submitted then.
    """
    if not runs_under_slurm(command.kind):
        raise UsageError(
            f"slurm.time={jobs.time}: sslvision {command.name} has no run folder, and submits no jobs. Leave slurm.* out, and "
            f"submit the command: sbatch --wrap 'python -m sslvision.{command.name} ...'."
        )
    nodes, processes = _processes(runs, jobs)
    with surroundings_restored():
        folders = [_own_folder(run) for run in runs]
    lines = [_words_of_job(run, folder) for run, folder in zip(runs, folders, strict=True)]
    logs = folders[0].parent / LOGS
    executor = _executor(logs)
    executor.update_parameters(
        job_name=f"{command.name}-{folders[0].name.removesuffix(runs[0].suffix)}",
        time=math.ceil(jobs.seconds / 60),
        nodes=nodes,
        ntasks_per_node=processes,
        cpus_per_task=jobs.cpus,
        gpus_per_node=jobs.gpus or None,
        mem=None if jobs.memory_gb is None else f"{math.ceil(jobs.memory_gb * 1024)}M",
        partition=jobs.partition,
        account=jobs.account,
        qos=jobs.qos,
        array_parallelism=jobs.at_once or len(runs),
        setup=None if jobs.setup is None else [jobs.setup],
        stderr_to_stdout=True,
        # SLURM 22.05 and later: srun does not take the cores from sbatch.
        srun_args=["--kill-on-bad-exit=1", *([] if jobs.cpus is None else [f"--cpus-per-task={jobs.cpus}"])],
        additional_parameters={"signal": f"USR1@{jobs.signal_seconds}", "requeue": True, **jobs.sbatch},
    )
    submitted = _submitted(executor, command.name, lines)
    _tell(submitted, runs, folders, jobs, nodes, processes, logs)


def _processes(runs: Sequence[Run[Any]], jobs: SlurmJobs) -> tuple[int, int]:
    """Return the nodes of each run and the processes on each of them, as its Trainer counts them."""
    counted = {}
    for run in runs:
        trainer = getattr(run.settings, "trainer", {})
        devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
        if not str(devices).isdecimal() or int(devices) < 1:
            raise UsageError(
                f"trainer.devices={devices}: a job asks SLURM for a number of processes on each node. Say trainer.devices=8."
            )
        if "devices" not in trainer and jobs.gpus > 1:
            raise UsageError(
                f"slurm.gpus={jobs.gpus} without trainer.devices, one process for each GPU: add trainer.devices={jobs.gpus}."
            )
        counted[int(nodes), int(devices)] = run.suffix
    if len(counted) > 1:
        raise UsageError(
            "The runs of this sweep differ in trainer.devices or trainer.num_nodes, and the jobs of an array all have the "
            "same. Submit them apart."
        )
    return next(iter(counted))


def _own_folder(run: Run[Any]) -> Path:
    """Return the folder of a run, after checking that the run may be started there, and again."""
    settings, folder = run.settings, folder_of(run)
    assert folder is not None
    if getattr(settings, "overwrite", False):
        raise UsageError(
            f"overwrite=true would delete what a run has done when SLURM starts its job again. Delete {folder} yourself, or "
            "choose another name=."
        )
    if getattr(settings, "resume", None) not in (None, "auto"):
        raise UsageError(
            f"resume={settings.resume}: jobs resume from their own run folder, with resume=auto, when SLURM starts them again. "
            "Start from weights with init_from=, or give the run's folder with output_dir= and resume=auto."
        )
    in_use = folder.is_dir() and any(folder.iterdir())
    if in_use and _resumes(settings) and settings.resume is None and not settings.dry_run:
        raise UsageError(f"{folder} is in use: resume what is there with resume=auto, or choose another name=.")
    return folder


def _resumes(settings: Any) -> bool:
    """Return whether a run goes on by resume=auto. Other commands go on by themselves, or begin again."""
    return hasattr(settings, "resume") and not has_trainings(settings)


def _words_of_job(run: Run[Any], folder: Path) -> list[str]:
    """Return the command line of a job."""
    secret = [word for word in run.words if redact([word]) != [word]]
    if secret:
        key = secret[0].split("=")[0]
        raise UsageError(
            f"{key}: its value is a secret, and the command line of a job is kept in a file. Give it as an environment "
            "variable, which jobs inherit: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY."
        )
    ours = ("name", "output_dir", *(["resume"] if _resumes(run.settings) else []))
    words = [word for word in run.words if word.removeprefix("~").split("=")[0] not in ours]
    return [*words, f"output_dir={folder}", *(["resume=auto"] if _resumes(run.settings) else [])]


def _executor(logs: Path) -> Any:
    """Return submitit's executor."""
    if importlib.util.find_spec("submitit") is None:
        raise UsageError("slurm.* needs submitit, which is not installed: pip install 'sslvision[slurm]'")
    import submitit

    try:
        return submitit.SlurmExecutor(folder=logs)
    except RuntimeError as error:
        raise UsageError(
            "slurm.*: there is no SLURM here (no srun). Submit from a login node of the cluster, or leave slurm.* out to run "
            "here, one run after another."
        ) from error


def _submitted(executor: Any, name: str, lines: Sequence[list[str]]) -> list[str]:
    """Submit, and return the numbers of the jobs."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with executor.batch():
            jobs = [executor.submit(run_job, name, line, os.getcwd()) for line in lines]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        told = " ".join(line for line in str(error).splitlines() if "sbatch: error" in line) or str(error)
        raise UsageError(f"SLURM does not take the job: {told.replace('sbatch: error: ', '')}") from error
    return [job.job_id for job in jobs]


def _tell(
    submitted: Sequence[str],
    runs: Sequence[Run[Any]],
    folders: Sequence[Path],
    jobs: SlurmJobs,
    nodes: int,
    processes: int,
    logs: Path,
) -> None:
    """Print what was submitted."""
    console = Console(soft_wrap=True, highlight=False)
    number = submitted[0].split("_")[0]
    cores = "" if jobs.cpus is None else f", {jobs.cpus} cores each"
    what = f"job {number}" if len(runs) == 1 else f"{len(runs)} runs as job array {number}"
    console.print(
        f"Submitted {what}: {nodes} x {processes} processes{cores}, {jobs.gpus or 'no'} GPUs on each node, time limit "
        f"{jobs.time}."
    )
    shared = set(runs[0].words).intersection(*(run.words for run in runs))
    for job, run, folder in zip(submitted, runs, folders, strict=True):
        own = " ".join(word for word in run.words if word not in shared)
        console.print(escape(f"  {job}  {folder}  {own}".rstrip()))
    log = logs / f"{submitted[0]}_0_log.out"
    console.print(
        escape(f"Logs: {log}{' and so on' if len(runs) > 1 else ''}\nState: squeue --me   End: scancel {number}")
    )


def run_job(name: str, words: list[str], folder: str) -> None:
    """Run a command line in this process, as its job does.

    Args:
        name: Name of the command.
        words: Its command line.
        folder: The folder it was submitted from.

    Raises:
        SystemExit: The command has ended with another exit code than 0, which SLURM then has too.
    """
    from sslvision.cli.main import main

    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # SLURM sends it before SIGTERM, and submitit would warn of it
    os.chdir(folder)
    sys.path[:0] = [] if "" in sys.path else [""]  # methods and sources of one's own, as by `python -m`
    sys.argv = [f"sslvision.{name}", *words]
    try:
        main(name, words)
    except SystemExit as end:
        if end.code:
            raise
