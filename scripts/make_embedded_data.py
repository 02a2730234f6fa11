"""Make the package's embedded data set from the Fashion-MNIST files as their authors publish them.

    python scripts/make_embedded_data.py --source FOLDER_WITH_THE_IDX_GZ_FILES

The files come from https://github.com/zalandoresearch/fashion-mnist (copyright 2017 Zalando SE, MIT license). The
first images of each class are kept, in the authors' order. The same input gives the same bytes
(with the same zlib; the arrays are the same with any).
"""

import argparse
import gzip
import io
import zipfile
from pathlib import Path

import numpy as np

TARGET = Path(__file__).parents[1] / "sslvision" / "data" / "sources" / "fashion_mnist.npz"


def read_idx(path: Path) -> np.ndarray:
    """Return the bytes of an IDX file as an array of the shape its header gives."""
    content = gzip.decompress(path.read_bytes())
    zero, kind, ndim = int.from_bytes(content[:2], "big"), content[2], content[3]
    if (zero, kind) != (0, 8):  # 8: unsigned bytes
        raise SystemExit(f"{path} is not an IDX file of unsigned bytes.")
    shape = np.frombuffer(content, ">u4", count=ndim, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def first_of_each_class(labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the indices of the first `per_class` labels of each class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in np.unique(labels)]))


def select(source: Path, train_per_class: int, test_per_class: int) -> dict[str, np.ndarray]:
    """Return the arrays to embed."""
    arrays: dict[str, np.ndarray] = {}
    for split, stem, per_class in (("train", "train", train_per_class), ("test", "t10k", test_per_class)):
        images = read_idx(source / f"{stem}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{stem}-labels-idx1-ubyte.gz")
        kept = first_of_each_class(labels, per_class)
        arrays |= {f"{split}_images": images[kept], f"{split}_labels": labels[kept]}
    return arrays


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write what numpy.load reads, without a date. LZMA would save 0.7 MB and cost half a second at every start."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # the same bytes on every system
            archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the four *-ubyte.gz files")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--train-per-class", type=int, default=1000)
    parser.add_argument("--test-per-class", type=int, default=200)
    options = parser.parse_args()
    write_npz(options.target, select(options.source, options.train_per_class, options.test_per_class))
    print(f"{options.target}: {options.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
