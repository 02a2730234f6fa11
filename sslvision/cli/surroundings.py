"""What a run leaves behind in its process."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def surroundings_restored() -> Iterator[None]:
    """Restore the environment and end the process group that a run sets up, so that the next run can start processes too.

    Lightning leaves LOCAL_RANK and other variables, and a process group whose other processes have ended.
    """
    environment, had_group = dict(os.environ), _process_group() is not None
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        if not had_group and (distributed := _process_group()) is not None:
            distributed.destroy_process_group()


def _process_group() -> Any:
    """Return torch.distributed if it is loaded and has a process group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None
