"""Packing: images of any source as shards with an index, in several processes; what is whole is not written again.

The plan, which images go into which shard, is written first, and a line for every shard that is whole. The index appears when
all are. So an interrupted command, given again, goes on; and a shard has the same bytes whenever it is written.
"""

import csv
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from sslvision.data.datamodule import available_cores
from sslvision.data.image_bytes import image_file
from sslvision.data.order import Order
from sslvision.data.packed_index import FOLDERS, NAME, PackedIndex, PackedShard, index_text, members_file
from sslvision.data.shard_writer import ShardWriter, ToWrite, Written
from sslvision.data.source import Source, Splits, UnreadableImage, remarks_in_errors
from sslvision.data.sources.list_images import share
from sslvision.data.workers import begin_worker
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.feature_cache import data_digest, labels_digest
from sslvision.runs.run_files import exclusive
from sslvision.system.files import require_free, written_whole
from sslvision.workflows.console import print_configuration, print_findings
from sslvision.workflows.packing_settings import Pack, size_of
from sslvision.workflows.pretraining import open_splits

PROGRESS, UNREADABLE, CLASSES, LOCK = ".packing.jsonl", "unreadable.csv", "classes.txt", ".packing.lock"
SAMPLE = 200  # images whose files tell the size of all
AROUND = 3200  # bytes of a tar file around an image: three headers, a label, its path, and what they are filled up with
VERSION = 2  # of the shards; part of the key


class Plan(NamedTuple):
    """Which images go into which shard.

    Attributes:
        key: Hash of the images and of the settings that determine the shards.
        per_shard: Images in a shard.
        bytes: Estimated size of all shards.
        shards: All of them.
    """

    key: str
    per_shard: int
    bytes: int
    shards: list[ToWrite]


def pack(settings: Pack) -> dict[str, Any]:
    """Write shards.

    Returns:
        What was written: images, shards, bytes, unreadable, and the path of the index.

    Raises:
        UsageError: The folder holds other shards, or something else, or pyarrow is not installed.
        DataError: There are no images, or too many that cannot be read.
        StorageError: The disk is full.
    """
    if settings.shards == "parquet" and not find_spec("pyarrow"):
        raise UsageError('shards=parquet needs the package pyarrow: pip install "sslvision[parquet]".')
    console, begun = Console(soft_wrap=True, highlight=False), time.perf_counter()
    folder = Path(settings.output_dir or "").expanduser().absolute()
    splits = open_splits(settings.data)
    sources = _sources(settings, splits)
    plan = _plan(settings, sources)
    _refuse_others(folder, plan, overwrite=settings.overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / LOCK):
        done = _begin(folder, plan, sources)
        print_configuration(console, _configuration(settings, plan, sources, folder), title="pack")
        print_findings(console, splits.remarks)
        missing = [one for one in plan.shards if one.file not in done]
        if len(missing) < len(plan.shards):
            console.print(f"{len(done):,} of {len(plan.shards):,} shards are there already.")
        left = sum(one.end - one.start for one in missing) / sum(map(len, sources.values()))
        require_free(folder, int(plan.bytes * left), "The shards", advice="or give another output_dir or an image_size")
        writer = ShardWriter(
            *(folder, missing, sources),
            root=_root(settings),
            side=settings.image_size,
            encoding=settings.format,
            quality=settings.quality,
        )
        _write_all(settings, folder, writer, done, sum(map(len, sources.values())), console)
        results = _finish(settings, folder, plan, done, sources)
    seconds = time.perf_counter() - begun
    if results["unreadable"]:
        print_findings(console, [f"{results['unreadable']:,} images cannot be read, and were left out: {UNREADABLE}."])
    console.print(
        f"{results['images']:,} images in {results['shards']:,} shards, {results['bytes'] / 1e6:,.1f} MB, in {seconds:.0f} s: "
        f"{results['index']}"
    )
    reader = "webdataset data.urls" if settings.shards == "tar" else "hf data.path"
    console.print(f"  sslvision pretrain recipe=... data={reader}={os.path.relpath(folder)}", markup=False)
    return results


