"""A folder of a thousand files as people have them: each is used, or named with its reason, within 2 GB."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TESTS, COUNT = Path(__file__).parent, 1000
SIZES = [(1, 1), (1, 30_000), (30_000, 1), (20_000, 10), (3, 7), (64, 64), (50, 200), (300, 260), (224, 224), (17, 400)]
KINDS = ["jpg", "png", "webp", "tif", "gif", "bmp", "deep", "array", "bands", "pages", "damaged"]
MODES = ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"]


def make(folder):
    """Write COUNT files of mixed formats, depths, orientations, sizes, bands and pages, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        where = folder / f"class{number % 2}"
        where.mkdir(parents=True, exist_ok=True)
        width, height = SIZES[int(rng.integers(len(SIZES)))]
        values = rng.integers(0, 256, (height, width, 5), dtype=np.uint8)
        write(where / f"{number:04d}", KINDS[number % len(KINDS)], values, rng)


def write(stem, kind, values, rng):
    height, width, _ = values.shape
    if kind in ("jpg", "png", "webp", "tif", "gif", "bmp"):
        mode = str(rng.choice(MODES))
        mode = mode if kind == "tif" or (mode, kind) in (("RGBA", "png"), ("RGBA", "webp"), ("P", "gif")) else "RGB"
        mode = mode if mode != "LA" else "L"
        if max(width, height) > 16_383 and kind == "webp":  # the format's limit
            kind = "png"
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options = {"exif": exif} if kind not in ("gif", "bmp") else {}
        Image.fromarray(values[..., :3]).convert(mode).save(stem.with_suffix(f".{kind}"), **options)
    elif kind == "deep":
        dtype = rng.choice([np.uint16, np.int32, np.float32])
        gray = values[..., 0].astype(dtype) * dtype(16 if dtype != np.float32 else 1 / 255)
        suffix = ".png" if dtype == np.uint16 and number_of(stem) % 4 else ".tif"
        Image.fromarray(gray).save(stem.with_suffix(suffix))
    elif kind == "array":
        shapes = [values[..., 0], values[..., :3], values[..., :3].transpose(2, 0, 1), values[..., :1], values]
        array = shapes[int(rng.integers(len(shapes)))]
        if number_of(stem) % 3:
            np.save(stem.with_suffix(".npy"), array.astype(rng.choice([np.uint8, np.int16, np.float64])))
        else:
            np.savez(stem.with_suffix(".npz"), array)
    elif kind == "bands":
        tifffile = pytest.importorskip("tifffile")
        bands, dtype = int(rng.integers(1, 6)), rng.choice([np.uint8, np.uint16, np.int16, np.float16, np.float64])
        array = values[..., :bands].astype(dtype)
        order = {} if bands == 1 else {"planarconfig": "contig"}
        array = array.squeeze(-1) if bands == 1 else array
        tifffile.imwrite(stem.with_suffix(".tiff"), array, photometric="minisblack", **order)
    elif kind == "pages":
        pages = [Image.fromarray(values[..., page]) for page in range(int(rng.integers(2, 5)))]
        pages[0].save(stem.with_suffix(".tif"), save_all=True, append_images=pages[1:])
    else:
        Image.fromarray(values[..., :3]).save(stem.with_suffix(".png"))
        content = stem.with_suffix(".png").read_bytes()
        stem.with_suffix(".png").unlink()
        damage = [b"", b"no image", content[: len(content) // 2], b"%PDF-1.7", bytes(rng.bytes(300))]
        stem.with_suffix(str(rng.choice([".jpg", ".png", ".tif", ".npy"]))).write_bytes(damage[number_of(stem) % 5])


def number_of(stem):
    return int(stem.name)


def reasons(source, indices):
    """Yield the indices of images that cannot be read, with the reasons."""
    from sslvision.data.source import UnreadableImage

    for index in sorted(indices):
        try:
            source.read(index)
        except UnreadableImage as error:
            yield index, str(error)


def read_all(folder, channels):
    """Read every file through scan, cache and loader; print what came of each, and the memory that it took."""
    import resource

    from sslvision.augment.crops import Crop
    from sslvision.data.datamodule import pixel_statistics
    from sslvision.data.loader import evaluation_loader, training_loader
    from sslvision.data.sampler import EpochBatches
    from sslvision.workflows.pretraining import open_splits

    target = "sslvision.data.sources.folder.open_folder"
    data = {"_target_": target, "root": str(folder / "photos"), "channels": channels, "holdout": 0.0, "workers": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for cache in ("none", "disk"):
        source = open_splits(data | {"cache": cache, "cache_dir": str(folder / "cache")}).train
        assert source.labels.bincount().tolist() == [COUNT // 2, COUNT // 2]
        scored = [
            int(index)
            for indices, _ in evaluation_loader(source, (224, 224), list(range(len(source))))
            for index in indices
        ]
        unreadable = dict(reasons(source, set(range(COUNT)) - set(scored)))
        if channels != 5:  # few files have five bands: training would end there
            batches, replaced = EpochBatches(len(source), global_batch=100, seed=0), {}
            for batch in training_loader(source, (Crop(96, (0.2, 1.0)),), batches, workers=0, pin_memory=False):
                replaced.update(batch.unreadable)
                assert batch.crops[0].shape == (100, channels, 96, 96)
            assert replaced == unreadable
        pixel_statistics(source, "computed")
        assert len(scored) + len(unreadable) == COUNT
        assert all(unreadable.values())
        print(cache, "used", len(scored), "named", len(unreadable), sorted(unreadable.items()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory {peak // 1024} {(peak - before) // 1024}")


@pytest.mark.e2e
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_each_of_a_thousand_files_is_used_or_named_within_two_gigabytes(tmp_path, channels):
    pytest.importorskip("tifffile")
    make(tmp_path / "photos")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(channels)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    plain, cached, memory = [line for line in done.stdout.splitlines() if line.startswith(("none", "disk", "memory"))]
    assert plain.removeprefix("none") == cached.removeprefix("disk")  # the same files, the same reasons
    used, named = (int(plain.split()[place]) for place in (2, 4))
    assert used + named == COUNT
    assert named >= 90  # the damaged ones
    assert used >= (700 if channels != 5 else 15)
    assert int(memory.split()[1]) < 2048, memory
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    read_all(Path(sys.argv[1]), int(sys.argv[2]))
