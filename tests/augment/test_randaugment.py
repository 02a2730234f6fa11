"""RandAugment: torchvision's operations and strengths, drawn from the image's own randomness."""

import pickle

import pytest
import torch
from torchvision.transforms import v2

from sslvision.augment.randaugment import OPERATIONS, RandAugment
from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError


def rng(image=0, epoch=0, seed=0):
    return ImageRandom(seed, torch.tensor([epoch]), torch.tensor([image]))


def picture(channels=3, size=24):
    """Colors that run to both sides, no two channels alike, the full range unused so that contrast can be stretched."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    waves = [120 + 60 * torch.sin(x / 3 + c) + 40 * torch.cos(y / (2 + c)) for c in range(channels)]
    return torch.stack(waves).round().byte()


def distinct(crops):
    return {crop.numpy().tobytes() for crop in crops}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("magnitude", [6, 9, 20, 30])
def test_the_operations_and_strengths_are_torchvisions(channels, magnitude):
    crop = picture(channels)
    ours = distinct(RandAugment(1, magnitude)(crop, rng(image)) for image in range(600))
    reference = v2.RandAugment(1, magnitude, fill=128)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = distinct(reference(crop) for _ in range(600))
    assert len(ours) == len(theirs) >= (20 if channels == 3 else 18)
    ours, theirs = (torch.tensor([list(crop) for crop in crops]) for crops in (ours, theirs))
    apart = (ours[:, None] - theirs).abs().float().mean(2)  # each of ours from each of theirs, in gray levels
    assert apart.min(1).values.max() < 0.3  # torchvision's strengths are rounded to single precision
    assert apart.argmin(1).sort().values.tolist() == list(range(len(theirs)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", range(len(OPERATIONS)))
def test_every_operation_keeps_shape_and_type_of_gray_and_color(operation, channels):
    for size in (8, 32):
        changed = OPERATIONS[operation](picture(channels, size), 0.3, 1)
        assert changed.dtype == torch.uint8
        assert changed.shape == (channels, size, size)


def test_all_operations_are_drawn_equally_often_and_so_are_the_signs():
    drawn = torch.cat([rng(image).uniform("randaugment", 4) for image in range(7000)])
    counts = (drawn[:, :2].flatten() * len(OPERATIONS)).long().bincount()
    assert len(counts) == len(OPERATIONS) == 14
    assert (counts - 1000).abs().max() < 150  # five standard deviations
    assert (drawn[:, 2:] < 0.5).float().mean() == pytest.approx(0.5, abs=0.02)


def test_what_happens_to_an_image_is_a_function_of_seed_epoch_and_image():
    augment, crop = RandAugment(), picture()
    assert torch.equal(augment(crop, rng(5)), pickle.loads(pickle.dumps(augment))(crop, rng(5)))
    assert len(distinct(augment(crop, rng(image)) for image in range(50))) > 35
    assert len(distinct(augment(crop, rng(epoch=epoch)) for epoch in range(50))) > 35
    assert len(distinct(augment(crop, rng(seed=seed)) for seed in range(50))) > 35


def test_torchs_own_generator_is_neither_read_nor_moved_and_the_crop_stays():
    augment, crop = RandAugment(4), picture()
    before, kept = torch.get_rng_state(), crop.clone()
    first = [augment(crop, rng(image)) for image in range(30)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(crop, kept)
    torch.rand(3)
    assert all(torch.equal(one, augment(crop, rng(image))) for image, one in enumerate(first))


def test_what_moves_in_is_mid_gray():
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    moved = OPERATIONS[3](white, 0.3, 1)
    pixels = int(0.3 * 150 / 331 * 64)
    assert (moved[:, :, :pixels] == 128).all()
    assert (moved[:, :, pixels:] == 255).all()


def test_no_operations_change_nothing():
    assert torch.equal(RandAugment(0)(picture(), rng()), picture())


@pytest.mark.parametrize(
    "settings", [{"magnitude": 31}, {"magnitude": -1}, {"magnitude": float("nan")}, {"operations": -1}]
)
def test_settings_out_of_range_are_usage_errors(settings):
    with pytest.raises(UsageError, match="a magnitude from 0 to 30"):
        RandAugment(**settings)


def test_an_image_of_four_channels_is_a_usage_error():
    with pytest.raises(UsageError, match="1 or 3 channels; these have 4"):
        RandAugment()(picture(4), rng())
