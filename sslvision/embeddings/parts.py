"""Embeddings on disk: a folder with a description, and a table of one row for each image in part files.

    embeddings.json                  what they are: weights, preprocessing, images, type of number, images in a part
    embeddings/part-00000.parquet    path, split, label, prediction, probability, embedding; or the same in .npz
    embeddings/part-00001.parquet    ...

Part p has those of the images p * n to (p + 1) * n - 1 that can be read, in their order, and names the others in its metadata.
A part is written whole or not at all, by whichever process; so those that exist need not be computed again.
Parquet files need pyarrow, .npz files do not.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sslvision.errors import DataError, UsageError
from sslvision.system.files import written_whole

ABOUT, PARTS = "embeddings.json", "embeddings"
UNREADABLE = "unreadable"  # key of a part's metadata, and of an array of an .npz file


@dataclass(frozen=True)
class Rows:
    """Some rows of the table of embeddings.

    Attributes:
        paths: Of the images, relative to the folder of the data where they are files in it.
        splits: "train", "validation" or "test".
        labels: Names of classes, "" for an image without; None if no image has a label.
        predictions, probabilities: The classifier's most likely class, and how likely it is; None without a classifier.
        embeddings: (n, D), float32 or float16.
        unreadable: Images that are left out, and why.
    """

    paths: Sequence[str]
    splits: Sequence[str]
    labels: Sequence[str] | None
    predictions: Sequence[str] | None
    probabilities: np.ndarray | None
    embeddings: np.ndarray
    unreadable: Sequence[tuple[str, str]] = field(default=())


def part_file(folder: Path, number: int, form: str) -> Path:
    """Return the file of a part in a folder of embeddings."""
    return folder / PARTS / f"part-{number:05d}.{form}"


def number_of_parts(about: Mapping[str, Any]) -> int:
    """Return how many parts embeddings have, by their description."""
    return math.ceil(about["images"] / about["images_per_part"])


def pyarrow_parquet(*, why: str) -> ModuleType:
    """Return pyarrow.parquet. Raises UsageError if it is not installed: `why` is a clause that says what needs it."""
    try:
        import pyarrow.parquet as module
    except ImportError as error:
        raise UsageError(f'{why} needs pyarrow: pip install "sslvision[embed]".') from error
    return module


def has_pyarrow() -> bool:
    """Return whether pyarrow is installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


def read_about(folder: Path) -> dict[str, Any]:
    """Return the description of the embeddings in a folder.

    Raises:
        UsageError: There are none.
    """
    try:
        return dict(json.loads((folder / ABOUT).read_text()))
    except FileNotFoundError as error:
        what = "has no embeddings" if folder.is_dir() else "does not exist"
        raise UsageError(
            f"embeddings={folder} {what}: make them with sslvision embed run=... data=... output_dir={folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder / ABOUT} cannot be read ({error}): make the embeddings again.") from error


def write_part(file: Path, rows: Rows) -> None:
    """Write a part whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as opened:
        if file.suffix == ".npz":
            np.savez(opened, **_arrays(rows))  # type: ignore[arg-type]  # numpy takes it for allow_pickle
        else:
            _write_parquet(opened, rows)


def _arrays(rows: Rows) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {
        "path": np.array(rows.paths, dtype=np.str_),
        "split": np.array(rows.splits, dtype=np.str_),
        "embedding": rows.embeddings,
        UNREADABLE: np.array(rows.unreadable, dtype=np.str_).reshape(-1, 2),
    }
    if rows.labels is not None:
        arrays["label"] = np.array(rows.labels, dtype=np.str_)
    if rows.predictions is not None:
        arrays["prediction"] = np.array(rows.predictions, dtype=np.str_)
        arrays["probability"] = rows.probabilities
    return arrays


def _write_parquet(opened: Any, rows: Rows) -> None:
    parquet = pyarrow_parquet(why="A Parquet file")
    import pyarrow as pa

    count, width = rows.embeddings.shape
    flat = pa.array(np.ascontiguousarray(rows.embeddings).reshape(-1))
    columns: dict[str, Any] = {"path": pa.array(rows.paths, pa.string()), "split": pa.array(rows.splits, pa.string())}
    if rows.labels is not None:
        columns["label"] = pa.array([label or None for label in rows.labels], pa.string())
    if rows.predictions is not None:
        columns["prediction"] = pa.array(rows.predictions, pa.string())
        columns["probability"] = pa.array(rows.probabilities, pa.float32())
    columns["embedding"] = pa.FixedSizeListArray.from_arrays(flat, width)
    table = pa.table(columns).replace_schema_metadata({UNREADABLE: json.dumps([*rows.unreadable])})
    assert table.num_rows == count
    # Numbers of embeddings are all different: neither a dictionary nor compression makes them smaller.
    texts = [name for name in columns if name not in ("embedding", "probability")]
    parquet.write_table(table, opened, use_dictionary=texts, compression="none", write_statistics=texts)


def read_part(file: Path) -> Rows:
    """Return the rows of a part.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return _read_npz(file) if file.suffix == ".npz" else _read_parquet(file)
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file} cannot be read ({type(error).__name__}: {error}). Delete it, and repeat the command that wrote it: only "
            "this file is made again."
        ) from error


def read_embeddings(file: Path) -> np.ndarray:
    """Return the embeddings (n, D) of a part, without its other columns."""
    if file.suffix == ".npz":
        return read_part(file).embeddings
    try:
        table = pyarrow_parquet(why=f"{file}").ParquetFile(file, memory_map=True).read(columns=["embedding"])
        return _matrix(table["embedding"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} cannot be read ({type(error).__name__}: {error}).") from error


def is_whole(file: Path) -> bool:
    """Return whether a part exists and can be opened; one that a failing disk has damaged counts as missing."""
    try:
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return "embedding.npy" in archive.namelist()
        pyarrow_parquet(why=f"{file}").read_metadata(file)
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def _read_npz(file: Path) -> Rows:
    with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as arrays:  # closed where it is damaged, too
        texts = {
            name: arrays[name].tolist() for name in ("path", "split", "label", "prediction") if name in arrays.files
        }
        return Rows(
            texts["path"],
            texts["split"],
            texts.get("label"),
            texts.get("prediction"),
            arrays["probability"] if "probability" in arrays.files else None,
            arrays["embedding"],
            [(path, why) for path, why in arrays[UNREADABLE].tolist()],
        )


def _read_parquet(file: Path) -> Rows:
    # One file: of a path that looks like "a=b/c", a data set would make columns.
    table = pyarrow_parquet(why=f"{file}").ParquetFile(file, memory_map=True).read()
    texts = {
        name: [one or "" for one in table[name].to_pylist()]
        for name in ("path", "split", "label", "prediction")
        if name in table.column_names
    }
    return Rows(
        texts["path"],
        texts["split"],
        texts.get("label"),
        texts.get("prediction"),
        table["probability"].to_numpy() if "probability" in table.column_names else None,
        _matrix(table["embedding"]),
        [(path, why) for path, why in json.loads(table.schema.metadata[UNREADABLE.encode()])],
    )


def _matrix(column: Any) -> np.ndarray:
    """Return a column of fixed-size lists as an array (n, D)."""
    width = column.type.list_size
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty((0, width), column.type.value_type.to_pandas_dtype())


def as_text(path: str) -> str:
    r"""Return a path as text that any file can hold: bytes that are not UTF-8 are written \xff."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_path(text: str) -> str:
    """Return the path that `as_text` made a text of."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), text.encode())
    return raw.decode("utf-8", "surrogateescape")
