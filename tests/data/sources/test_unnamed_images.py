"""Files that are not named as images, and formats that are not read, are counted with what to do about them."""

import io

import pytest
from PIL import Image

from sslvision.data.sources.folder import open_folder
from sslvision.errors import DataError


def image_bytes(form):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 200)).save(buffer, form)
    return buffer.getvalue()


DICOM = bytes(128) + b"DICM" + bytes(40)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (image_bytes("JPEG"), "are JPEG: let their names end in .jpg."),
        (image_bytes("PNG"), "are PNG: let their names end in .png."),
        (image_bytes("TIFF"), "are TIFF: let their names end in .tif."),
        (DICOM, "are DICOM, which is not read: convert the files to TIFF or .npy, for example with pydicom"),
        (b"\0\0\0\x18ftypheic" + bytes(200), "are HEIC"),
    ],
)
@pytest.mark.parametrize("name", ["IM{:05}", "1.2.840.{}", "scan.{:03}"])
def test_images_without_their_ending_are_recognized_by_content(tmp_path, content, words, name):
    for number in range(4):
        (tmp_path / name.format(number)).write_bytes(content)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "a.png").write_bytes(image_bytes("PNG"))
    splits = open_folder(tmp_path, holdout=0)
    assert len(splits.train) == 1
    assert splits.remarks[0].startswith("Left out: 5 of 6 files (83.3 %), not being images that can be read: ")
    assert splits.remarks[1].startswith(f"By their content, 4 of 5 of them looked at (80 %) {words}")


def test_a_folder_of_nothing_else_is_refused_with_the_same_words(tmp_path):
    for number in range(3):
        (tmp_path / f"IM{number}").write_bytes(DICOM)
    with pytest.raises(DataError, match=r"No images in .*By their content, 3 of 3 .* are DICOM, which is not read"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("brain.nii.gz", "1 .nii.gz. NIfTI is not read: save its slices as TIFF or .npy"),
        ("brain.nii", "1 .nii. NIfTI is not read"),
        ("slide.svs", "1 .svs. Whole-slide format is not read: save tiles"),
        ("cells.CZI", "1 .czi. Microscope format is not read"),
        ("stars.fits", "1 .fits. FITS is not read"),
        ("light.exr", "1 .exr. OpenEXR is not read"),
    ],
)
def test_formats_of_instruments_are_images_that_are_not_read(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "a.png").write_bytes(image_bytes("PNG"))
    (remark,) = open_folder(tmp_path, holdout=0).remarks
    assert remark.startswith(f"Left out: 1 of 2 images (50 %), {words}")
    assert "Unpack" not in remark


def test_an_unreadable_file_beside_images_does_no_harm(tmp_path):
    (tmp_path / "secret").write_bytes(image_bytes("JPEG"))
    (tmp_path / "secret").chmod(0)
    (tmp_path / "a.png").write_bytes(image_bytes("PNG"))
    assert len(open_folder(tmp_path, holdout=0).train) == 1


def test_figures_of_earlier_runs_are_no_images_to_train_on(tmp_path):
    for folder in ("only", "outputs/first/figures"):
        (tmp_path / folder).mkdir(parents=True)
        for number in range(3):
            (tmp_path / folder / f"{number}.png").write_bytes(image_bytes("PNG"))
    for name in ("config.yaml", "environment.json"):
        (tmp_path / "outputs" / "first" / name).touch()
    splits = open_folder(tmp_path, holdout=0)
    assert len(splits.train) == 3
    assert splits.remarks[0] == "Left out: folders of sslvision's own runs, with their figures (1): outputs/first/."
    assert len(open_folder(tmp_path / "outputs" / "first" / "figures", holdout=0).train) == 3
