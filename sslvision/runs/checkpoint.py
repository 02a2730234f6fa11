"""Checkpoints that survive a crash, a full disk and flipped bits; the last few are kept: last.ckpt, last-1.ckpt, ...

Each is a file, or a folder with the shards of several processes (system/checkpoint_folders.py).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from sslvision.errors import Diverged, StorageError, UsageError
from sslvision.nn.shards import is_sharded, local_shards
from sslvision.system.checkpoint_folders import in_all, read_folder, read_plain_part, remove, write_folder
from sslvision.system.files import free_bytes, sync_folder, written_whole
from sslvision.system.resuming import command_to_resume
from sslvision.system.torch_files import load_plain, load_verified, save

RECORD = "sslvision"  # the key of a run's own settings in its checkpoints


class AtomicCheckpoints(TorchCheckpointIO):
    """Write next to the old checkpoint, flush to the disk, and only then replace the old one.

    Lightning overwrites the old file, so a full disk or a kill leaves neither. Here one complete checkpoint always exists.

    Args:
        keep: Number of checkpoints to keep: last.ckpt, and keep - 1 older ones (last-1.ckpt, last-2.ckpt, ...).
        record: Plain containers saved in every checkpoint, which a resumed run is compared with.
    """

    def __init__(self, *, keep: int = 3, record: dict[str, Any] | None = None):
        self.keep, self.record = keep, dict(record or {})
        self._saved: dict[Path, int | None] = {}  # the update of each file that this process has written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Save `checkpoint`; a second one of the same update replaces the first.

        Raises:
            Diverged: Weights or optimizer state are not finite. Earlier checkpoints are kept.
            StorageError: The file cannot be written. Earlier checkpoints are kept.
        """
        path, step = Path(path), checkpoint.get("global_step")
        before = self._before(path)
        if name := _not_finite(checkpoint):
            _refuse(name, path, step, before)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if _unfinished(path).is_dir():  # left by processes that were killed
                remove(_unfinished(path))
            with written_whole(path, before_replace=lambda: self._make_room(path, before, step, folder=False)) as file:
                save({**checkpoint, RECORD: self.record}, cast(BinaryIO, file))
            _remove_replaced(path)
        except OSError as error:
            raise _cannot_write(checkpoint, path, error) from error
        self._saved[path] = step

    def save_shards(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Save `checkpoint` as a folder into which every process writes its shards. All processes call this.

        Everything is written to a folder beside `path`, which is renamed when it is complete. What is not in shards is that of
        the first process.

        Raises:
            Diverged, StorageError: As `save_checkpoint`, in all processes.
        """
        step, unfinished = checkpoint.get("global_step"), _unfinished(path)
        first = dist.get_rank() == 0
        before, *_ = in_all(lambda: self._before(path) if first else None)
        if name := next(filter(None, in_all(lambda: _not_finite(checkpoint))), None):
            _refuse(name, path, step, before)

        def replace() -> None:
            self._make_room(path, before, step, folder=True)
            os.replace(unfinished, path)
            sync_folder(path.parent)
            _remove_replaced(path)

        try:
            write_folder({**checkpoint, RECORD: self.record}, unfinished)
            in_all(lambda: replace() if first else None)
        except OSError as error:
            if first and unfinished.exists():
                remove(unfinished)
            raise _cannot_write(checkpoint, path, error) from error
        self._saved[path] = step

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; its micro-batch counts are converted if this run accumulates another number per update."""
        path = same_everywhere(path)
        if path.is_dir():
            return self.for_this_run(read_folder(path, verified="sizes"))  # the rest was verified when it was found
        return self.for_this_run(super().load_checkpoint(path, *args, **kwargs))

    def for_this_run(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Complete the epoch at whose end a checkpoint was saved, and convert its micro-batch counts; return it."""
        _complete_epoch(checkpoint["loops"]["fit_loop"])
        then, now = (record.get("accumulate", 1) for record in (checkpoint.get(RECORD, {}), self.record))
        if then != now:
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                unfinished = counts["processed"] - counts["completed"]  # 1 in the hooks at the end of a batch
                updates = counts["processed"] // then
                counts |= dict.fromkeys(("ready", "started", "processed"), updates * now)
                counts["completed"] = updates * now - unfinished
        return checkpoint

    def _before(self, path: Path) -> int | None:
        """Return the update of the checkpoint that is to be replaced; None if there is none that can be read."""
        if (replaced := _replaced(path)).exists() and not path.exists():  # the process was killed between two renames
            os.replace(replaced, path)
        if not path.exists():
            return None
        return self._saved[path] if path in self._saved else _step_of(path)

    def _make_room(self, path: Path, before: int | None, step: int | None, *, folder: bool) -> None:
        """Rename the older checkpoints, and the latest one if it can be replaced neither by a new file nor folder."""
        if path.exists() and before not in (None, step):
            _rotate(path, self.keep)
        if path.exists() and (folder or path.is_dir()):
            _remove_replaced(path)
            os.replace(path, _replaced(path))


def _unfinished(path: Path) -> Path:
    """Return the name of a checkpoint while it is written, be it a file or a folder."""
    return path.with_name(f".{path.name}.tmp")


def _replaced(path: Path) -> Path:
    """Return the name of a checkpoint while another one takes its place: last-0.ckpt."""
    return path.with_stem(f"{path.stem}-0")


def _remove_replaced(path: Path) -> None:
    if (replaced := _replaced(path)).exists():
        remove(replaced)


def _refuse(name: str, path: Path, step: int | None, before: int | None) -> NoReturn:
    kept = f"{path} is from update {before}" if path.exists() else "no checkpoint was saved before"
    raise Diverged(
        f"{name} is not finite at update {step}: training has diverged. This state is not saved; {kept}. Lower the "
        "learning rate, lengthen the warm-up, or set trainer.gradient_clip_val=1."
    )


def same_everywhere(path: str | Path) -> Path:
    """Return the checkpoint to load. All processes call this.

    Raises:
        UsageError: In all processes, if they have found different ones: the checksums of a folder are read by one alone.
    """
    if dist.is_available() and dist.is_initialized():
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, str(path))
        if len(names := sorted(set(found))) > 1:
            raise UsageError(
                f"Processes of this run would go on from different checkpoints ({', '.join(names)}), because one is damaged. "
                "It has been set aside: start the same command again."
            )
    return Path(path)


def _complete_epoch(loop: dict[str, Any]) -> None:
    """Complete the epoch at whose end a checkpoint was saved: in a run with `max_steps`, Lightning would continue with it."""
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if epoch["current"]["processed"] > epoch["current"]["completed"]:
        for counts in (epoch["total"], epoch["current"]):
            counts["completed"] = counts["processed"]
        batch["current"], batch["is_last_batch"] = dict.fromkeys(batch["current"], 0), False


@dataclass
class Found:
    """The newest intact checkpoint of a folder, its head, and newer ones that cannot be used, with the reasons."""

    path: Path | None = None
    head: dict[str, Any] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)


def newest_good(folder: Path) -> Found:
    """Look for the newest intact checkpoint among last.ckpt, last-1.ckpt, ... of a folder.

    One that was saved after an update with non-finite gradients is used only if there is no other: see Method.
    """
    found, doubtful = Found(), Found()
    for file in _ranked(folder / "last.ckpt"):
        try:
            head = read_head(file)
        except FileNotFoundError:
            continue  # another process of the run has renamed it
        except UsageError as error:
            found.damaged[file] = str(error)
            continue
        if head.get("log", {}).get("good", True):
            return Found(file, head, doubtful.damaged | found.damaged)
        if doubtful.path is None:
            doubtful.path, doubtful.head = file, head
        doubtful.damaged[file] = f"{file} was saved after an update whose gradients were not finite."
    found.path, found.head = doubtful.path, doubtful.head
    return found


def read_head(file: Path) -> dict[str, Any]:
    """Return what an intact checkpoint says of itself, without its tensors. Raises UsageError if it is damaged.

    The files of a folder are as large as the memory of all processes: their checksums are read by the first one.
    """
    ranks = (os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ)
    if file.is_dir():
        content = read_plain_part(file, verified="checksums" if next(ranks, "0") == "0" else "sizes")
    else:
        content = load_verified(file, mmap=True)
    return {key: content[key] for key in ("global_step", "log", RECORD) if key in content}


def _ranked(path: Path) -> list[Path]:
    """Return the existing checkpoints, newest first: last.ckpt, last-0.ckpt if it was being replaced, last-1.ckpt, ..."""
    ranks = {path: -1} if path.exists() else {}
    for file in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        if re.fullmatch(rf"{re.escape(path.stem)}-(0|[1-9]\d*)", file.stem):
            ranks[file] = int(file.stem.rsplit("-", 1)[1])
    return sorted(ranks, key=ranks.__getitem__)


def _rotate(path: Path, keep: int) -> None:
    """Rename every checkpoint to the next rank, up to the first free one, and delete those beyond `keep`.

    The oldest is renamed first, so that at most one checkpoint is lost at any moment.
    """
    names = [path, *(path.with_stem(f"{path.stem}-{rank}") for rank in range(1, keep))]
    free = next((rank for rank, name in enumerate(names) if not name.exists()), keep - 1)
    for rank in range(free, 0, -1):
        if names[rank].is_dir() or (names[rank].exists() and names[rank - 1].is_dir()):
            remove(names[rank])
        os.replace(names[rank - 1], names[rank])
    for file in _ranked(path):
        if file not in (*names, _replaced(path)):
            remove(file)


def _step_of(path: Path) -> int | None:
    """Return the update of a checkpoint; None if it cannot be read."""
    try:
        content = read_plain_part(path, verified="no") if path.is_dir() else load_plain(path, mmap=True)
        return content.get("global_step")
    except (UsageError, OSError):
        return None


def _not_finite(checkpoint: dict[str, Any]) -> str | None:
    """Return the name of a weight or optimizer tensor that holds NaN or inf. Waits for each device once."""
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in _tensors({key: checkpoint.get(key) for key in ("state_dict", "optimizer_states")}):
        (tensor,) = local_shards([tensor])
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # one pass, no copy; NaN propagates
            flags.setdefault(tensor.device, {})[name] = (0 * low + 0 * high).float()  # 0, or NaN
    for found in flags.values():
        for name, flag in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
            if flag != 0:
                return name
    return None


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in plain containers, with names such as state_dict.head.weight."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(one, f"{name}.{key}" if name else str(key))


def _cannot_write(checkpoint: dict[str, Any], path: Path, error: OSError) -> StorageError:
    """Return the error to raise: the reason, how many bytes are needed, and how many are free."""
    needed = dict[int, int]()
    for _, tensor in _tensors(checkpoint):
        (local,) = local_shards([tensor])
        storage = local.untyped_storage()
        whole = tensor.numel() * tensor.element_size()
        needed[storage.data_ptr() or id(tensor)] = whole if is_sharded(tensor) else storage.nbytes()
    run = path.parent.parent
    run = run.parent if run.name == "scratch" else run  # of a fine-tuning run
    left = f"the previous {path.name} is intact" if path.exists() else "no checkpoint was saved before"
    return StorageError(
        f"{path} cannot be written: {error.strerror or error}. It needs about {sum(needed.values()):,} bytes, and "
        f"{free_bytes(path):,} are free there; {left}. Make room, then resume with {command_to_resume(run)}."
    )
