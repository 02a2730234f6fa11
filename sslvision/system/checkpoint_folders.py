"""Checkpoints in shards: a folder into which every process writes its part, by torch.distributed.checkpoint.

    last.ckpt/.metadata       which piece of which tensor is where
    last.ckpt/__0_0.distcp    the pieces of the first process; __1_0.distcp those of the second, and so on
    last.ckpt/meta.pt         all that is neither weights nor state of the optimizer; sizes and checksums of the other files

meta.pt is written last: a folder without it is not whole. The names are those of Lightning's folders of shards. Weights and
optimizer are for any number of processes, and for one that has no process group.
"""

import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.errors import UsageError
from sslvision.system.files import written_whole
from sslvision.system.torch_files import CHUNK, load_verified, save

INDEX, PLAIN = ".metadata", "meta.pt"
STATE, OPTIMIZERS = "state_dict", "optimizer_states"  # keys of a checkpoint that hold what is in shards
Verified = Literal["no", "sizes", "checksums"]
SHARDS = "shards"  # the key in meta.pt of what is needed to read the others
NAMES = {  # what may be named in .metadata, which is a pickle: nothing else is looked up
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "pathlib": ("Path", "PosixPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath"),
}


def is_folder_of_shards(path: Path) -> bool:
    """Return whether a path is a checkpoint of several files, whole or not."""
    return path.is_dir() and (path.suffix == ".ckpt" or (path / INDEX).is_file())


def is_of_lightning(path: Path) -> bool:
    """Return whether a path is a whole folder of shards that Lightning has written, with a strategy that is not ours."""
    if not (path.is_dir() and (path / INDEX).is_file() and (path / PLAIN).is_file()):
        return False
    try:
        return SHARDS not in load_verified(path / PLAIN, mmap=True)
    except UsageError:
        return False


# Writing. All processes call these.


