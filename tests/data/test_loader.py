"""The loader: the same crops whichever way, unreadable images stood in for, and the statistics of the pixels."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as L
import torch
from PIL import Image

from sslvision.augment.crops import Crop, crop_one
from sslvision.augment.randaugment import RandAugment
from sslvision.augment.randomness import ImageRandom
from sslvision.data import datamodule
from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.data.loader import CHUNK, cut_crops, evaluation_loader, training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.source import Splits, UnreadableImage
from sslvision.data.sources.folder import open_folder
from sslvision.errors import DataError, UsageError

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


def batches(source, *, workers=0, augment=None, global_batch=8):
    sampler = EpochBatches(len(source), global_batch=global_batch, seed=3)
    return list(training_loader(source, CROPS, sampler, workers=workers, pin_memory=False, augment=augment))


def data_of(splits, *, rank=0, world=1, **settings):
    """A data module under a trainer of which this is one process."""
    data = ImageData(splits, CROPS, batch_size=8, seed=3, workers=0, **settings)
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=1,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    return data


def test_workers_and_device_cut_the_same_crops_of_the_same_images():
    for whole, cut in zip(batches(Images()), batches(Images(in_memory=False)), strict=True):
        on_device = cut_crops(whole, CROPS, seed=3)
        assert torch.equal(whole.indices, cut.indices)
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
        same = whole.indices != 5
        assert torch.equal(whole.crops[0][same], other.crops[0][same])


def test_crops_are_those_of_each_image_alone_however_many_are_decoded_together():
    source = Images(in_memory=False)
    sampler = EpochBatches(40, global_batch=40, seed=3)
    (batch,) = training_loader(source, (*CROPS, CROPS[0]), sampler, workers=0, pin_memory=False)
    for place, *cut in zip(batch.indices, *batch.crops, strict=True):
        rng = ImageRandom(3, torch.tensor([0]), place[None])
        for view, crop in enumerate((*CROPS, CROPS[0])):
            assert torch.equal(cut[view], crop_one(source.stack[place], rng, view, crop))


def test_few_decoded_images_are_held_at_once():
    class Counted(Images):
        alive = most = 0

        def read(self, index):
            image = super().read(index).clone()
            type(self).alive += 1
            type(self).most = max(self.most, self.alive)
            weakref.finalize(image, lambda: setattr(Counted, "alive", Counted.alive - 1))
            return image

    batches(Counted(200, in_memory=False), global_batch=200)
    assert Counted.most <= CHUNK + 1


def test_an_unreadable_image_is_named_and_the_next_readable_one_stands_in():
    source = Images(in_memory=False, unreadable=[5, 6])
    named = [pair for batch in batches(source) for pair in batch.unreadable]
    assert set(named) == {(5, "torn"), (6, "torn")}
    assert all(len(batch.crops[0]) == 8 for batch in batches(source))


def test_a_source_without_a_readable_image_gives_an_empty_batch_and_the_reasons():
    (first, *_) = batches(Images(in_memory=False, unreadable=range(40)))
    assert first.crops == []
    assert len(first.unreadable) >= 40


def test_the_label_of_a_stand_in_is_its_own(tmp_path):
    for number in range(4):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "dog").mkdir(exist_ok=True)
        Image.new("L", (9, 9), 40).save(tmp_path / "cat" / f"{number}.png")
        Image.new("L", (9, 9), 200).save(tmp_path / "dog" / f"{number}.png")
    (tmp_path / "cat" / "3.png").write_bytes(b"")  # a dog stands in
    (tmp_path / "dog" / "3.png").write_bytes(b"")  # and for this one the first cat
    source = open_folder(tmp_path, holdout=0, channels=1).train
    (batch,) = batches(source)
    assert dict(zip(batch.indices.tolist(), batch.shown.tolist(), strict=True)) == {
        **{place: place for place in range(8)},
        3: 4,
        7: 0,
    }
    assert source.labels[batch.shown].tolist() == (batch.crops[0][:, 0, 0, 0] > 100).tolist()


@pytest.mark.parametrize("in_memory", [True, False])
def test_without_stand_ins_the_images_shown_are_those_asked_for(in_memory):
    for batch in batches(Images(in_memory=in_memory)):
        assert torch.equal(batch.shown, batch.indices)


# Augmented crops


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmented_crops_do_not_depend_on_loader_processes_or_on_the_batch(in_memory):
    source, augment = Images(in_memory=in_memory), RandAugment(2, 15)
    alone, helped = batches(source, augment=augment), batches(source, augment=augment, workers=2)
    wide = batches(source, augment=augment, global_batch=20)
    for view in range(2):
        together = torch.cat([batch.crops[view] for batch in alone])
        assert torch.equal(together, torch.cat([batch.crops[view] for batch in helped]))
        assert torch.equal(together, torch.cat([batch.crops[view] for batch in wide]))


@pytest.mark.parametrize("in_memory", [True, False])
def test_augment_gets_each_crop_with_the_randomness_of_its_image_and_what_it_returns_is_in_the_batch(in_memory):
    seen = []

    def invert(crop, rng):
        seen.append((tuple(crop.shape), rng.seed, rng.epoch.tolist(), rng.index.tolist()))
        return 255 - crop

    source = Images(in_memory=in_memory)
    changed, plain = batches(source, augment=invert)[0], batches(source)[0]
    plain = cut_crops(plain, CROPS, seed=3) if in_memory else plain
    assert all(torch.equal(255 - one, other) for one, other in zip(plain.crops, changed.crops, strict=True))
    expected = [((3, size, size), 3, [0], [place]) for size in (24, 12) for place in plain.indices.tolist()]
    assert seen[:16] == expected  # the first batch


def test_a_stand_in_is_augmented_by_the_randomness_of_the_image_asked_for():
    drawn_by = []
    batches(
        Images(in_memory=False, unreadable=[5]), augment=lambda crop, rng: drawn_by.append(rng.index.item()) or crop
    )
    assert sorted(drawn_by) == sorted([*range(40)] * 2)


def test_images_in_memory_are_worth_workers_only_where_they_are_augmented():
    def workers(**settings):
        sampler = EpochBatches(40, global_batch=8, seed=3)
        return training_loader(Images(), CROPS, sampler, workers=2, pin_memory=False, **settings).num_workers

    assert workers() == 0
    assert workers(augment=RandAugment()) == 2


# The data module


@pytest.mark.parametrize("augment", [None, RandAugment()])
@pytest.mark.parametrize("in_memory", [True, False])
def test_crops_are_cut_once_wherever_that_is(in_memory, augment):
    source = Images(in_memory=in_memory)
    data = data_of(Splits(source, None), augment=augment)
    (first, *_) = data.train_dataloader()
    batch = data.on_after_batch_transfer(first, 0)
    assert [tuple(crop.shape) for crop in batch.crops] == [(8, 3, 24, 24), (8, 3, 12, 12)]
    if in_memory and augment is None:
        assert first.crops[0].shape == (8, 3, 32, 32)
    else:
        assert all(torch.equal(one, other) for one, other in zip(batch.crops, first.crops, strict=True))
    assert all(crop.is_contiguous() for crop in batch.crops)


@pytest.mark.parametrize("in_memory", [True, False])
def test_two_processes_validate_each_of_five_images_exactly_once(in_memory):
    source = Images(5, in_memory=in_memory)
    splits = Splits(Images(), None, source)
    seen = {}
    for rank in range(2):
        data = data_of(splits, rank=rank, world=2, evaluate_batch=2)
        for batch in data.val_dataloader():
            indices, images = data.on_after_batch_transfer(batch, 0)
            assert images.shape[1:] == (3, 24, 24)
            assert images.dtype == torch.uint8
            assert len(indices) <= 2
            for place, image in zip(indices.tolist(), images, strict=True):
                assert place not in seen
                seen[place] = image
    whole = next(iter(data_of(splits).val_dataloader()))
    assert sorted(seen) == whole[0].tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(seen[place], image) for place, image in enumerate(whole[1]))


def test_a_process_without_a_validation_image_has_one_empty_batch():
    data = data_of(Splits(Images(), None, Images(1)), rank=1, world=2)  # Lightning refuses a loader without a batch
    ((indices, images),) = data.val_dataloader()
    assert len(data.val_dataloader()) == 1
    assert len(indices) == len(images) == 0


def test_without_validation_images_there_is_nothing_to_validate_on():
    assert data_of(Splits(Images(), Images())).val_dataloader() == []


class Silent(L.LightningModule):
    """A method that does not validate."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.validated = []

    def training_step(self, batch, _):
        return self.weight * batch.crops[0].float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Validating(Silent):
    def validation_step(self, batch, _):
        indices, images = batch
        assert images.dtype == torch.uint8
        self.validated += indices.tolist()


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("method", [Silent, Validating])
@pytest.mark.parametrize("validation", [None, Images(5)], ids=["without validation images", "with them"])
def test_lightning_validates_on_all_images_if_there_are_any_and_the_method_wants_it(method, validation, tmp_path):
    data, method = ImageData(Splits(Images(), None, validation), CROPS, batch_size=8, workers=0), method()
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(method, datamodule=data)  # and no word of warning: pytest makes warnings errors
    assert trainer.global_step == 5
    assert method.validated == ([0, 1, 2, 3, 4] if validation and isinstance(method, Validating) else [])


