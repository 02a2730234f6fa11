"""Crops: the authors' distribution, Pillow's pixels, and the same crop whichever way it is cut."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from sslvision.augment import crops
from sslvision.augment.crops import (
    ATTEMPTS,
    MAX_CACHED,
    Crop,
    _every_matrix,
    center_crop,
    crop_batch,
    crop_boxes,
    crop_each,
    crop_noise,
    crop_one,
    draw,
    matrices,
    resampling_matrix,
    resize,
)
from sslvision.augment.randomness import ImageRandom


def rng(images, seed=0):
    return ImageRandom(seed, torch.zeros(images, dtype=torch.int64), torch.arange(images))


def sizes(images, height, width):
    return torch.full((images,), height), torch.full((images,), width)


def photograph(height, width, channels=3):
    """A smooth picture with edges, as pictures are."""
    y, x = np.mgrid[:height, :width] / 13
    waves = [127 + 80 * np.sin(x + c) * np.cos(y * 0.7 - c) + 40 * (np.sin(x * y / 7) > 0) for c in range(channels)]
    return torch.from_numpy(np.stack(waves).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("height", "width"), [(400, 400), (300, 900)])
def test_boxes_have_the_distribution_of_torchvision(height, width):
    crop = Crop(32, (0.2, 1.0))
    torch.manual_seed(0)
    (ours,) = crop_boxes(torch.rand(1, 8000, 2 * ATTEMPTS + 2), *sizes(8000, height, width), [crop])
    blank = torch.zeros(1, height, width)
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(8000)])
    for name, value in {
        "area": lambda box: (box[:, 2] * box[:, 3]).double() / (height * width),
        "aspect": lambda box: (box[:, 3] / box[:, 2]).log().double(),
        "top": lambda box: box[:, 0].double(),
        "left": lambda box: box[:, 1].double(),
    }.items():
        assert kolmogorov_smirnov(value(ours), value(theirs)) <= 0.03, name  # 0.1 % of equal samples are further apart


def kolmogorov_smirnov(one, other):
    at = torch.cat([one, other])
    cumulative = [torch.searchsorted(sample.sort().values, at, right=True) / len(sample) for sample in (one, other)]
    return (cumulative[0] - cumulative[1]).abs().max()


def test_boxes_lie_inside_the_image_even_where_no_ratio_fits():
    for height, width in ((1, 4000), (4000, 1), (3, 3), (1, 1)):
        (boxes,) = crop_boxes(torch.rand(1, 500, 2 * ATTEMPTS + 2), *sizes(500, height, width), [Crop(8, (0.2, 1.0))])
        top, left, box_height, box_width = boxes.T
        assert (boxes[:, 2:] >= 1).all()
        assert ((top >= 0) & (top + box_height <= height)).all()
        assert ((left >= 0) & (left + box_width <= width)).all()


def test_a_crop_is_pillows_bicubic_resize_of_its_box():
    image = photograph(61, 83)
    crop = Crop(32, (0.2, 1.0))
    for seed in range(10):
        boxes, flipped = draw(crop_noise(rng(1, seed), [0]), *sizes(1, 61, 83), [crop])
        top, left, height, width = boxes[0, 0].tolist()
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
        pillow = pillow.crop((left, top, left + width, top + height)).resize((32, 32), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()
        expected = expected.flip(2) if flipped.item() else expected
        assert (crop_one(image, rng(1, seed), 0, crop).int() - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [20, 32, 64])
def test_a_batch_is_cropped_as_its_images_one_by_one(size):
    images = torch.stack([photograph(40, 52).roll(shift, dims=2) for shift in range(40)])
    crop = Crop(size, (0.2, 1.0))
    (together,) = crop_batch(images, crop_noise(rng(40), [1]), [crop])
    assert together.dtype == torch.uint8
    for one in range(40):
        alone = crop_one(images[one], ImageRandom(0, torch.tensor([0]), torch.tensor([one])), 1, crop)
        assert (alone.int() - together[one].int()).abs().max() <= 2
        assert (alone.int() - together[one].int()).abs().float().mean() <= 0.1


def test_the_crops_of_many_images_of_many_sizes_are_bit_for_bit_those_of_each_alone():
    crop, images = Crop(16, (0.05, 1.0)), [photograph(20 + 3 * n, 90 - 2 * n) for n in range(40)]
    noise = crop_noise(rng(40), [2, 5])
    cuts = list(crop_each(images, noise, [crop, crop]))
    for view, of_view in ((2, cuts[:40]), (5, cuts[40:])):
        for place, (image, cut) in enumerate(zip(images, of_view, strict=True)):
            alone = ImageRandom(0, torch.tensor([0]), torch.tensor([place]))
            assert torch.equal(cut, crop_one(image, alone, view, crop))


def test_boxes_of_images_of_many_sizes_are_bit_for_bit_those_of_each_alone():
    torch.manual_seed(0)
    noise, height, width = (
        torch.rand(2, 300, 2 * ATTEMPTS + 2),
        torch.randint(1, 900, (300,)),
        torch.randint(1, 900, (300,)),
    )
    height[:40], width[:40] = torch.arange(1, 41), 700  # no ratio fits
    crops = [Crop(8, (0.2, 1.0)), Crop(8, (0.05, 0.4), ratio=(0.5, 3.0))]
    together = crop_boxes(noise, height, width, crops)
    for view, crop in enumerate(crops):
        for one in range(300):
            here = slice(one, one + 1)
            alone = crop_boxes(noise[view : view + 1, here], height[here], width[here], [crop])
            assert torch.equal(together[view, here], alone[0])


def test_boxes_are_what_they_have_always_been():
    # A box that moves by a pixel changes every run that is repeated: the numbers are those of the first release.
    for height, width, expected in (
        (375, 500, [[124, 22, 234, 261], [30, 69, 325, 350], [55, 13, 284, 337]]),
        (40, 700, [[0, 323, 40, 53], [0, 323, 40, 53], [0, 323, 40, 53]]),
        (96, 96, [[11, 1, 84, 84], [15, 8, 72, 78], [20, 1, 63, 75]]),
    ):
        (boxes,) = crop_boxes(crop_noise(rng(3), [0])[..., :-1], *sizes(3, height, width), [Crop(8, (0.2, 1.0))])
        assert boxes.tolist() == expected


def test_images_in_either_order_of_memory_are_resized_to_the_same_bytes():
    for channels in (1, 3, 4):
        planes = photograph(61, 83, channels)
        pixels = planes.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        assert torch.equal(resize(planes, (24, 30)), resize(pixels, (24, 30)))
        part = resize(pixels[:, 5:40, 7:50], (20, 20))
        assert torch.equal(part, resize(planes[:, 5:40, 7:50].contiguous(), (20, 20)))


def test_a_whole_image_at_its_own_size_stays_as_it_is():
    images = torch.stack([photograph(32, 32, 1)] * 4)
    whole = Crop(32, (1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert torch.equal(*crop_batch(images, crop_noise(rng(4), [0]), [whole]), images)


def test_half_of_the_images_are_mirrored_if_asked():
    images = photograph(16, 16, 1)[None].repeat(600, 1, 1, 1)
    (cut,) = crop_batch(images, crop_noise(rng(600), [0]), [Crop(16, (1.0, 1.0), ratio=(1.0, 1.0))])
    mirrored = (cut == images.flip(3)).flatten(1).all(1)
    straight = (cut == images).flatten(1).all(1)
    assert (mirrored ^ straight).all()
    assert 0.42 < mirrored.float().mean() < 0.58


def test_views_of_an_image_differ():
    images = photograph(40, 40)[None]
    crop = Crop(24, (0.3, 0.6))
    assert not torch.equal(*crop_batch(images, crop_noise(rng(1), [0, 1]), [crop, crop]))


@pytest.mark.parametrize(("length", "size"), [(28, 32), (32, 16), (7, 9)])
def test_matrices_that_are_looked_up_are_those_that_are_computed(length, size):
    intervals = [(start, extent) for start in range(length) for extent in range(1, length - start + 1)]
    start, extent = torch.tensor(intervals).unbind(1)
    mirrored = start % 3 == 0
    assert 2 * (length + 1) ** 2 * length * size <= MAX_CACHED
    computed = resampling_matrix(start, extent, length, size)
    assert torch.equal(matrices(start, extent, length, size), computed)
    found = matrices(start, extent, length, size, mirrored)
    assert torch.equal(found[mirrored], computed[mirrored].flip(1))
    assert torch.equal(found[~mirrored], computed[~mirrored])


def test_matrices_of_larger_images_are_not_kept():
    before = _every_matrix.cache_info().currsize
    matrices(torch.tensor([3]), torch.tensor([90]), 100, 96)
    assert _every_matrix.cache_info().currsize == before


def test_pixels_outside_the_box_have_no_weight():
    weights = resampling_matrix(torch.tensor([7]), torch.tensor([9]), 30, 5)
    assert (weights[..., :7] == 0).all()
    assert (weights[..., 16:] == 0).all()
    assert torch.allclose(weights.sum(2), torch.ones(1, 5))


def test_evaluation_sees_the_center_of_seven_eighths():
    image = photograph(100, 200)
    cut = center_crop(image, (56, 56))
    assert cut.shape == (3, 56, 56)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((128, 64), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)[:, 4:60, 36:92]
    assert (cut.int() - expected.int()).abs().max() <= 1
    assert center_crop(image[:, :32, :32], (32, 32)) is not None
    assert torch.equal(center_crop(image[:, :32, :32], (32, 32)), image[:, :32, :32])


@pytest.mark.parametrize("shape", [(1, 30_000), (30_000, 1), (2, 20_000), (10, 20_000), (3, 3000), (1, 5), (1, 1)])
def test_a_thin_image_is_cut_before_it_is_resized(shape, monkeypatch):
    areas = []

    def measured(image, size):
        areas.append(size[0] * size[1])
        return resize(image, size)

    monkeypatch.setattr(crops, "resize", measured)
    cut = center_crop(photograph(*shape), (224, 224))
    assert cut.shape == (3, 224, 224)
    assert max(areas, default=0) <= 256 * 256 * 10


@pytest.mark.parametrize(
    "shape", [(41, 400), (400, 41), (100, 401), (300, 2001), (7, 64), (2, 300), (1, 100), (1, 101)]
)
def test_cutting_a_thin_image_first_gives_the_same_center(shape, monkeypatch):
    image = photograph(*shape)
    cut = center_crop(image, (32, 32))
    monkeypatch.setattr(crops, "LONGEST", 10_000)
    whole = center_crop(image, (32, 32))
    assert (cut.int() - whole.int()).abs().max() <= 3


def test_an_image_of_usual_proportions_is_never_cut_first(monkeypatch):
    monkeypatch.setattr(crops, "_resize_box", lambda *_: pytest.fail("it was cut"))
    assert center_crop(photograph(100, 400), (32, 32)).shape == (3, 32, 32)


def test_views_cut_together_are_those_cut_one_by_one():
    images = torch.stack([photograph(40, 52).roll(shift, dims=2) for shift in range(5)])
    large, small = Crop(24, (0.1, 0.7)), Crop(12, (0.05, 0.4), flip=False)
    crops = {0: large, 3: small, 4: large}
    together = crop_batch(images, crop_noise(rng(5), list(crops)), list(crops.values()))
    for cut, (view, crop) in zip(together, crops.items(), strict=True):
        (alone,) = crop_batch(images, crop_noise(rng(5), [view]), [crop])
        assert (cut.int() - alone.int()).abs().max() <= 1
