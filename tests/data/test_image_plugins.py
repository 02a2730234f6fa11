"""Formats that PIL reads with a plugin: read where it is installed, named where it is not."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, features

from sslvision.data import image_plugins
from sslvision.data.decode import image_size, read_image
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import open_folder
from sslvision.errors import DataError

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
CONTENT = {  # the first bytes of files
    ".heic": HEIC,
    ".jxl": b"\0\0\0\x0cJXL \r\n\x87\n",
    ".dcm": bytes(128) + b"DICM",
    ".raf": b"FUJIFILMCCD-RAW 0201",
    ".cr3": b"\0\0\0\x18ftypcrx \0\0\0\1",
}
# A plugin that reads a PNG behind the first bytes of a HEIC.
PLUGIN = f"""
import io
from PIL import Image, PngImagePlugin

class File(PngImagePlugin.PngImageFile):
    format = "HEIF"
    def _open(self):
        self.fp = io.BytesIO(self.fp.read()[{len(HEIC)}:])
        super()._open()

def register_heif_opener():
    Image.register_open("HEIF", File, lambda prefix: prefix[4:12] == b"ftypheic")
"""


@pytest.fixture
def without_plugins(monkeypatch):
    """Have no plugin be installed."""
    monkeypatch.setattr(image_plugins, "_imported", lambda module: None)
    for known in (image_plugins._registers_heif, image_plugins._registers_jxl):
        known.cache_clear()
    yield
    for known in (image_plugins._registers_heif, image_plugins._registers_jxl):
        known.cache_clear()


def photo(path, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 200, np.uint8)).save(path)
    return path


ADVICE = {
    ".heic": r'HEIC is read by a plugin \(pillow-heif\): pip install "sslvision\[heic\]"',
    ".jxl": r'JPEG XL is read by a plugin \(pillow-jxl-plugin\): pip install "sslvision\[jxl\]"',
    ".dcm": r"DICOM is not read: convert the files to TIFF or \.npy, for example with pydicom",
    ".raf": r"Camera raw is not read: convert the files to TIFF or JPEG, for example with rawpy",
    ".cr3": r"Camera raw is not read",
}


@pytest.mark.parametrize("suffix", ADVICE)
def test_a_format_that_is_not_read_is_named_with_what_to_do(suffix, tmp_path, without_plugins):
    for number in range(4):
        (tmp_path / f"{number}{suffix}").write_bytes(CONTENT[suffix])
    with pytest.raises(DataError, match=rf"Left out: 4 of 4 images \(100 %\), 4 \{suffix}\. {ADVICE[suffix]}"):
        open_folder(tmp_path)
    photo(tmp_path / "a.png")
    splits = open_folder(tmp_path)
    assert len(splits.train) == 1
    (remark,) = splits.remarks
    assert remark.startswith(f"Left out: 4 of 5 images (80 %), 4 {suffix}.")


@pytest.mark.parametrize("suffix", ADVICE)
def test_the_content_decides_whatever_the_name(suffix, tmp_path, without_plugins):
    (tmp_path / "a.jpg").write_bytes(CONTENT[suffix])
    for read in (lambda: read_image(tmp_path / "a.jpg", 3), lambda: image_size(tmp_path / "a.jpg")):
        with pytest.raises(UnreadableImage, match=ADVICE[suffix]):
            read()


@pytest.mark.parametrize("suffix", [".dng", ".CR2", ".nef", ".ARW", ".rw2", ".orf", ".DICOM"])
def test_more_names_of_formats_that_are_not_read(suffix, tmp_path):
    photo(tmp_path / "a.png")
    (tmp_path / f"b{suffix}").touch()
    assert f"1 of 2 images (50 %), 1 {suffix.lower()}. " in open_folder(tmp_path).remarks[0]


def test_several_formats_are_named_each_with_its_way_out(tmp_path, without_plugins):
    photo(tmp_path / "a.png")
    for name in ("b.heic", "c.heif", "d.dng", "e.nef", "f.txt"):
        (tmp_path / name).touch()
    heic, raw, other = open_folder(tmp_path).remarks
    assert heic.startswith("Left out: 2 of 5 images (40 %), 1 .heic, 1 .heif. HEIC") or "1 .heif, 1 .heic" in heic
    assert raw.startswith("Left out: 2 of 5 images (40 %), 1 .")
    assert other.startswith("Left out: 1 of 6 files (16.7 %)")


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.apng", "a.ppm", "a.pgm", "a.pbm", "a.JP2", "a.avif"])
def test_less_common_names_of_formats_that_pil_reads_are_found_and_read(name, tmp_path):
    if name.endswith("avif") and not ("avif" in features.modules and features.check("avif")):
        pytest.skip("this Pillow has no AVIF")
    kind = {"jfif": "JPEG", "jpe": "JPEG", "apng": "PNG", "JP2": "JPEG2000", "avif": "AVIF"}.get(name[2:], "PPM")
    Image.new("1" if name.endswith("pbm") else "RGB", (12, 9), "white").save(tmp_path / name, kind)
    splits = open_folder(tmp_path)
    assert splits.remarks == ()
    assert splits.train.read(0).shape == (3, 9, 12)
    assert int(splits.train.read(0).min()) > 250
    assert image_size(tmp_path / name) == (9, 12)


def test_an_avif_called_jpg_is_read(tmp_path):
    if not ("avif" in features.modules and features.check("avif")):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (12, 9)).save(tmp_path / "a.jpg", "AVIF")
    assert read_image(tmp_path / "a.jpg", 3).shape == (3, 9, 12)


LOADS = """
import sys
from torch.utils.data import DataLoader
from sslvision.data.loader import EvaluationImages
from sslvision.data.sources.folder import open_folder

if __name__ == "__main__":
    assert "pillow_heif" not in sys.modules
    splits = open_folder(sys.argv[1], holdout=0)
    images = EvaluationImages(splits.train, (8, 8), [0, 1])
    loader = DataLoader(images, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    print([(image.shape, int(image.min())) for _, image, _ in loader], splits.remarks)
"""


@pytest.mark.e2e
def test_a_plugin_is_imported_where_a_file_needs_it_in_spawned_workers_too(tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "pillow_heif.py").write_text(PLUGIN)
    (tmp_path / "program.py").write_text(LOADS)
    png = photo(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "b.HEIC").write_bytes(HEIC + png.read_bytes())
    paths = os.pathsep.join([str(tmp_path / "plugins"), *sys.path])
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "photos")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(torch.Size([3, 8, 8]), 200), (torch.Size([3, 8, 8]), 200)] ()"
