"""Parts of a source: which images are drawn, and that a part is its source, image by image."""

import pickle
from itertools import pairwise

import pytest
import torch
from PIL import Image

from sslvision.augment.crops import Crop
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.sources.digits import open_digits
from sslvision.data.sources.embedded import MemorySource
from sslvision.data.sources.folder import open_folder
from sslvision.data.subsets import Subset, draw_per_class, draw_up_to, split_off
from sslvision.errors import DataError, UsageError


def shuffled_labels(*sizes):
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]


def source_of(labels):
    """Images whose every pixel is their place."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4).clone()
    return MemorySource("numbers", 1, tuple("abcdefghij"), labels, images, "train")


@pytest.fixture
def folder(tmp_path):
    """Five cats and seven dogs, each of a color of its own; cat 4 is the last cat."""
    for name, count in (("cat", 5), ("dog", 7)):
        (tmp_path / name).mkdir()
        for number in range(count):
            color = (10 * number, 200 if name == "cat" else 0, 50)
            Image.new("RGB", (9, 7), color).save(tmp_path / name / f"{number}.png")
    return tmp_path


# A few of each class


def test_as_many_of_each_class_are_drawn_as_were_asked_for():
    labels = shuffled_labels(30, 8, 12)
    drawn = draw_per_class(labels, 8, seed=0)
    assert labels[drawn].bincount().tolist() == [8, 8, 8]
    assert drawn.dtype == torch.int64
    assert (drawn.diff() > 0).all()


def test_those_drawn_for_fewer_are_among_those_drawn_for_more():
    labels = shuffled_labels(30, 8, 12)
    for seed in range(5):
        draws = [set(draw_per_class(labels, per_class, seed=seed).tolist()) for per_class in range(1, 9)]
        assert all(fewer < more for fewer, more in pairwise(draws))


def test_a_draw_is_a_function_of_labels_and_seed():
    labels = shuffled_labels(30, 8, 12)
    draws = [draw_per_class(labels, 4, seed=seed).tolist() for seed in (0, 1, 0)]
    torch.rand(1)
    assert draws[0] == draws[2] == draw_per_class(labels.clone(), 4, seed=0).tolist()
    assert draws[0] != draws[1]


def test_every_image_of_a_class_is_drawn_equally_often():
    labels = shuffled_labels(10, 10)
    counts = torch.cat([draw_per_class(labels, 2, seed=seed) for seed in range(500)]).bincount(minlength=20)
    assert (counts - 100).abs().max() < 45  # five standard deviations


def test_none_draws_all_and_unbalanced_classes_stay_so():
    assert draw_per_class(shuffled_labels(3, 1), None, seed=0).tolist() == [0, 1, 2, 3]


def test_a_class_without_any_image_is_no_class():
    assert draw_per_class(torch.tensor([3, 5, 3, 5]), 2, seed=0).tolist() == [0, 1, 2, 3]


def test_a_class_with_too_few_images_is_named_with_its_count():
    labels = shuffled_labels(30, 3, 12)
    with pytest.raises(DataError, match=r"Class dog has only 3 image\(s\), and 4 of each class were asked for"):
        draw_per_class(labels, 4, seed=0, classes=("cat", "dog", "eel"))
    with pytest.raises(DataError, match=r"Class 1 has only 3 image\(s\)"):
        draw_per_class(labels, 4, seed=0)


def test_up_to_a_number_of_images_are_drawn_from_classes_of_any_size():
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 3)
    assert labels[draw_up_to(labels, 3, seed=0)].bincount().tolist() == [3, 2, 3]
    assert draw_up_to(labels, None, seed=0).tolist() == list(range(10))


def test_less_than_one_per_class_is_a_usage_error():
    with pytest.raises(UsageError, match="at least one image per class, not 0"):
        draw_per_class(shuffled_labels(2), 0, seed=0)


# Holding out


def test_every_class_gives_up_the_same_fraction_and_nothing_is_lost_or_doubled():
    source = source_of(shuffled_labels(100, 40, 10))
    rest, held = split_off(source, fraction=0.1, seed=0)
    assert held.labels.bincount().tolist() == [10, 4, 1]
    assert sorted([*rest.indices.tolist(), *held.indices.tolist()]) == list(range(150))
    assert (held.indices.diff() > 0).all()
    assert (rest.indices.diff() > 0).all()


def test_a_class_with_one_image_keeps_it():
    rest, held = split_off(source_of(shuffled_labels(4, 1, 2)), fraction=0.5, seed=0)
    assert rest.labels.bincount().tolist() == [2, 1, 1]
    assert held.labels.bincount(minlength=3).tolist() == [2, 0, 1]


def test_what_is_held_out_at_most_is_shared_out_by_the_size_of_the_classes():
    labels = shuffled_labels(100, 60, 40)
    _, all_held = split_off(source_of(labels), fraction=0.2, seed=3)
    rest, held = split_off(source_of(labels), fraction=0.2, at_most=20, seed=3)
    assert held.labels.bincount().tolist() == [10, 6, 4]
    assert len(rest) == 180
    assert set(held.indices.tolist()) < set(all_held.indices.tolist())
    assert len(split_off(source_of(labels), fraction=0.2, at_most=500, seed=3)[1]) == 40


def test_fewer_held_out_images_than_classes_come_from_any_of_them():
    labels = shuffled_labels(*[10] * 8)
    drawn = [split_off(source_of(labels), fraction=0.2, at_most=3, seed=seed)[1].labels for seed in range(30)]
    assert all(len(of.unique()) == 3 for of in drawn)
    assert len(torch.cat(drawn).unique()) == 8


def test_what_is_held_out_is_a_function_of_labels_and_seed():
    labels = shuffled_labels(30, 30)
    of = [split_off(source_of(labels), fraction=0.2, at_most=7, seed=seed)[1].indices.tolist() for seed in (0, 1, 0)]
    assert of[0] == of[2]
    assert of[0] != of[1]


@pytest.mark.parametrize("settings", [{"fraction": 0.0}, {"fraction": 1.0}, {"fraction": 0.1, "at_most": 0}])
def test_impossible_fractions_are_usage_errors(settings):
    with pytest.raises(UsageError, match="held out by a fraction between 0 and 1"):
        split_off(source_of(shuffled_labels(5, 5)), seed=0, **settings)


def test_nothing_to_hold_out_and_no_labels_are_data_errors():
    with pytest.raises(DataError, match="No class of numbers has two images"):
        split_off(source_of(shuffled_labels(1, 1)), fraction=0.1, seed=0)
    source = source_of(shuffled_labels(5, 5))
    source.labels = None
    with pytest.raises(DataError, match="numbers has no labels"):
        split_off(source, fraction=0.1, seed=0)


# A part of a source


def test_a_part_of_images_in_memory_is_its_source_image_by_image():
    source = open_digits().train
    indices = torch.tensor([9, 2, 700])
    part = Subset(source, indices)
    assert len(part) == 3
    assert (part.name, part.channels, part.classes) == (source.name, 1, source.classes)
    for index, place in enumerate(indices.tolist()):
        assert torch.equal(part.read(index), source.read(place))
        assert torch.equal(part.images[index], source.images[place])
        assert part.labels[index] == source.labels[place]
        assert part.describe(index) == source.describe(place)


def test_a_part_of_files_is_its_source_image_by_image_in_another_process_too(folder):
    source = open_folder(folder, holdout=0).train
    indices = torch.tensor([11, 0, 5])
    part = pickle.loads(pickle.dumps(Subset(source, indices)))
    assert part.images is None
    assert part.labels.tolist() == [1, 0, 1]
    for index, place in enumerate(indices.tolist()):
        assert torch.equal(part.read(index), source.read(place))
        assert part.describe(index) == source.describe(place)
    with pytest.raises(IndexError):
        part.describe(3)


def test_a_part_of_files_is_hardly_larger_than_its_source_when_it_is_sent_to_a_worker(folder):
    source = open_folder(folder, holdout=0).train
    part = Subset(source, torch.arange(10))
    assert len(pickle.dumps(part)) < len(pickle.dumps(source)) + 10 * 16 + 1500


def test_a_part_of_a_part_goes_back_to_the_images(folder):
    source = open_folder(folder, holdout=0).train
    rest, _ = split_off(source, fraction=0.2, seed=0)
    few = Subset(rest, draw_per_class(rest.labels, 2, seed=0))
    assert few.labels.tolist() == [0, 0, 1, 1]
    names = ["cat" in few.describe(index) for index in range(4)]
    assert names == [True, True, False, False]
    assert few.read(0)[1, 0, 0] == 200


def test_a_stand_in_in_a_part_comes_with_its_own_label(folder):
    (folder / "cat" / "4.png").write_bytes(b"")
    part = Subset(open_folder(folder, holdout=0).train, torch.tensor([3, 4, 11]))  # cat 3, cat 4 (torn), dog 6
    batches = EpochBatches(3, global_batch=3, seed=0)
    (batch,) = training_loader(part, (Crop(4, (1, 1), flip=False),), batches, workers=0, pin_memory=False)
    shown = dict(zip(batch.indices.tolist(), batch.shown.tolist(), strict=True))
    assert shown == {0: 0, 1: 2, 2: 2}
    greens = batch.crops[0][:, 1, 0, 0]
    assert ((greens == 200) == (part.labels[batch.shown] == 0)).all()
    assert batch.unreadable == [(1, "the file is empty")]
