"""The files of a run: its folder is claimed first, and readable without this package."""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from sslvision.errors import UsageError
from sslvision.runs.redaction import redact
from sslvision.system.files import written_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_held: dict[Path, int] = {}

CONTENTS = """\
# {name}

Made by `{command}`.

| file | content |
| --- | --- |
| report.html | all of it to look at: scores, curves, pictures, settings; opens in a browser without a network |
| results.json | final k-NN, linear probe and RankMe, pretrained and untrained; problems, if any |
| config.yaml | every setting of the run, in full |
| environment.json | versions, git commit and hardware |
| metrics.csv | loss, learning rate, k-NN accuracy, RankMe and other values that the method logs, by step |
| figures/ | the method's output for held-out images, nearest neighbors, learning curve, health |
| checkpoints/last.ckpt, last-1.ckpt, ... | the latest checkpoint, which `resume=auto` continues from, and older ones |
| export/ | the backbone, ready to use: `timm.create_model("local-dir:{folder}/export", pretrained=True, num_classes=0)` |
| export-best/ | of a run with init_from that was better on the way: its best weights by k-NN, without labels by RankMe |
| unreadable.csv | images that could not be read, if there were any |
"""


def claim(folder: Path, *, overwrite: bool, resume: bool, shared: bool = False, figures: bool = True) -> None:
    """Claim an empty or new folder for a run; a used one only to resume in it or to empty it.

    Args:
        folder: The folder.
        overwrite: Whether to empty it.
        resume: Whether it may be in use.
        shared: Whether other processes that claim it so may work in it at the same time.
        figures: Whether it gets a folder for figures.

    Raises:
        UsageError: The folder is in use, another process works in it, or it would be emptied but is not a run folder.
    """
    if (folder / LOCK).exists():
        _hold(folder, shared=shared and not overwrite)
    if folder.exists() and any(folder.iterdir()) and not resume:
        if not overwrite:
            raise UsageError(
                f"{folder} is in use: resume it with resume=auto, empty it with overwrite=true, or choose another name=."
            )
        if not (folder / "config.yaml").is_file():
            raise UsageError(
                f"{folder} is not a run folder (it has no config.yaml), so it is not emptied; choose another one."
            )
        shutil.rmtree(folder)
    (folder / "figures" if figures else folder).mkdir(parents=True, exist_ok=True)
    _hold(folder, shared=shared)


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Let one process at a time do something: the others wait."""
    if fcntl is None:
        yield
        return
    with open(file, "w") as opened:
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(opened, fcntl.LOCK_EX)
        yield


def _hold(folder: Path, *, shared: bool = False) -> None:
    """Keep other processes out of a folder until this one ends, however it ends; those that share it may be in it, too."""
    if fcntl is None:
        return
    file = folder / LOCK
    if folder in _held and file.exists() and os.path.samestat(os.fstat(_held[folder]), file.stat()):
        return
    held = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(
            held, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        )  # per process: forked processes, which may outlive it, do not hold it
    except (BlockingIOError, PermissionError) as error:
        os.close(held)
        raise UsageError(
            f"Another process is running in {folder}: wait until it ends, stop it, or choose another name=."
        ) from error
    except OSError:  # a file system without locks
        os.close(held)
        return
    _held[folder] = held  # stays open: closing it would release the lock


def describe(
    folder: Path, config: dict[str, Any], words: Sequence[str], *, command: str = "pretrain", contents: str = CONTENTS
) -> None:
    """Write README.md, config.yaml and environment.json, without the secrets in them.

    The command that made the run stays in them when it is resumed without its recipe.

    Args:
        folder: Folder of the run.
        config: All settings, as plain containers.
        words: Arguments of the command line.
        command: Name of the command.
        contents: Template of README.md, with {name}, {folder} and {command}.
    """
    command = shlex.join(["python", "-m", f"sslvision.{command}", *redact(list(words))])
    if any(word.startswith("resume=") for word in words) and not any(word.startswith("recipe=") for word in words):
        command = _first_command(folder / "environment.json") or command
    (folder / "README.md").write_text(contents.format(name=folder.name, folder=folder, command=command))
    (folder / "config.yaml").write_text(yaml.safe_dump(redact(config), sort_keys=False, allow_unicode=True))
    write_json(folder / "environment.json", environment(command))


def _first_command(file: Path) -> str | None:
    """Return the command in a run's environment.json; None if there is none."""
    try:
        command = json.loads(file.read_text())["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return command if isinstance(command, str) else None


def environment(command: str) -> dict[str, Any]:
    """Return what is needed to judge or repeat the run, without personal data."""
    packages = ("sslvision", "torch", "torchvision", "pytorch-lightning", "timm", "hydra-core", "numpy")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in packages},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed_files": len((_git("status", "--porcelain") or "").splitlines()),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def write_json(file: Path, content: dict[str, Any]) -> None:
    r"""Write readable JSON, without the secrets in it. Bytes of file names that are not UTF-8 are written \udcff."""
    with written_whole(file, "w", encoding="utf-8", errors="backslashreplace") as opened:
        opened.write(json.dumps(redact(content), indent=2, ensure_ascii=False) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def _git(*arguments: str) -> str | None:
    """Run git in the checkout of this package; None if there is none."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    """Return the processor's name."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
