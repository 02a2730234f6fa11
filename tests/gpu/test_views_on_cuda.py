"""Crops, masks and colors on CUDA are those of a CPU, in the precision in which a run on CUDA computes."""

import pytest
import torch

from sslvision.augment.color import Photometry, apply_photometry, draw_photometry
from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.data.batch import Batch
from sslvision.data.loader import cut_crops

pytestmark = pytest.mark.gpu

PHOTOMETRY = [
    Photometry(),
    Photometry(blur_probability=0.1, solarize_probability=0.2),
    Photometry(blur_probability=0.0, jitter_probability=0.0, gray_probability=0.0),  # nothing to do
]


def images(count, size):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random(device, count=8):
    indices = torch.arange(count, device=device)
    return ImageRandom(0, torch.zeros_like(indices), indices)


def test_random_numbers_are_the_same_to_the_last_bit(cuda):
    assert torch.equal(random("cpu").uniform("mask", 196), random(cuda).uniform("mask", 196).cpu())


def test_crops_are_the_same_bytes_but_for_rounding(cuda):
    crops, cut = (Crop(32, (0.4, 1.0)), Crop(16, (0.1, 0.4))), []
    for device in ("cpu", cuda):
        indices = torch.arange(64, device=device)
        whole = Batch([images(64, 32).to(device)], indices, torch.zeros_like(indices), [], indices)
        cut.append(cut_crops(whole, crops, 0).crops)
    for right, found in zip(*cut, strict=True):
        off = (right.int() - found.cpu().int()).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 1e-3


@pytest.mark.parametrize("size", [32, 224])
def test_colors_and_blurs_are_the_same_to_a_hundredth_of_a_gray_level(cuda, size):
    right, found = (
        apply_photometry(images(24, size).to(device), draw_photometry(random(device), range(3), PHOTOMETRY)).cpu()
        for device in ("cpu", cuda)
    )
    assert (right - found).abs().max() < 0.01
    assert torch.equal(found[16:], images(24, size)[16:].float())
