"""Data sets of Hugging Face: which rows are held out, and what their labels mean."""

import io

import pytest
from PIL import Image

datasets = pytest.importorskip("datasets")

from sslvision.data.sources.hugging_face import open_hugging_face  # noqa: E402
from sslvision.errors import DataError  # noqa: E402


def rows(labels, names=None):
    """A data set with an image for each label, and a column of labels if there are names."""
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    columns = {"image": [{"bytes": content.getvalue(), "path": None}] * len(labels)}
    features = {"image": datasets.Image()}
    if names is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def saved(folder, **splits):
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(folder)
    return open_hugging_face(str(folder))


def test_a_folder_tells_the_split_of_files_whose_names_do_not(tmp_path):
    for split, labels in (("train", [0, 1, 0]), ("test", [1])):
        (tmp_path / "default" / split).mkdir(parents=True)
        rows(labels, ["cat", "dog"]).to_parquet(tmp_path / "default" / split / "0000.parquet")
    splits = open_hugging_face(str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (3, 1)


def test_classes_that_a_split_numbers_otherwise_are_those_of_their_names(tmp_path):
    splits = saved(tmp_path / "a", train=rows([0, 1], ["cat", "dog"]), test=rows([0, 1, -1], ["dog", "cat"]))
    assert splits.train.classes == ("cat", "dog")
    assert splits.test.labels.tolist() == [1, 0]  # dog, cat; the one without a label is left out
    with pytest.raises(
        DataError, match=r"other classes in a held-out split than in training: fox\. Training has cat, dog"
    ):
        saved(tmp_path / "b", train=rows([0, 1], ["cat", "dog"]), test=rows([0], ["fox"]))


def test_a_split_without_the_column_has_no_labels(tmp_path):
    splits = saved(tmp_path / "a", train=rows([0, 1] * 20, ["cat", "dog"]), test=rows([0, 0]))
    assert (len(splits.train), len(splits.test)) == (38, 2)  # held out of the training images
    assert "2 images of test have no labels and are not used" in " ".join(splits.remarks)
