import json
import pickle

import numpy as np
import pytest
from PIL import Image

from sslvision.data.encoded import PathTable
from sslvision.data.sources.list_file import open_list
from sslvision.errors import DataError, UsageError

ROWS = [("a.png", "cat"), ("b.png", "dog"), ("c.png", "cat"), ("sub/d.png", "dog")]


@pytest.fixture
def images(tmp_path):
    """Return a folder with the images of ROWS; the one of row n is gray n."""
    for number, (path, _) in enumerate(ROWS):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (number, number, number)).save(tmp_path / path)
    return tmp_path


@pytest.fixture
def listed(images):
    """Return a function that writes a list beside the images and opens it."""

    def write(content, name="images.csv", **options):
        (images / name).write_text(content)
        return open_list(images / name, **{"holdout": 0, **options})

    return write


def grays(source):
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def names(source):
    return [source.classes[label] for label in source.labels.tolist()]


# Formats


FORMATS = {
    "images.csv": "path,label\n" + "".join(f"{path},{label}\n" for path, label in ROWS),
    "semicolons.csv": "label;path\r\n" + "".join(f"{label};{path}\r\n" for path, label in ROWS),
    "unnamed.csv": "".join(f"{path},{label}\n" for path, label in ROWS),
    "bom.tsv": "\ufeffpath\tlabel\n" + "".join(f"{path}\t{label}\n" for path, label in ROWS),
    "images.jsonl": "".join(json.dumps({"path": path, "label": label}) + "\n\n" for path, label in ROWS),
    "images.json": json.dumps([{"path": path, "label": [label]} for path, label in ROWS]),
    "images.txt": "".join(f"{path} {label}\n" for path, label in ROWS),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_images_labels_and_order(listed, name):
    source = listed(FORMATS[name], name).train
    assert grays(source) == [0, 1, 2, 3]
    assert names(source) == ["cat", "dog", "cat", "dog"]


def test_parquet_is_read_too(images):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"file_name": [path for path, _ in ROWS], "label": [3, 1, 3, 1]}
    parquet.write_table(pyarrow.table(columns), images / "images.parquet")
    source = open_list(images / "images.parquet", holdout=0).train
    assert grays(source) == [0, 1, 2, 3]
    assert (source.classes, source.labels.tolist()) == (("1", "3"), [1, 0, 1, 0])


def test_a_text_of_paths_has_no_labels_and_paths_may_have_spaces(images, listed):
    (images / "a.png").rename(images / "a b.png")
    source = listed("a b.png\n\nb.png\n", "images.txt").train
    assert (grays(source), source.labels) == ([0, 1], None)


def test_paths_are_relative_to_the_list_or_to_the_root_or_absolute(images, tmp_path_factory):
    other = tmp_path_factory.mktemp("lists") / "images.txt"
    other.write_text("a.png\n" + str(images / "b.png"))
    assert grays(open_list(other, root=images, holdout=0).train) == [0, 1]
    other.write_text("a.png\n")
    with pytest.raises(DataError, match=r"None of the 1 files looked at exists.*data\.root"):
        open_list(other)


def test_a_suffix_completes_names_without_ending(listed):
    assert grays(listed("id,label\na,0\nb,1\n", suffix=".png").train) == [0, 1]
    with pytest.raises(DataError, match=r"No column of .* id='a', label='0'.*data\.suffix=\.jpg"):
        listed("id,label\na,0\nb,1\n")


def test_paths_written_on_windows_are_read(listed):
    splits = listed("path\nsub\\d.png\n")
    assert grays(splits.train) == [3]
    assert any("backslashes" in remark for remark in splits.remarks)


# Labels


def test_numbers_are_classes_in_the_order_of_numbers(listed):
    assert listed("path,label\na.png,10\nb.png,9\nc.png,10\n").train.classes == ("9", "10")


def test_which_column_was_taken_is_said_and_none_reads_no_labels(listed):
    content = FORMATS["images.csv"].replace("label", "Category")
    assert "images.csv: column Category is taken for the labels" in " ".join(listed(content).remarks)
    splits = listed(content, label="none")
    assert (splits.train.labels, splits.train.classes, splits.remarks) == (None, None, ())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("images.csv", "path,label\na.png,cat|dog\nb.png,cat\nc.png,dog\n"),
        ("images.csv", "path,label\na.png,cat|dog\nb.png,cat|fox\nc.png,dog|fox\nsub/d.png,cat|dog|fox\n"),
        ("images.csv", "path,label\na.png,cat dog\nb.png,cat\nc.png,dog\n"),
        ("images.csv", 'path,label\na.png,"[1, 2]"\nb.png,"[2]"\n'),
        ("images.csv", "path,label\na.png,cat\na.png,dog\nb.png,dog\n"),
        ("images.jsonl", '{"path": "a.png", "label": [1, 2]}\n'),
    ],
)
def test_several_labels_of_an_image_are_refused_with_what_to_do(listed, name, content):
    with pytest.raises(DataError, match=r"several labels each.*data\.label"):
        listed(content, name)


def test_names_of_several_words_are_single_labels(listed):
    assert listed("path,label\na.png,ankle boot\nb.png,T-shirt|top\n").train.classes == ("T-shirt|top", "ankle boot")


