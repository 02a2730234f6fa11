"""The words that resume a run: what messages tell the user to type. No recipe is needed: the folder contains it."""

import re
import shlex
from pathlib import Path


def words_to_resume(folder: str | Path | None) -> str:
    """Return the words that resume the run in a folder, quoted for a shell; without a folder, resume=auto."""
    if folder is None:
        return "resume=auto"
    path = Path(folder).absolute()
    where = f"name={path.name}" if path.parent == Path("outputs").absolute() else f"output_dir={path}"
    return f"resume=auto {shlex.quote(where)}"


def command_to_resume(folder: str | Path | None) -> str:
    """Return the whole command that resumes the run in a folder; which command made it is told by its config.yaml."""
    config = Path(folder or "") / "config.yaml"
    tuned = config.is_file() and re.search(r"^run:", config.read_text(errors="replace"), re.MULTILINE)
    return f"python -m sslvision.{'finetune' if tuned else 'pretrain'} {words_to_resume(folder)}"