# Evaluation


def test_evaluation_sees_each_asked_image_once_and_leaves_unreadable_ones_out():
    source = Images(in_memory=False, unreadable=[3])
    seen = list(evaluation_loader(source, (32, 32), [1, 3, 5, 7, 9], batch_size=2))
    assert torch.cat([indices for indices, _ in seen]).tolist() == [1, 5, 7, 9]
    assert torch.equal(torch.cat([images for _, images in seen]), source.stack[[1, 5, 7, 9]])


@pytest.mark.parametrize("in_memory", [True, False])
def test_computed_statistics_are_those_of_the_pixels(in_memory):
    source = Images(in_memory=in_memory)
    mean, std = pixel_statistics(source, "computed")
    pixels = source.stack.transpose(0, 1).flatten(1).double() / 255
    assert torch.allclose(torch.tensor(mean, dtype=torch.float64), pixels.mean(1), atol=1e-6)
    assert torch.allclose(torch.tensor(std, dtype=torch.float64), pixels.std(1), atol=1e-5)


def test_statistics_of_large_images_are_counted_in_pieces(monkeypatch):
    source = Images(in_memory=False)
    whole = pixel_statistics(source, "computed")
    monkeypatch.setattr(datamodule, "COUNTED", 100)
    assert pixel_statistics(source, "computed") == whole


def test_statistics_keep_no_image_in_memory():
    alive = weakref.WeakSet()

    class Large(Images):
        def read(self, index):
            assert len(alive) <= 1, "earlier images are still in memory"
            pixels = Pixels((3, 400, 300), dtype=np.uint8)
            pixels[:] = index
            alive.add(pixels)
            return torch.from_numpy(pixels)

    class Pixels(np.ndarray):
        __hash__ = object.__hash__

    mean, _ = pixel_statistics(Large(20, in_memory=False), "computed")
    assert mean == pytest.approx([9.5 / 255] * 3)


def test_statistics_of_one_gray_value_are_that_value():
    source = Images(3)
    source.images = torch.full((3, 3, 8, 8), 51, dtype=torch.uint8)
    mean, std = pixel_statistics(source, "computed")
    assert mean == pytest.approx([0.2] * 3)
    assert std == [1 / 255] * 3


def test_statistics_can_be_given_and_imagenets_fit_color_and_gray():
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
