"""A thousand damaged files of every format, through the folder source and the loader with its workers (rows 13 to 15)."""

import io
import signal

import numpy as np
import pytest
import torch
from PIL import Image, features

from sslvision.augment.crops import Crop
from sslvision.data.cache import cached
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import open_folder

pytestmark = pytest.mark.faults

SECONDS = 500  # after which a loader hangs
FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
FORMATS |= {".bmp": "BMP", ".gif": "GIF", ".ppm": "PPM", ".jp2": "JPEG2000"}
FORMATS |= {".avif": "AVIF"} if "avif" in features.modules and features.check("avif") else {}
FILES = 1008 - len(FORMATS)  # damaged ones; with a sound one of each format, 21 batches
MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16")
CROPS = (Crop(16, scale=(0.2, 1.0), flip=True),)


def sound_files(rng):
    """Return encoded images of every format, in every mode that it can hold: [(extension, bytes)]."""
    found = []
    for extension in FORMATS:
        for mode in MODES:
            side = int(rng.integers(20, 60))
            pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert("RGB")
            image = Image.fromarray(pixels[..., 0].astype(np.uint16)) if mode == "I;16" else image.convert(mode)
            for options in ({"compression": "tiff_lzw"}, {"compression": "jpeg"}, {}):
                file = io.BytesIO()
                try:
                    image.save(file, FORMATS[extension], **(options if FORMATS[extension] == "TIFF" else {}))
                except (OSError, ValueError, KeyError, RuntimeError):  # not every format has every mode
                    continue
                found.append((extension, file.getvalue()))
                if FORMATS[extension] != "TIFF":
                    break
    return found


def mutate(content, other, rng):
    """Return a file damaged in one of the ways that disks, networks and people damage files."""
    damaged, size = bytearray(content), len(content)
    place = int(rng.integers(0, size))
    match rng.integers(0, 8):
        case 0:  # flipped bits anywhere
            for bit in rng.integers(0, size * 8, rng.integers(1, 30)):
                damaged[bit // 8] ^= 1 << (bit % 8)
        case 1:  # in the header, where sizes and types are
            for bit in rng.integers(0, min(size, 64) * 8, rng.integers(1, 8)):
                damaged[bit // 8] ^= 1 << (bit % 8)
        case 2:
            damaged = damaged[:place]
        case 3:  # a sector that was never written
            damaged[place : place + 512] = bytes(min(512, size - place))
        case 4:  # one file's header before another's body
            damaged[: min(place, 64)] = other[: min(place, 64)]
        case 5:
            damaged = bytearray(other[: len(other) // 2] + content[size // 2 :])
        case 6:
            damaged[place:place] = rng.integers(0, 256, rng.integers(1, 100), dtype=np.uint8).tobytes()
        case 7:  # random bytes after a sound header
            damaged[place:] = rng.integers(0, 256, size - place, dtype=np.uint8).tobytes()
    return bytes(damaged)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A folder of about 1,000 damaged files, and a sound one of each format."""
    root, rng = tmp_path_factory.mktemp("damaged"), np.random.default_rng(0)
    sound = sound_files(rng)
    assert {extension for extension, _ in sound} == set(FORMATS)
    for number in range(FILES):
        extension, content = sound[number % len(sound)]
        _, other = sound[rng.integers(0, len(sound))]
        (root / f"{number:04}{extension}").write_bytes(mutate(content, other, rng))
    for number, extension in enumerate(FORMATS):
        content = next(content for kind, content in sound if kind == extension)
        (root / f"sound{number}{extension}").write_bytes(content)
    return root


@pytest.fixture(autouse=True)
def _no_hang():
    def give_up(*_):
        raise TimeoutError(f"not done in {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("channels", [3, *(pytest.param(channels, marks=pytest.mark.e2e) for channels in (1, 4))])
def test_every_damaged_file_is_an_image_or_has_a_reason_and_no_worker_dies(damaged, channels):
    source = open_folder(damaged, channels=channels, holdout=0).train
    assert len(source) == FILES + len(FORMATS)
    batches = EpochBatches(len(source), global_batch=48, seed=0)  # 21 batches: all images
    readable, reasons, asked = set(), {}, []
    for batch in training_loader(source, CROPS, batches, workers=2, pin_memory=False):
        reasons |= dict(batch.unreadable)
        asked += batch.indices.tolist()
        readable |= set(batch.shown[batch.shown == batch.indices].tolist())
        (crops,) = batch.crops
        assert crops.shape == (48, channels, 16, 16)
        assert crops.dtype == torch.uint8
    assert sorted(asked) == list(range(len(source)))
    assert not readable & reasons.keys(), "an image is readable or it is not"
    assert readable | reasons.keys() == set(range(len(source)))
    assert all(reason and "\n" not in reason and len(reason) < 400 for reason in reasons.values())
    if channels != 4:  # few files have four bands
        named = {source.describe(place).rsplit("/", 1)[1] for place in reasons}
        assert not [name for name in named if name.startswith("sound")]
        assert 200 < len(reasons) < 900, "the damage is neither too slight nor too great to tell anything"


def read(source, place):
    """Return the image, or why there is none."""
    try:
        return source.read(place)
    except UnreadableImage as error:
        return str(error)


@pytest.mark.thorough
def test_a_cache_of_damaged_files_has_the_same_images_and_the_same_reasons(damaged, tmp_path):
    splits = open_folder(damaged, holdout=0)
    kept = cached(splits, "disk", side=10_000, folder=str(tmp_path), workers=2).train
    kinds = set()
    for place in range(len(splits.train)):
        expected, found = read(splits.train, place), read(kept, place)
        assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
        kinds.add(type(expected))
    assert kinds == {torch.Tensor, str}