def test_fractions_are_no_labels(listed):
    with pytest.raises(DataError, match=r"0\.37 is a number with a fraction"):
        listed('{"path": "a.png", "label": 0.37}\n', "images.jsonl")


def test_few_images_without_label_are_left_out_and_many_leave_all_without(listed):
    few = listed("path,label\na.png,cat\nb.png,\nc.png,dog\n")
    assert (grays(few.train), "1 of 3 images (33.3 %) have no label" in few.remarks[-1]) == ([0, 2], True)
    many = listed("path,label\na.png,cat\nb.png,\nc.png,\n")
    assert (grays(many.train), many.train.labels, "no image has one" in many.remarks[-1]) == ([0, 1, 2], None, True)


# Splits


def test_a_column_tells_the_splits(listed):
    splits = listed("path,split,label\na.png,train,x\nb.png,valid,x\nc.png,train,y\nsub/d.png,TEST,y\n")
    assert [grays(part) for part in (splits.train, splits.validation, splits.test)] == [[0, 2], [1], [3]]
    assert splits.test.labels.tolist() == [1]
    with pytest.raises(DataError, match=r"The split 'x' is none of train, val"):
        listed("path,group\na.png,x\n", split="group")


def test_further_lists_are_held_out(images, listed):
    (images / "test.csv").write_text("path,label\nb.png,cat\n")
    splits = listed("path,label\na.png,cat\n", test_file=str(images / "test.csv"))
    assert (grays(splits.train), grays(splits.test), splits.validation) == ([0], [1], None)


def test_held_out_classes_must_be_those_of_training(listed):
    with pytest.raises(DataError, match=r"images of test have classes that no training image has: y \(those have x\)"):
        listed("path,split,label\na.png,train,x\nb.png,test,y\n")


def test_without_splits_a_fraction_is_held_out_by_path_whatever_the_order(listed):
    one, other = (
        listed("path\n" + "\n".join(order), name, holdout=0.25)
        for name, order in (("a.csv", [path for path, _ in ROWS]), ("b.csv", [path for path, _ in reversed(ROWS)]))
    )
    assert grays(one.test) == grays(other.test)
    assert len(one.test) == 1


# What is wrong with a list


def test_a_repeated_image_counts_once(listed):
    splits = listed("path\na.png\nb.png\na.png\n")
    assert grays(splits.train) == [0, 1]
    assert splits.remarks == ("1 of 3 rows (33.3 %) repeat an image, such as a.png: each counts once.",)


def test_an_image_in_two_splits_is_said(listed):
    splits = listed("path,split\na.png,train\nb.png,train\na.png,test\n")
    assert "also in another split, such as a.png" in " ".join(splits.remarks)
    splits = listed("path,split\na.png,train\nb.png,train\na.png,test\na.png,test\nc.png,test\n")
    assert (grays(splits.train), grays(splits.test)) == ([0, 1], [0, 2])  # once in each split


def test_a_long_caption_is_a_value_as_others(listed):
    assert grays(listed(f"path,caption\na.png,{'word ' * 40_000}\nb.png,dog\n").train) == [0, 1]


def test_missing_files_are_said(listed):
    assert "1 of 2 files looked at (50 %) do not exist" in listed("path\na.png\nz.png\n").remarks[0]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("path,label\na.png,1,2\n", {}, r"line 2: 3 values for 2 columns \(path, label\)"),
        ('path,caption\na.png,"the dog\nb.png,he said "x"\n', {}, r"line 2: .* write those inside a value twice"),
        ("path,path\na.png,b.png\n", {}, "names several columns path"),
        ("path,label\n", {"column": "path"}, "lists no images"),
        (
            "path,mask\na.png,b.png\n",
            {"column": "image"},
            r"data\.column=image: .* has no such column\. It has path, mask",
        ),
        ("photo,mask\na.png,b.png\n", {}, r"several columns of paths: say data\.column=\.\.\., one of photo, mask"),
        ("path,kind\na.png,b\n", {"label": "knd"}, r"data\.label=knd: .* has no such column"),
        ("path\nhttps://a.b/c.png\n", {}, "lists addresses"),
        ("", {}, "is empty"),
    ],
)
def test_errors_say_what_was_found_and_what_to_do(listed, content, options, words):
    with pytest.raises((DataError, UsageError), match=words):
        listed(content, **options)


def test_other_files_are_refused(images):
    with pytest.raises(UsageError, match=r"a\.png is not a list of images: expected \.csv"):
        open_list(images / "a.png")
    with pytest.raises(DataError, match=r"missing\.csv does not exist"):
        open_list(images / "missing.csv")


# Memory


def test_a_table_of_paths_is_arrays_and_survives_pickling_and_mapping(tmp_path):
    table = PathTable.of(["été.jpg", "", "b", "猫/c.png"])
    assert [pickle.loads(pickle.dumps(table))[index] for index in range(4)] == ["été.jpg", "", "b", "猫/c.png"]
    assert table.take(np.array([3, 2]))[0] == "猫/c.png"
    table.blob.tofile(tmp_path / "blob")
    mapped = PathTable(np.memmap(tmp_path / "blob", mode="r"), table.starts, table.ends)
    sent = pickle.dumps(mapped)
    assert pickle.loads(sent)[3] == "猫/c.png"
    assert "猫".encode() not in sent
