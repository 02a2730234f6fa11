"""What tests of image files and of their caches share."""

import numpy as np
import pytest
from PIL import Image

from sslvision.data import cache as cache_module
from sslvision.data.cache import cached
from sslvision.data.source import Splits


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves an image and gives the path."""

    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def written(tmp_path):
    """Return a function that writes bytes and gives the path."""

    def write(content, name="file.png"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.fixture
def photos(tmp_path):
    """Return a folder of photographs of many sizes in two classes, one of them gray, one on its side."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 60), (90, 50), (64, 64), (20, 200), (31, 77), (48, 48), (128, 96)]):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert("L") if number == 3 else image
        image.save(folder / f"{number}.{'png' if number == 2 else 'jpg'}", exif=exif)
    return tmp_path / "photos"


@pytest.fixture
def cache_of(tmp_path, monkeypatch):
    """Return a function that opens a source's cache in a folder of the test, of whichever kind."""
    root = tmp_path / "caches"
    root.mkdir()
    monkeypatch.setattr(cache_module, "_memory_folder", lambda: root)
    locks = []
    monkeypatch.setattr(cache_module, "_in_use", locks)
    monkeypatch.setattr(cache_module.atexit, "register", lambda *_: None)

    def open_cache(source, kind="disk", *, side=48, workers=0):
        return cached(Splits(source, None), kind, side=side, folder=root, workers=workers).train

    open_cache.root = root
    yield open_cache
    for lock in locks:
        lock.close()
