"""The words that resume a run: what messages tell the user to type. No recipe is needed: the folder contains it."""

import shlex
from pathlib import Path


def words_to_resume(folder: str | Path | None) -> str:
    """Return the words that resume the run in a folder, quoted for a shell; without a folder, resume=auto."""
    if folder is None:
        return "resume=auto"
    path = Path(folder).absolute()
    where = f"name={path.name}" if path.parent == Path("outputs").absolute() else f"output_dir={path}"
    return f"resume=auto {shlex.quote(where)}"