def write_folder(content: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint into a folder, each process its shards; what is not in shards is that of the first process.

    Args:
        content: The checkpoint.
        folder: Does not exist, or is what an interrupted call has left.

    Raises:
        OSError: In all processes, if one of them could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    first = dist.get_rank() == 0
    in_all(lambda: _clear(folder) if first else None)
    tensors, plain = _divided(content)
    try:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
    except CheckpointException as error:
        raise _cause(error) from error
    own = sorted(folder.glob(f"__{dist.get_rank()}_*.distcp"))
    sums = in_all(lambda: {file.name: _checksum(file) for file in [*own, *([folder / INDEX] if first else [])]})
    files = {name: found for of_process in sums for name, found in of_process.items()}

    def finish() -> None:
        for name, (size, _) in files.items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise OSError(
                    f"{name} is not in the folder that the first process sees: all nodes have to see the same output_dir"
                )
        with written_whole(folder / PLAIN) as file:
            save({**plain, SHARDS: {"files": files, "tensors": list(_dotted(tensors))}}, cast(Any, file))

    in_all(lambda: finish() if first else None)


def in_all(action: Callable[[], Any]) -> list[Any]:
    """Call an action in all processes, and return what each returned. Raises OSError in all if it failed in one."""
    found, failed, own = None, "", None
    try:
        found = action()
    except Exception as error:
        own = error
        failed = (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (found, failed))
    if reason := next((reason for _, reason in everyone if reason), None):
        raise OSError(reason) from own
    return [value for value, _ in everyone]


def _cause(error: Any) -> OSError:
    """Return the OSError that kept a process from writing, if there was one."""
    failed = [one for one, *_ in error.failures.values()]
    own = next((one for one in failed if isinstance(one, OSError)), None)
    return own if own is not None else OSError(str(failed[0]) or repr(failed[0]))


def _clear(folder: Path) -> None:
    """Make an empty folder."""
    if folder.exists():
        remove(folder)
    folder.mkdir(parents=True)


def remove(path: Path) -> None:
    """Delete a checkpoint. A folder first loses the file without which it is not whole."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / PLAIN).unlink(missing_ok=True)
    shutil.rmtree(path)


def _divided(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of weights and optimizers, and everything else. Indices become words, as the format has them."""
    weights = {name: value for name, value in content[STATE].items() if isinstance(value, Tensor)}
    states, rest = dict[str, Any](), list[Any]()
    for number, optimizer in enumerate(content.get(OPTIMIZERS, [])):
        held = optimizer["state"].items()
        states[str(number)] = {
            str(index): {key: value for key, value in values.items() if isinstance(value, Tensor)}
            for index, values in held
        }
        others = {
            index: {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            for index, values in held
        }
        rest.append({**optimizer, "state": others})
    left = {name: value for name, value in content[STATE].items() if name not in weights}
    plain = {**content, STATE: left} | ({OPTIMIZERS: rest} if OPTIMIZERS in content else {})
    return {STATE: weights, OPTIMIZERS: states}, plain


def _dotted(tensors: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _checksum(file: Path) -> list[int]:
    """Return the bytes and the CRC-32 of a file."""
    checksum = 0
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return [file.stat().st_size, checksum]


# Reading.


def read_plain_part(folder: Path, *, verified: Verified = "checksums") -> dict[str, Any]:
    """Return what a folder has besides weights and the state of the optimizer.

    Args:
        folder: The checkpoint.
        verified: What of the other files is compared.

    Raises:
        UsageError: It is not whole, is damaged, or was written by something else.
    """
    if not (folder / PLAIN).is_file():
        if not folder.exists():
            raise FileNotFoundError(folder)
        raise UsageError(
            f"{folder} is not whole: it has no {PLAIN}, which is written last. It was cut off while it was written or copied."
        )
    content = load_verified(folder / PLAIN)
    if SHARDS not in content:
        raise UsageError(
            f"{folder} is a folder of shards, which Lightning writes with strategies other than ours. "
            f"python -m pytorch_lightning.utilities.consolidate_checkpoint {folder} makes one file of it, whose weights a "
            "new run can start from (init_from=FILE)."
        )
    files: dict[str, list[int]] = content[SHARDS]["files"]
    if verified != "no":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        with ThreadPoolExecutor(min(8, cores)) as pool:
            for told in pool.map(lambda name: _damage(folder / name, files[name], verified), files):
                if told:
                    raise UsageError(told)
    return content


def _damage(file: Path, recorded: list[int], verified: Verified) -> str | None:
    """Return in words what is wrong with a file, if anything is."""
    try:
        if (size := file.stat().st_size) != recorded[0]:
            return f"{file} is damaged: it has {size:,} bytes, and {recorded[0]:,} were written."
        if verified == "checksums" and _checksum(file) != recorded:
            return f"{file} is damaged: it is not what was written (checksum)."
    except FileNotFoundError:
        return f"{file.parent} is not whole: {file.name} is missing."
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}."
    return None


def read_folder(
    folder: Path,
    *,
    without: Collection[str] = (),
    place: Callable[[str, torch.Size, torch.dtype], Tensor | None] | None = None,
    verified: Verified = "checksums",
) -> dict[str, Any]:
    """Return a checkpoint in shards as the dictionary that a checkpoint in one file holds.

    Args:
        folder: The checkpoint.
        without: Beginnings of keys of the checkpoint that are left on the disk.
        place: Returns what a tensor is read into, given its dotted name, shape and dtype: a DTensor, of which each process
            reads its shards; all processes call this then. None for a plain tensor on the CPU.
        verified: What of the files is compared before.

    Raises:
        UsageError: It is not whole, is damaged, or was written by something else. Nothing in it is executed.
    """
    content = read_plain_part(folder, verified=verified)
    names = [name for name in content.pop(SHARDS)["tensors"] if not name.startswith(tuple(without))]
    tensors = _read_tensors(folder, names, place)
    for name in names:
        key, _, rest = name.partition(".")
        if key == STATE:
            content[STATE][rest] = tensors[name]
            continue
        number, index, of_state = rest.split(".", 2)
        content[OPTIMIZERS][int(number)]["state"][int(index)][of_state] = tensors[name]
    return content


def _read_tensors(
    folder: Path, names: list[str], place: Callable[[str, torch.Size, torch.dtype], Tensor | None] | None
) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import Metadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            return index

    try:
        with open(folder / INDEX, "rb") as file:
            index: Metadata = _Index(file).load()
        tensors: dict[str, Any] = {}
        for name in names:
            of_tensor: Any = index.state_dict_metadata[name]
            size, dtype = of_tensor.size, of_tensor.properties.dtype
            target = None if place is None else place(name, size, dtype)
            tensors[name] = torch.empty(size, dtype=dtype) if target is None else target
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads alone
            dcp.load(tensors, storage_reader=Reader(folder), no_dist=place is None)
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror or error}.") from error
    except UsageError:
        raise
    except (Exception, CheckpointException) as error:  # of pickle, of the format, or of torch's reader in any process
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise UsageError(f"{folder} cannot be read as a checkpoint in shards: {reason}") from error
    return tensors


class _Index(pickle.Unpickler):
    """Read .metadata, which names nothing but classes of torch that hold numbers and words."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in NAMES.get(module, ()):
            raise UsageError(
                f".metadata is refused: it asks to run {module}.{name}, where only places of tensors are expected."
            )
        return super().find_class(module, name)
