"""Crops and evaluated parts that are rectangles: torchvision's boxes and timm's evaluation, in the shape of the result."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from sslvision.augment.crops import ATTEMPTS, Crop, center_crop, crop_batch, crop_boxes, crop_each, crop_noise
from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError
from sslvision.evaluation.central_crop import choose_crop_pct, describe_crop
from sslvision.evaluation.evaluate import size_of_pixels

N = 4000


def boxes_of(crop, height, width):
    torch.manual_seed(0)
    sizes = (torch.full((N,), side) for side in (height, width))
    return crop_boxes(torch.rand(1, N, 2 * ATTEMPTS + 2), *sizes, [crop])[0]


def photograph(height, width, seed=0):
    pixels = np.random.default_rng(seed).normal(128, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
    return pixels, torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("shape", [(32, 64), (64, 16)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (200, 900)])
def test_boxes_have_the_distribution_of_torchvision_with_the_ratio_of_the_result(shape, height, width):
    ours = boxes_of(Crop(shape, (0.2, 1.0)), height, width)
    wide = shape[1] / shape[0]
    blank, ratio = torch.zeros(1, height, width), [3 / 4 * wide, 4 / 3 * wide]
    theirs = torch.tensor([RandomResizedCrop.get_params(blank, [0.2, 1.0], ratio) for _ in range(N)])
    for value in (lambda box: box[:, 2] * box[:, 3], lambda box: box[:, 3] / box[:, 2], lambda box: box[:, 1]):
        one, other = value(ours).double(), value(theirs).double()
        at = torch.cat([one, other])
        shares = [torch.searchsorted(some.sort().values, at, right=True) / N for some in (one, other)]
        assert (shares[0] - shares[1]).abs().max() <= 0.044  # 0.1 % of equal samples are further apart


def test_what_is_seen_is_stretched_by_no_more_than_a_third_whatever_the_shape():
    for shape in [(32, 64), (32, 96), (64, 16), (32, 32)]:
        box = boxes_of(Crop(shape, (0.05, 0.4)), 400, 800).double()
        stretched = (shape[1] / box[:, 3]) / (shape[0] / box[:, 2])
        assert 0.7 < stretched.min() < 0.85
        assert 1.2 < stretched.max() < 1.4


def test_a_crop_of_all_of_an_image_of_the_shape_of_the_result_is_all_of_it():
    crop = Crop((32, 64), (1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    assert (boxes_of(crop, 100, 200) == torch.tensor([0, 0, 100, 200])).all()
    images = torch.randint(256, (3, 1, 32, 64), dtype=torch.uint8)
    index = torch.arange(3)
    noise = crop_noise(ImageRandom(0, index * 0, index), [0])
    assert torch.equal(crop_batch(images, noise, [Crop((32, 64), (1.0, 1.0), flip=False)])[0], images)


def test_a_batch_and_single_images_are_cut_alike():
    _, image = photograph(40, 70)
    images = torch.stack([image, image.flip(1), image.flip(2)])
    index, crops = torch.arange(3), [Crop((16, 48), (0.3, 1.0)), Crop((24, 8), (0.1, 0.4))]
    noise = crop_noise(ImageRandom(0, index * 0, index), range(2))
    single = list(crop_each([*images], noise, crops))
    for view, together in enumerate(crop_batch(images, noise, crops)):
        assert together.shape == (3, 3, *crops[view].shape)
        for one, other in zip(together, single[3 * view :], strict=False):
            assert (one.int() - other.int()).abs().max() <= 2


def test_a_square_is_the_same_crop_however_it_is_written():
    one, other = Crop(32, (0.2, 1.0)), Crop((32, 32), (0.2, 1.0))
    assert one == other
    assert hash(one) == hash(other)
    assert other.size == 32
    assert one.shape == (32, 32)
    with pytest.raises(UsageError, match="its width is 0"):
        Crop((32, 0), (0.2, 1.0))


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (37, 224), (224, 223)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875])
def test_evaluated_parts_are_timms(size, crop_pct):
    transform = timm.data.create_transform((3, *size), interpolation="bicubic", crop_pct=crop_pct, normalize=False)
    for height, width in [size, (97, 41), (40, 333), (300, 19), (375, 500), (3, 5)]:
        pixels, image = photograph(height, width, seed=height)
        ours = center_crop(image, size, crop_pct)
        assert ours.shape == (3, *size)
        assert (ours.int() - transform(Image.fromarray(pixels)).int()).abs().max() <= 2, (height, width)


def test_images_of_exactly_the_rectangle_are_taken_whole_and_others_are_not():
    class Source:
        images = torch.zeros(2, 1, 32, 64, dtype=torch.uint8)

        def __len__(self):
            return len(self.images)

        def read(self, index):
            return self.images[index]

    assert choose_crop_pct([Source()], (32, 64)) == 1.0
    assert choose_crop_pct([Source()], (64, 32)) == 0.875
    assert choose_crop_pct([Source()], (64, 64)) == 0.875


def test_what_is_evaluated_is_told_in_words():
    assert describe_crop(0.875, (32, 32)) == "the central 87.5 % square of every image (crop_pct 0.875)"
    assert (
        describe_crop(1.0, (224, 448))
        == "the central rectangle of shape 1:2 (height:width) of every image (crop_pct 1)"
    )


def test_pixels_are_compared_in_the_shape_of_the_images_and_as_many_of_them():
    assert size_of_pixels((224, 224)) == (32, 32)
    assert size_of_pixels((32, 64)) == (23, 45)
    assert size_of_pixels((1024, 1)) == (1024, 1)
