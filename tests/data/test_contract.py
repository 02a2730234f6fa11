"""A source of a user's own is checked before training, and what is wrong is said in words."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.data.contract import check_contract
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import SourceGone, Splits, UnreadableImage
from sslvision.errors import UsageError
from sslvision.workflows.pretraining import open_splits


class Own:
    name, channels, classes, labels, images = "own", 3, None, None, None

    def __init__(self, image=None, **changed):
        self.image = torch.zeros(3, 8, 9, dtype=torch.uint8) if image is None else image
        for key, value in changed.items():
            setattr(self, key, value)

    def __len__(self):
        return 20

    def read(self, index):
        if isinstance(self.image, Exception):
            raise self.image
        return self.image

    def describe(self, index):
        return f"number {index}"


def test_sources_that_keep_the_contract_are_fine():
    labels = torch.arange(20) % 4
    check_contract(Splits(Own(), Own(labels=labels, classes=("a", "b", "c", "d")), Own(labels=labels)))
    check_contract(Splits(Own(images=torch.zeros(20, 3, 4, 4, dtype=torch.uint8)), None))
    check_contract(Splits(Own(torch.zeros(9, 8, 3, dtype=torch.uint8).permute(2, 0, 1)), None))  # a view


WRONG_IMAGES = {
    "floats from 0 to 1": (
        torch.rand(3, 8, 9),
        3,
        r"float32 from 0\.\d+ to .*uint8 in 0\.\.255.*\(image \* 255\)\.round",
    ),
    "floats of another range": (torch.rand(3, 8, 9) * 9 - 4, 3, r"float32 from -\d.*one range for all images"),
    "half floats": (torch.rand(3, 8, 9).half(), 3, r"float16"),
    "integers of 8 bytes": (torch.zeros(3, 8, 9, dtype=torch.int64), 3, r"int64 from 0 to 0.*uint8"),
    "booleans": (torch.zeros(3, 8, 9, dtype=torch.bool), 3, r"bool.*uint8"),
    "an array": (np.zeros((3, 8, 9), np.uint8), 3, r"a NumPy array of shape \(3, 8, 9\), uint8.*torch\.from_numpy"),
    "a PIL image": (Image.new("RGB", (9, 8)), 3, r"a PIL\.Image\.Image.*from_pil"),
    "an image and a label": ((torch.zeros(3, 8, 9), 4), 3, r"returned a tuple"),
    "channels last": (torch.zeros(8, 9, 3, dtype=torch.uint8), 3, r"\(8, 9, 3\).*permute\(2, 0, 1\)"),
    "no channel": (torch.zeros(8, 9, dtype=torch.uint8), 1, r"\(8, 9\).*image\[None\]"),
    "another number of channels": (torch.zeros(1, 8, 9, dtype=torch.uint8), 3, r"\(1, 8, 9\).*here \(3, H, W\)"),
    "channels that were not asked for": (torch.zeros(3, 8, 9, dtype=torch.uint8), 1, r"give data\.channels=3"),
    "no pixels": (torch.zeros(3, 0, 9, dtype=torch.uint8), 3, r"\(3, 0, 9\)"),
    "a missing key": (KeyError("path"), 3, r"read\(0\) raised KeyError: 'path'\. A source raises UnreadableImage"),
    "a missing file": (FileNotFoundError(2, "No such file"), 3, r"read\(0\) raised FileNotFoundError.*UnreadableImage"),
}


@pytest.mark.parametrize(("image", "channels", "message"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_a_first_image_against_the_contract_is_refused(image, channels, message):
    with pytest.raises(UsageError, match=rf"The data source Own \(train\): .*{message}"):
        check_contract(Splits(Own(image, channels=channels), None))


WRONG_ATTRIBUTES = {
    "channels of another type": ({"channels": "3"}, r"channels='3'"),
    "no channels": ({"channels": 0}, r"channels=0"),
    "labels in a list": ({"labels": [0, 1] * 10}, r"labels that are a list.*torch\.tensor\(labels\)"),
    "labels of floats": ({"labels": torch.zeros(20)}, r"labels of torch\.float32.*labels\.long\(\)"),
    "too few labels": ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels of shape \(3,\).*\(20,\)"),
    "labels of vectors": ({"labels": torch.zeros(20, 2, dtype=torch.int64)}, r"labels of shape \(20, 2\)"),
    "labels below 0": ({"labels": torch.arange(20) - 1}, r"labels from -1 to 18"),
    "labels beyond the classes": (
        {"labels": torch.arange(20), "classes": ("a", "b")},
        r"0 to 19.*2 classes they are 0 to 1",
    ),
    "images of floats": ({"images": torch.zeros(20, 3, 4, 4)}, r"images that are a tensor.*float32.*uint8"),
    "images in an array": ({"images": np.zeros((20, 3, 4, 4), np.uint8)}, r"images that are a NumPy array"),
    "images of other channels": (
        {"images": torch.zeros(20, 1, 4, 4, dtype=torch.uint8)},
        r"\(20, 1, 4, 4\).*\(20, 3, H, W\)",
    ),
    "fewer images": ({"images": torch.zeros(9, 3, 4, 4, dtype=torch.uint8)}, r"\(9, 3, 4, 4\)"),
    "descriptions that are no text": ({"describe": lambda index: index}, r"describe\(0\) returned a int.*str"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG_ATTRIBUTES.values(), ids=WRONG_ATTRIBUTES)
def test_attributes_against_the_contract_are_refused(changed, message):
    with pytest.raises(UsageError, match=rf"\(test\): .*{message}"):
        check_contract(Splits(Own(), Own(**changed)))


class Later(Own):
    """Its image 12 is of floats."""

    def read(self, index):
        return self.image.float() / 255 if index == 12 else self.image


@pytest.mark.parametrize("workers", [0, 1])
def test_a_later_image_against_the_contract_ends_the_run_by_name_instead_of_becoming_black(workers):
    splits = check_contract(Splits(Later(), None))
    loader = evaluation_loader(splits.train, (8, 8), list(range(20)), batch_size=4, workers=workers)
    with pytest.raises(UsageError, match=r"^The data source Later \(train\): read\(12\) .*float32.*\(image \* 255\)"):
        list(loader)


def test_what_is_missing_is_named_and_splits_are_asked_for():
    with pytest.raises(UsageError, match="has no name, channels, classes, labels, images, read, describe"):
        check_contract(Splits([1, 2], None))
    with pytest.raises(UsageError, match=r"returned a .*Own, not sslvision\.Splits"):
        check_contract(Own())


def test_an_unreadable_first_image_is_no_fault_and_a_vanished_disk_is_named_as_such():
    check_contract(Splits(Own(UnreadableImage("torn")), None))
    with pytest.raises(SourceGone):
        check_contract(Splits(Own(SourceGone("the disk is gone")), None))


def open_own():
    return Splits(Own(torch.rand(3, 8, 9)), None)


def test_commands_check_the_source_that_a_recipe_names():
    with pytest.raises(UsageError, match="float32"):
        open_splits({"_target_": f"{__name__}.open_own"})
