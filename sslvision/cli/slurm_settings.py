"""The settings `slurm.KEY`: with them, the runs of a command line become jobs of SLURM."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sslvision.cli.check_settings import fit
from sslvision.cli.values import literal, value_of
from sslvision.errors import UsageError
from sslvision.settings import at_least, option, seconds_of

# Options of sbatch that are set for every job, and what to use instead.
OURS = {
    "time": "slurm.time",
    "signal": "slurm.signal_seconds",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "mem": "slurm.memory_gb",
    "cpus-per-task": "slurm.cpus",
    "gpus-per-node": "slurm.gpus",
    "nodes": "trainer.num_nodes",
    "ntasks": "trainer.devices and trainer.num_nodes",
    "ntasks-per-node": "trainer.devices",
    "array": "-m, with slurm.at_once",
    "job-name": "name",
    "requeue": "nothing: jobs are requeued",
    "no-requeue": "nothing: jobs are requeued, or they would not go on",
    "output": "nothing: the log has the number of the job, and the path is printed",
    "error": "nothing: the log has the number of the job, and the path is printed",
    "open-mode": "nothing: a job that is started again appends to its log",
}


@dataclass
class SlurmJobs:
    """Settings of SLURM, for any command: `slurm.time=2h` submits its runs, those of a sweep (`-m`) as one job array."""

    time: str = option(
        "", "time limit of a run, such as 90m, 24h or 3d; before it, the run saves its state, and SLURM starts it again"
    )
    partition: str | None = option(None, "partition of the cluster (default: the cluster's)")
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    gpus: int = option(0, "GPUs on each node; trainer.devices is how many of them are used")
    cpus: int | None = option(None, "CPU cores of each process, of which there are trainer.devices on each node")
    memory_gb: float | None = option(None, "memory on each node, in GB")
    at_once: int | None = option(None, "runs of a sweep at the same time (default: as many as there is room for)")
    signal_seconds: int = option(
        300, "seconds before the time limit at which a run saves its state; SLURM is up to 60 seconds early"
    )
    setup: str | None = option(None, "shell commands before a run, such as 'module load cuda'")
    sbatch: dict[str, Any] = option({}, "any other option of sbatch: slurm.sbatch.constraint=a100")

    def __post_init__(self) -> None:
        at_least(self, gpus=0, signal_seconds=1)
        for key in ("cpus", "at_once", "memory_gb"):
            if (value := getattr(self, key)) is not None and value <= 0:
                raise UsageError(f"slurm.{key}={value} must be more than 0.")
        if not self.time:
            raise UsageError("slurm.time is not given: say slurm.time=2h, the time limit of each run (90m, 24h, 3d).")
        if not self.seconds:
            raise UsageError(f"slurm.time={self.time} must be a time above 0, such as 90m, 24h or 3d.")
        if self.signal_seconds >= self.seconds:
            raise UsageError(
                f"slurm.signal_seconds={self.signal_seconds} is no less than the time limit, slurm.time={self.time}: runs "
                "would be stopped before they begin. Give more time, or fewer seconds."
            )

    @property
    def seconds(self) -> float:
        """Return the time limit in seconds; 0 for what is no time."""
        return seconds_of(self.time) or 0.0


def slurm_jobs(texts: Mapping[str, str]) -> SlurmJobs:
    """Return the checked settings of SLURM.

    Args:
        texts: Texts of `slurm.KEY`, by KEY.

    Raises:
        UsageError: An unknown key, or a value of the wrong type or range.
    """
    kinds, values, others = {one.name: one.type for one in fields(SlurmJobs)}, {}, {}
    for key, text in texts.items():
        name, _, of_sbatch = key.partition(".")
        if name == "sbatch" and of_sbatch:
            others[_of_sbatch(of_sbatch)] = _value_for_sbatch(text)
        elif name not in kinds or of_sbatch or name == "sbatch":
            near = difflib.get_close_matches(name, kinds, n=1)
            hint = f"Did you mean slurm.{near[0]}?" if near else f"They are {', '.join(kinds)}."
            raise UsageError(
                f"There is no setting slurm.{key}. {hint} Any other option of sbatch is slurm.sbatch.OPTION=VALUE."
            )
        else:
            values[name] = fit(f"slurm.{name}", value_of(f"slurm.{name}", text, kinds[name]), kinds[name])
    return SlurmJobs(**values, sbatch=others)


def _of_sbatch(option: str) -> str:
    """Return the name of an option of sbatch, after checking that it is not ours to set."""
    name = option.replace("_", "-")
    if name in OURS:
        raise UsageError(f"slurm.sbatch.{option} is set by sslvision; use {OURS[name]}.")
    return name


def _value_for_sbatch(text: str) -> str | bool:
    """Return the value of an option of sbatch; True for one without a value."""
    return True if text.lower() == "true" else str(literal(text))
