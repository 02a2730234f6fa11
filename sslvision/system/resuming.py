"""The command that resumes a run: what messages tell the user to type. No recipe is needed: the folder contains it."""

import re
import shlex
from pathlib import Path


def command_to_resume(folder: str | Path | None) -> str:
    """Return the command that resumes the run in a folder, quoted for a shell; its config.yaml tells which command made it."""
    if folder is None:
        return "the same command with resume=auto"
    path = Path(folder).absolute()
    config = path / "config.yaml"
    tuned = config.is_file() and re.search(r"^run:", config.read_text(errors="replace"), re.MULTILINE)
    where = f"name={path.name}" if path.parent == Path("outputs").absolute() else f"output_dir={path}"
    return f"python -m sslvision.{'finetune' if tuned else 'pretrain'} resume=auto {shlex.quote(where)}"
