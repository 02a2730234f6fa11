"""The loader: the same crops whichever way, unreadable images stood in for, and the statistics of the pixels."""

import pytest
import torch

from sslvision.data.base import UnreadableImage
from sslvision.data.loading import cut_crops, evaluation_loader, training_loader
from sslvision.data.module import pixel_statistics
from sslvision.data.sampler import EpochBatches
from sslvision.errors import DataError, UsageError
from sslvision.views.geometry import Crop

CROPS = (Crop(24, (0.3, 1.0)), Crop(12, (0.1, 0.3)))


class Images:
    """Smooth random images, in memory or one by one, some of which cannot be read."""

    name, classes, labels, channels = "images", None, None, 3

    def __init__(self, count=40, *, in_memory=True, unreadable=(), channels=3):
        torch.manual_seed(0)
        small = torch.rand(count, channels, 6, 6) * 255
        self.stack = torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(0, 255).byte()
        self.images = self.stack if in_memory else None
        self.unreadable, self.channels = set(unreadable), channels

    def __len__(self):
        return len(self.stack)

    def read(self, index):
        if index in self.unreadable:
            raise UnreadableImage("torn")
        return self.stack[index]

    def describe(self, index):
        return f"number {index}"


def batches(source, **settings):
    sampler = EpochBatches(len(source), global_batch=8, seed=3, **settings)
    return list(training_loader(source, CROPS, sampler, workers=0, pin_memory=False))


def test_workers_and_device_cut_the_same_crops_of_the_same_images():
    for whole, cut in zip(batches(Images()), batches(Images(in_memory=False)), strict=True):
        on_device = cut_crops(whole, CROPS, seed=3)
        assert torch.equal(whole.places, cut.places)
        assert [tuple(crop.shape) for crop in cut.crops] == [(8, 3, 24, 24), (8, 3, 12, 12)]
        for one, other in zip(on_device.crops, cut.crops, strict=True):
            assert (one.int() - other.int()).abs().max() <= 2


def test_loader_processes_change_nothing():
    source = Images(in_memory=False)
    sampler = EpochBatches(len(source), global_batch=8, seed=3)
    for alone, helped in zip(
        batches(source), training_loader(source, CROPS, sampler, workers=1, pin_memory=False), strict=True
    ):
        assert all(torch.equal(one, other) for one, other in zip(alone.crops, helped.crops, strict=True))


def test_the_crops_of_an_image_do_not_depend_on_the_images_beside_it():
    broken = batches(Images(in_memory=False, unreadable=[5]))
    for whole, other in zip(batches(Images(in_memory=False)), broken, strict=True):
        same = whole.places != 5
        assert torch.equal(whole.crops[0][same], other.crops[0][same])


def test_an_unreadable_image_is_named_and_the_next_readable_one_stands_in():
    source = Images(in_memory=False, unreadable=[5, 6])
    named = [pair for batch in batches(source) for pair in batch.unreadable]
    assert set(named) == {(5, "torn"), (6, "torn")}
    assert all(len(batch.crops[0]) == 8 for batch in batches(source))


def test_a_source_without_a_readable_image_gives_an_empty_batch_and_the_reasons():
    (first, *_) = batches(Images(in_memory=False, unreadable=range(40)))
    assert first.crops == []
    assert len(first.unreadable) >= 40


def test_evaluation_sees_each_asked_image_once_and_leaves_unreadable_ones_out():
    source = Images(in_memory=False, unreadable=[3])
    seen = list(evaluation_loader(source, 32, [1, 3, 5, 7, 9], batch_size=2))
    assert torch.cat([places for places, _ in seen]).tolist() == [1, 5, 7, 9]
    assert torch.equal(torch.cat([images for _, images in seen]), source.stack[[1, 5, 7, 9]])


@pytest.mark.parametrize("in_memory", [True, False])
def test_computed_statistics_are_those_of_the_pixels(in_memory):
    source = Images(in_memory=in_memory)
    mean, std = pixel_statistics(source, "computed")
    pixels = source.stack.transpose(0, 1).flatten(1).double() / 255
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), pixels.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), pixels.std(1), atol=1e-5)


def test_statistics_can_be_given_and_imagenets_fit_colour_and_grey():
    assert pixel_statistics(Images(), [[0.1, 0.2, 0.3], [1, 1, 1]]) == ([0.1, 0.2, 0.3], [1, 1, 1])
    assert pixel_statistics(Images(), "imagenet")[0] == [0.485, 0.456, 0.406]
    assert pixel_statistics(Images(channels=1), "imagenet")[0] == pytest.approx([0.449])


@pytest.mark.parametrize("wrong", ["imagnet", [[0.1], [0.2]], [[0.1, 0.1, 0.1], [1, 0, 1]]])
def test_statistics_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UsageError, match=r"data\.normalize"):
        pixel_statistics(Images(), wrong)


def test_statistics_of_unreadable_images_are_a_data_error():
    with pytest.raises(DataError, match="None of the images"):
        pixel_statistics(Images(in_memory=False, unreadable=range(40)), "computed")