def _sources(settings: Pack, splits: Splits) -> dict[str, Source]:
    """Return the sources to pack by split; a single held-out one is `validation`, as its reader takes it."""
    test, validation = splits.test, splits.validation
    if validation is None and settings.split != "test":
        test, validation = None, test
    found = {"train": splits.train, "validation": validation, "test": test}
    sources = {
        split: source
        for split, source in found.items()
        if source is not None and len(source) and settings.split in ("all", split)
    }
    if not sources:
        with remarks_in_errors(splits.remarks):
            raise DataError(f"split={settings.split}: the data have no such images. split=all takes all of them.")
    return sources


def _plan(settings: Pack, sources: Mapping[str, Source]) -> Plan:
    """Decide how many images go into a shard."""
    size, unit = size_of(settings.shard_size)
    mean = _mean_bytes(settings, next(iter(sources.values())))
    per_shard = size if unit == "images" else max(1, round(size / mean))
    shards = [
        ToWrite(split, number, start, min(start + per_shard, len(source)), settings.shards)
        for split, source in sources.items()
        for number, start in enumerate(range(0, len(source), per_shard))
    ]
    identity = {
        "version": VERSION,
        "splits": {split: [len(one), data_digest(one, range(len(one)))[0]] for split, one in sources.items()},
        "labels": {split: labels_digest(one) for split, one in sources.items()},
        "classes": next(iter(sources.values())).classes,
        "image_size": settings.image_size,
        "encoding": [settings.format, settings.quality] if settings.image_size else None,
        "per_shard": per_shard,
        **({} if settings.shards == "tar" else {"shards": settings.shards}),
    }
    key = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return Plan(key, per_shard, int(mean * sum(map(len, sources.values()))), shards)


def _mean_bytes(settings: Pack, source: Source) -> float:
    """Return the mean size of an image in a shard, from a sample."""
    sizes = []
    for index in Order(len(source), seed=0, epoch=0)[:SAMPLE].tolist():
        with suppress(UnreadableImage):  # told when it is packed
            image = image_file(
                source, index, side=settings.image_size, encoding=settings.format, quality=settings.quality
            )
            sizes.append(len(image.content))
    if not sizes:
        raise DataError(
            f"None of {min(SAMPLE, len(source)):,} images drawn from {source.name} can be read, such as "
            f"{source.describe(0)}. Is it the right folder?"
        )
    return sum(sizes) / len(sizes) + (AROUND if settings.shards == "tar" else 0)


