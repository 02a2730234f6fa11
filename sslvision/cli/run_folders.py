"""The folder of a run, the same one in all its processes."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from sslvision.errors import UsageError

RUN_FOLDER = "SSLVISION_RUN_FOLDER"  # how a process that Lightning starts learns the folder of the first one


def choose_run_folder(settings: Any, default: str, number: str, *, dated: bool = True) -> Path:
    """Return the run's folder, the same one in all processes of the run.

    Args:
        settings: has `name` and `output_dir`, and may have `resume` and `dry_run`.
        default: names the folder if nothing else does.
        number: tells the runs of a sweep apart; empty for a single run.
        dated: whether the time goes into the default name.

    Raises:
        UsageError: no name was given where one is needed.
    """
    if "LOCAL_RANK" in os.environ and RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    name = settings.name
    if name is None and settings.output_dir is None:
        if dated and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
            raise UsageError("The processes of this run must agree on its folder: give it a name, name=...")
        if dated and getattr(settings, "resume", None) == "auto":
            raise UsageError("resume=auto goes on in a folder that has a name: say which, name=... or output_dir=...")
        name = f"{default}-{datetime.now():%Y%m%d-%H%M%S}" if dated else default
    folder = Path(settings.output_dir) if settings.output_dir else Path("outputs") / str(name)
    suffix = ("-dry-run" if getattr(settings, "dry_run", False) else "") + number
    folder = folder.with_name(folder.name + suffix).absolute()
    os.environ[RUN_FOLDER] = str(folder)
    return folder
