"""The folder of a run: `name=`, `output_dir=` or a default becomes a path, the same in all processes of the run."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from sslvision.errors import UsageError

RUN_FOLDER = "SSLVISION_RUN_FOLDER"  # tells processes that Lightning starts the folder of the first one


def choose_run_folder(settings: Any, default: str, number: str, *, dated: bool = True) -> Path:
    """Return the folder of a run, the same in all its processes.

    Args:
        settings: Settings with `name` and `output_dir`, and perhaps `resume` and `dry_run`.
        default: Name of the folder if the settings give none.
        number: Ending of the name that tells the runs of a sweep apart; empty for a single run.
        dated: Whether the time is part of the default name.

    Raises:
        UsageError: No name was given where one is needed.
    """
    if "LOCAL_RANK" in os.environ and RUN_FOLDER in os.environ:
        return Path(os.environ[RUN_FOLDER])
    name = settings.name
    if name is None and settings.output_dir is None:
        if dated and int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
            raise UsageError("All processes of this run need the same folder: give it a name, name=...")
        if dated and getattr(settings, "resume", None) == "auto":
            raise UsageError("resume=auto needs to know which run folder: give name=... or output_dir=...")
        name = f"{default}-{datetime.now():%Y%m%d-%H%M%S}" if dated else default
    folder = Path(settings.output_dir) if settings.output_dir else Path("outputs") / str(name)
    # The message of an interrupted dry run names its folder: name=a-dry-run resume=auto.
    is_dry = getattr(settings, "dry_run", False) and "-dry-run" not in folder.name
    suffix = ("-dry-run" if is_dry else "") + number
    folder = folder.with_name(folder.name + suffix).absolute()
    os.environ[RUN_FOLDER] = str(folder)
    return folder