def _refuse_others(folder: Path, plan: Plan, *, overwrite: bool) -> None:
    """Raise UsageError if the folder holds something else; with `overwrite`, delete other shards that are in it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"output_dir={folder} is a file, and a folder is needed.")
    key = _key_of(folder)
    if key == plan.key and not overwrite:
        return
    if key is None and (there := [file for file in os.listdir(folder) if file != LOCK]):
        raise UsageError(f"{folder} holds something else than packed shards ({min(there)}): give another output_dir.")
    if key is not None and not overwrite:
        raise UsageError(
            f"{folder} holds shards of other images, labels or settings (shards, image_size, format, quality, shard_size, "
            "split): give another output_dir, or replace them with overwrite=true."
        )
    for name in FOLDERS.values():
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (NAME, PROGRESS, UNREADABLE):
        (folder / name).unlink(missing_ok=True)


def _key_of(folder: Path) -> str | None:
    """Return the key of the shards in a folder; None if there are none."""
    for name in (NAME, PROGRESS):
        with suppress(OSError, ValueError, KeyError, TypeError), open(folder / name, encoding="utf-8") as file:
            return str(json.loads(file.read() if name == NAME else file.readline())["key"])
    return None


def _begin(folder: Path, plan: Plan, sources: Mapping[str, Source]) -> dict[str, Written]:
    """Make the folders, and return what is whole in them, by file."""
    for split, source in sources.items():
        (folder / FOLDERS[split]).mkdir(exist_ok=True)
        if source.classes is not None and not any("\n" in name or "\r" in name for name in source.classes):
            with written_whole(folder / FOLDERS[split] / CLASSES, "w", encoding="utf-8", errors="replace") as file:
                file.write("".join(f"{name}\n" for name in source.classes))
    done = {one.shard.file: one for one in _told(folder) if _is_whole(folder, one.shard)}
    with written_whole(folder / PROGRESS, "w", encoding="utf-8") as file:
        file.write(json.dumps({"key": plan.key}) + "\n")
        file.writelines(_line(one) for one in done.values())
    return done


def _told(folder: Path) -> Iterator[Written]:
    """Yield the shards that an earlier call has written. What it was writing when it was killed has no whole line."""
    with suppress(OSError), open(folder / PROGRESS, encoding="utf-8") as file:
        for line in list(file)[1:]:
            with suppress(ValueError, TypeError, KeyError):
                content = json.loads(line)
                yield Written(PackedShard(**content["shard"]), [(path, why) for path, why in content["unreadable"]])


def _line(written: Written) -> str:
    return json.dumps({"shard": written.shard._asdict(), "unreadable": written.unreadable}) + "\n"


def _is_whole(folder: Path, shard: PackedShard) -> bool:
    path = str(folder / shard.file)
    with suppress(OSError):
        listed = not path.endswith(".tar") or os.path.isfile(members_file(path))
        return os.path.getsize(path) == shard.bytes and listed
    return False


def _write_all(
    settings: Pack, folder: Path, writer: ShardWriter, done: dict[str, Written], images: int, console: Console
) -> None:
    """Write the shards that are missing; add them to `done` and to the file of what is done."""
    workers = available_cores() if settings.workers is None else settings.workers
    workers = min(workers, len(writer)) if len(writer) > 1 else 0
    columns = (TextColumn("packing"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"))
    lost = sum(len(one.unreadable) for one in done.values())
    loader = DataLoader(
        writer,
        batch_size=None,
        num_workers=workers,
        in_order=False,
        collate_fn=_as_is,
        worker_init_fn=begin_worker,
        prefetch_factor=1 if workers else None,
    )
    with (
        open(folder / PROGRESS, "a", encoding="utf-8") as file,
        Progress(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        ) as bars,
    ):
        bar = bars.add_task("packing", total=sum(one.end - one.start for one in writer.shards))
        for written in loader:
            if isinstance(written, Exception):
                raise written
            done[written.shard.file] = written
            file.write(_line(written))
            file.flush()
            lost += len(written.unreadable)
            if lost > settings.max_unreadable * images:
                path, why = next(one for shard in done.values() for one in shard.unreadable)
                raise DataError(
                    f"{share(lost, images, 'images')} cannot be read, the first: {path} ({why}). That is more than "
                    f"max_unreadable={settings.max_unreadable} of them: repair them, or allow more. What is written is kept."
                )
            bars.advance(bar, written.shard.images + len(written.unreadable))


def _as_is(written: Any) -> Any:
    return written


def _finish(
    settings: Pack, folder: Path, plan: Plan, done: Mapping[str, Written], sources: Mapping[str, Source]
) -> dict[str, Any]:
    """Write the index and what was left out."""
    all_of_them = [done[one.file] for one in plan.shards]
    lost = [one for written in all_of_them for one in written.unreadable]
    if lost:
        with written_whole(folder / UNREADABLE, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("path", "problem"), *lost])
    shards = tuple(written.shard for written in all_of_them)
    index = PackedIndex(shards, next(iter(sources.values())).classes)
    about = {"key": plan.key, "unreadable": len(lost), "image_size": settings.image_size}
    with written_whole(folder / NAME, "w", encoding="utf-8", errors="replace") as file:
        file.write(index_text(index, about))
    size = sum(one.bytes for one in shards)
    return {
        "images": sum(one.images for one in shards),
        "shards": len(shards),
        "bytes": size,
        "unreadable": len(lost),
        "index": str(folder / NAME),
    }


def _root(settings: Pack) -> str:
    """Return the folder that the images' paths are relative to; empty if there is none."""
    root = settings.data.get("root")
    if root is None and (file := settings.data.get("file")) is not None:
        root = os.path.dirname(os.path.abspath(os.path.expanduser(file)))
    return os.path.abspath(os.path.expanduser(root)) if root else ""


def _configuration(settings: Pack, plan: Plan, sources: Mapping[str, Source], folder: Path) -> dict[str, str]:
    """Return what is going to be written, for the user to check."""
    side = settings.image_size
    quality = f" of quality {settings.quality}" if settings.format == "jpeg" else ""
    what = "as they are" if side is None else f"shrunk to a short side of {side}, {settings.format.upper()}{quality}"
    counts: Sequence[str] = [f"{len(source):,} {split}" for split, source in sources.items()]
    return {
        "images": f"{next(iter(sources.values())).name}: {', '.join(counts)}",
        "files": what,
        "shards": f"{len(plan.shards):,} of {plan.per_shard:,} images, about {plan.bytes / 1e6:,.1f} MB in all",
        "folder": str(folder),
    }
