"""Names that would lead elsewhere: of runs, of classes, of the members of archives (row 28)."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
import torchvision.datasets.utils as archives
from PIL import Image

from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.torchvision_sets import _safe_archives, open_torchvision
from sslvision.errors import DataError, UsageError
from sslvision.runs.run_files import claim
from sslvision.workflows.finetuning import finetune
from sslvision.workflows.predicting import open_images

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "''", "a\\b", "'a\\0b'"])
@pytest.mark.parametrize("command", ["pretrain", "probe", "finetune"])
def test_a_name_that_is_a_path_is_refused(settings_of, command, name):
    words = ("recipe=mae",) if command == "pretrain" else ("run=resnet18", "data=digits")
    with pytest.raises(UsageError, match="name="):
        settings_of(command, *words, f"name={name}")


def test_a_folder_that_is_none_of_ours_is_not_emptied(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is not a run folder"):
        claim(tmp_path, overwrite=True, resume=False)
    assert (tmp_path / "thesis.tex").exists()


def evil_tar(member, link=None):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        info = tarfile.TarInfo(member)
        if link:
            info.type, info.linkname = tarfile.SYMTYPE, link
        else:
            info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    return file.getvalue()


def plainly(from_path, to_path, compression):
    with tarfile.open(from_path) as tar:
        tar.extractall(to_path)


@pytest.mark.parametrize("torchvisions", ["own", "older"])
@pytest.mark.parametrize(("member", "link"), [("../../../evil", None), ("../../../b", "c"), ("a", "/etc/passwd")])
def test_a_tar_member_that_leads_out_of_the_folder_is_refused(tmp_path, monkeypatch, member, link, torchvisions):
    def download(url, root, filename=None, md5=None):
        (tmp_path / "sets" / "dtd").mkdir(parents=True, exist_ok=True)
        (tmp_path / "sets" / "dtd" / filename).write_bytes(evil_tar(member, link))

    monkeypatch.setattr(archives, "download_url", download)
    if torchvisions == "older":  # those that leave the filter to Python
        monkeypatch.setitem(archives._ARCHIVE_EXTRACTORS, ".tar", plainly)
    before = tarfile.TarFile.extraction_filter
    with pytest.raises(DataError, match=r"DTD could not be downloaded to .*(outside|absolute)"):
        open_torchvision("DTD", tmp_path / "sets", download=True)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()} == {"dtd-r1.0.1.tar.gz"}
    assert tarfile.TarFile.extraction_filter is before


def test_a_tar_member_with_an_absolute_path_stays_inside(tmp_path):
    (tmp_path / "evil.tar.gz").write_bytes(evil_tar(f"{tmp_path}/evil"))
    with _safe_archives():
        plainly(tmp_path / "evil.tar.gz", tmp_path / "into", None)
    assert not (tmp_path / "evil").exists()
    assert list((tmp_path / "into").rglob("evil"))


def test_a_zip_member_that_leads_out_of_the_folder_stays_inside(tmp_path, monkeypatch):
    def download(url, root, filename=None, md5=None):
        with zipfile.ZipFile(tmp_path / "sets" / "eurosat" / "EuroSAT.zip", "w") as file:
            file.writestr("../../../evil", "evil")

    (tmp_path / "sets" / "eurosat").mkdir(parents=True)
    monkeypatch.setattr(archives, "download_url", download)
    with pytest.raises(DataError, match="EuroSAT"):
        open_torchvision("EuroSAT", tmp_path / "sets", download=True)
    evil = [path.relative_to(tmp_path) for path in tmp_path.rglob("evil")]
    assert [path.parts[0] for path in evil] == ["sets"]


CLASSES = ("evil..", "con", "=cmd|' C calc'!A0", "a\nb", 'quote"', "<b>", "[red]x", "{brace}", r"$\nonsense$")


def test_class_names_from_a_folder_name_no_files_and_break_no_file(tmp_path, tiny_run, settings_of):
    for number, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for place in range(4):
            pixels = np.random.default_rng(10 * number + place).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{place}.png")
    assert set(open_folder(tmp_path / "photos").train.classes) == set(CLASSES)
    before = {path for path in tmp_path.rglob("*") if "photos" not in path.parts}
    words = ("epochs=0", "min_updates=1", "evaluations=1", "scratch=false", "trainer.accelerator=cpu", "data.workers=0")
    data = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.holdout=0.2", "trainer.enable_progress_bar=false")
    results = finetune(settings_of("finetune", f"run={tiny_run}", *words, *data), tmp_path / "tuned")
    assert set(results["fine_tuned"]["per_class"]) == set(CLASSES)
    written = {path for path in tmp_path.rglob("*") if "photos" not in path.parts} - before
    assert all(path == tmp_path / "tuned" or tmp_path / "tuned" in path.parents for path in written)
    assert not [path for path in written if set(path.name) & set("=\n<>\"'")]


def test_one_image_of_any_name_can_be_labeled_but_nothing_beside_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert len(open_images(tmp_path / "a.png", channels=3)) == 1
