"""Photometric augmentation: torchvision's and Pillow's pixels, the authors' distributions, one image at a time in a batch."""

import math
from contextlib import nullcontext
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from sslvision.augment.blur import SIGMAS, _every_blur_matrix, blur_matrix, gaussian_blur
from sslvision.augment.color import (
    BRIGHTNESS,
    CHUNK,
    CONTRAST,
    HUE,
    SATURATION,
    Photometry,
    apply_photometry,
    blend,
    draw_photometry,
    enhance,
    luma,
    shift_hue,
    solarize,
)
from sslvision.augment.randomness import ImageRandom

SECOND_VIEW = Photometry(blur_probability=0.1, solarize_probability=0.2)
EVERYTHING = Photometry(blur_probability=0.5, solarize_probability=0.5)


def rng(images, seed=0):
    return ImageRandom(seed, torch.zeros(images, dtype=torch.int64), torch.arange(images))


def photographs(images, height=40, width=52, channels=3):
    """Smooth pictures with edges and a little noise, as pictures are."""
    y, x = np.mgrid[:height, :width] / 13
    noise = np.random.default_rng(0)
    pictures = [
        np.stack(
            [
                120 + 80 * np.sin(x + i + c) * np.cos(y * 0.7 - c * i) + 40 * (np.sin(x * y + i) > 0)
                for c in range(channels)
            ]
        )
        + noise.normal(0, 8, (channels, height, width))
        for i in range(images)
    ]
    return torch.from_numpy(np.stack(pictures).clip(0, 255).astype(np.uint8))


def pillow_blur(image, sigma):
    """Blur one uint8 image (C, H, W) as the authors do."""
    blurred = [Image.fromarray(plane.numpy()).filter(ImageFilter.GaussianBlur(sigma)) for plane in image]
    return torch.from_numpy(np.stack([np.array(plane) for plane in blurred]))


def nothing(images):
    """A `Drawn` that leaves every image alone."""
    no = torch.zeros(images, dtype=torch.bool)
    never = torch.full((images,), torch.inf)
    return draw_photometry(rng(images), [0], [EVERYTHING])._replace(jittered=no, gray=no, blurred=no, threshold=never)


@pytest.mark.parametrize(
    ("operation", "adjust"),
    [(BRIGHTNESS, tv.adjust_brightness), (CONTRAST, tv.adjust_contrast), (SATURATION, tv.adjust_saturation)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_brightness_contrast_and_saturation_are_those_of_torchvision(operation, adjust, channels):
    images = photographs(5, channels=channels)
    factors = torch.tensor([0.0, 0.6, 1.0, 1.2, 1.7])
    ours = enhance(images.float(), torch.full((5,), operation), factors)
    for image, factor, result in zip(images, factors.tolist(), ours, strict=True):
        rounding = 1 + abs(1 - factor)  # torchvision rounds the result down, and the gray before it
        assert (result - adjust(image, factor)).abs().max() <= rounding + 1e-3
        assert (result - 255 * adjust(image / 255, factor)).abs().max() <= 1e-3


def test_a_factor_of_one_changes_nothing():
    images = photographs(3).float() + 0.3
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        assert torch.equal(enhance(images, torch.full((3,), operation), torch.ones(3)), images.clamp(0, 255))


def test_a_shift_of_hue_is_that_of_torchvision():
    images = torch.cat([photographs(6), torch.randint(0, 256, (1, 3, 40, 52), generator=torch.manual_seed(0)).byte()])
    images[:, :, :4] = images[:, :1, :4]  # gray
    images[:, :, 4:6] = torch.tensor([[255, 0], [0, 255], [255, 255]])[None, :, :, None]  # two channels equally strong
    shifts = torch.tensor([-0.5, -0.1, 0.0, 0.03, 0.1, 0.5, 0.07])
    ours = shift_hue(images.float(), shifts)
    for image, shift, result in zip(images, shifts.tolist(), ours, strict=True):
        assert (result - tv.adjust_hue(image, shift)).abs().max() <= 1.01
        assert (result - 255 * tv.adjust_hue(image / 255, shift)).abs().max() <= 0.01


def test_a_blend_of_all_or_nothing_is_one_of_the_two_to_the_bit():
    images, others = photographs(3).float() / 7, photographs(3).flip(3).float() / 7
    for other in (others, others[:, :1], others[:, :1, :1, :1]):
        blended = blend(images, other, torch.tensor([1.0, 0.0, 0.5]))
        assert torch.equal(blended[0], images[0])
        assert torch.equal(blended[1], other[1].expand(images[1].shape))
        assert torch.allclose(blended[2], (images[2] + other[2]) / 2)


def test_gray_is_that_of_torchvision():
    images = photographs(3)
    assert (luma(images.float()) - 255 * tv.rgb_to_grayscale(images / 255)).abs().max() <= 1e-3


@pytest.mark.parametrize(("height", "width"), [(40, 52), (52, 40), (33, 33), (3, 5), (1, 1)])
def test_the_blur_is_that_of_pillow(height, width):
    images = photographs(6, height, width)
    sigmas = torch.tensor([0.1, 0.3, 1.0, 1.5, 2.0, 4.0])
    ours = gaussian_blur(images.float(), sigmas)
    for image, sigma, result in zip(images, sigmas.tolist(), ours, strict=True):
        difference = (result - pillow_blur(image, sigma)).abs()
        assert difference.max() <= 3.01  # Pillow rounds to bytes six times, by up to a half
        assert difference.mean() <= 1


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_the_blur_is_nearly_gaussian(sigma):
    offset = torch.arange(-20, 21)
    gaussian = torch.exp(-(offset**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    row = blur_matrix(torch.tensor([sigma]), 41)[0, 20]
    assert (row - gaussian).abs().sum() <= 0.06
    assert (row * offset**2).sum() == pytest.approx(sigma**2, rel=1e-4)


def test_the_blur_has_the_variance_asked_for_even_below_a_pixel():
    sigmas = torch.tensor([0.1, 0.3, 0.5, 0.9])
    rows = blur_matrix(sigmas, 41)[:, 20]
    assert torch.allclose((rows * torch.arange(-20, 21) ** 2).sum(1), sigmas**2, rtol=1e-3)


def test_a_blur_of_zero_changes_nothing():
    images = photographs(2).float() + 0.3
    assert torch.equal(gaussian_blur(images, torch.zeros(2)), images)


def test_blurs_that_are_looked_up_are_those_that_are_computed():
    images = photographs(513, 12, 16).float()
    sigmas = torch.arange(513) / SIGMAS
    _every_blur_matrix.cache_clear()
    assert torch.equal(gaussian_blur(images, sigmas, 2.0), gaussian_blur(images, sigmas))
    assert _every_blur_matrix.cache_info().currsize == 2  # those of 12 and of 16 pixels


def test_the_matrices_of_larger_images_are_not_kept():
    before = _every_blur_matrix.cache_info().currsize
    gaussian_blur(torch.zeros(1, 1, 96, 96), torch.tensor([1.0]), 2.0)
    assert _every_blur_matrix.cache_info().currsize == before


def test_blurs_are_drawn_in_steps_and_none_is_beyond_the_strongest():
    drawn = draw_photometry(rng(2000), [0, 1], [Photometry(), Photometry(blur_sigma=(0.3, 2.999))])
    assert torch.equal((drawn.sigma * SIGMAS).round() / SIGMAS, drawn.sigma)
    assert len(drawn.sigma[:2000].unique()) > 450  # of 487
    assert drawn.strongest == 2.999
    assert drawn.part(3, 7).sigma.tolist() == drawn.sigma[3:7].tolist()


def test_solarizing_inverts_every_level_from_the_threshold_up():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    for threshold in (0, 127, 128, 255):
        ours = solarize(levels.float(), torch.tensor([float(threshold)]))
        assert torch.equal(ours, tv.solarize(levels, threshold).float())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_augmented_as_by_torchvision_one_image_at_a_time(channels):
    images = photographs(96, channels=channels)
    drawn = draw_photometry(rng(96), [0], [EVERYTHING])
    ours = apply_photometry(images, drawn)
    assert ours.dtype == torch.float32
    for i, image in enumerate(images):
        expected = one_at_a_time(image, drawn.part(i, i + 1))
        difference = (ours[i] - expected).abs()
        limit = 3.6 if drawn.blurred[i] else 0.02  # Pillow's blur rounds to bytes before and in each of its six passes
        jump = 1 if drawn.solarized[i] else 0  # from 128 - tiny to 255 - 128
        assert difference.max() <= limit + jump, i
        assert difference.mean() <= limit / 3, i


def one_at_a_time(image, drawn):
    """Augment one image by the functions of torchvision and Pillow's blur -> float, 0 to 255."""
    image = image / 255
    for operation in drawn.order[0].tolist() if drawn.jittered else []:
        adjust, amount = {
            BRIGHTNESS: (tv.adjust_brightness, drawn.brightness),
            CONTRAST: (tv.adjust_contrast, drawn.contrast),
            SATURATION: (tv.adjust_saturation, drawn.saturation),
            HUE: (tv.adjust_hue, drawn.hue),
        }[operation]
        image = adjust(image, amount.item())
    if drawn.gray:
        image = tv.rgb_to_grayscale(image, num_output_channels=len(image))
    if drawn.blurred:
        image = pillow_blur((255 * image).round().byte(), drawn.sigma.item()) / 255
    return 255 * (tv.solarize(image, 128 / 255) if drawn.solarized else image)


def test_an_image_for_which_nothing_was_drawn_stays_as_it_is():
    images = photographs(4)
    assert torch.equal(apply_photometry(images, nothing(4)), images.float())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_without_red_green_and_blue_keep_what_color_they_have(channels):
    images = photographs(8, channels=channels)
    yes, one = torch.ones(8, dtype=torch.bool), torch.ones(8)
    drawn = nothing(8)._replace(jittered=yes, gray=yes, brightness=one, contrast=one)
    assert torch.equal(apply_photometry(images, drawn), images.float())
    brighter = apply_photometry(images, drawn._replace(brightness=1.1 * one))
    assert torch.allclose(brighter, (1.1 * images).clamp(max=255))


def test_the_result_for_an_image_does_not_depend_on_its_batch():
    images = photographs(24)
    drawn = draw_photometry(rng(24), [0], [EVERYTHING])
    together = apply_photometry(images, drawn)
    for i in range(24):
        alone = draw_photometry(ImageRandom(0, torch.tensor([0]), torch.tensor([i])), [0], [EVERYTHING])
        for mine, theirs in zip(alone[:-1], drawn.part(i, i + 1)[:-1], strict=True):
            assert torch.equal(mine, theirs)
        assert torch.allclose(apply_photometry(images[i : i + 1], alone)[0], together[i], atol=1e-3)


def test_many_images_are_augmented_as_few():
    images = photographs(5, 200, 300).repeat(3, 1, 1, 1)
    assert images.numel() > 2 * CHUNK
    drawn = draw_photometry(rng(15), [0], [EVERYTHING])
    together = apply_photometry(images, drawn)
    for i in range(15):
        alone = apply_photometry(images[i : i + 1], drawn.part(i, i + 1))
        assert torch.allclose(alone[0], together[i], atol=1e-3)


def test_no_value_is_looked_at_so_a_gpu_is_never_waited_for(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # does not know tensors without values
    blind = ImageRandom(0, torch.zeros(4, dtype=torch.int64, device="meta"), torch.arange(4, device="meta"))
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device="meta")
    assert apply_photometry(images, draw_photometry(blind, [0], [EVERYTHING])).shape == (4, 3, 16, 16)


def test_autocast_does_not_lower_the_precision():
    images = photographs(4)
    drawn = draw_photometry(rng(4), [0], [Photometry()])
    with torch.autocast("cpu", torch.bfloat16):
        result = apply_photometry(images, drawn)
    assert torch.equal(result, apply_photometry(images, drawn))


def test_the_parameters_have_the_distributions_asked_for():
    n = 24_000
    drawn = draw_photometry(rng(n), [0], [SECOND_VIEW])
    for parameter, low, high in (
        (drawn.brightness, 0.6, 1.4),
        (drawn.contrast, 0.6, 1.4),
        (drawn.saturation, 0.8, 1.2),
        (drawn.hue, -0.1, 0.1),
        (drawn.sigma, 0.1, 2.0),
    ):
        assert low - 1e-6 <= parameter.min()
        assert parameter.max() <= high + 1e-6
        # The largest distance to the cumulative distribution of a uniform one; 0.1 % of true samples exceed it.
        uniform = (parameter.double().sort().values - low) / (high - low)
        assert (uniform - torch.arange(n) / n).abs().max() <= 1.95 / math.sqrt(n)
    for happens, probability in (
        (drawn.jittered, 0.8),
        (drawn.gray, 0.2),
        (drawn.blurred, 0.1),
        (drawn.solarized, 0.2),
    ):
        assert happens.double().mean().item() == pytest.approx(probability, abs=0.01)  # 4 standard errors
    orders = [tuple(order) for order in drawn.order.tolist()]
    for order in permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)):
        assert 860 <= orders.count(order) <= 1140  # 1000 +- 4.5 standard errors


def test_certain_things_always_happen_and_impossible_ones_never():
    always = draw_photometry(
        rng(1000), [0], [Photometry(1.0, gray_probability=1, blur_probability=1, solarize_probability=1)]
    )
    never = draw_photometry(
        rng(1000), [0], [Photometry(0.0, gray_probability=0, blur_probability=0, solarize_probability=0)]
    )
    for name in ("jittered", "gray", "blurred", "solarized"):
        assert getattr(always, name).all()
        assert not getattr(never, name).any()


def test_a_factor_is_never_negative():
    assert draw_photometry(rng(1000), [0], [Photometry(brightness=1.5)]).brightness.min() >= 0


def test_parameters_views_and_neighboring_images_are_independent():
    n = 20_000
    first, second = (draw_photometry(rng(n), [view], [SECOND_VIEW]) for view in (0, 1))
    columns = [parameter.double().view(n, -1)[:, 0] for drawn in (first, second) for parameter in drawn[:-2]]
    columns += [column.roll(1) for column in columns]
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max() <= 4.5 / math.sqrt(n)


@pytest.mark.thorough
@pytest.mark.parametrize("photometry", [Photometry(), SECOND_VIEW])
def test_augmented_images_have_the_statistics_of_torchvisions_pipeline(photometry):
    n = 4800
    images = photographs(16, 24, 24).repeat(n // 16, 1, 1, 1)
    ours = apply_photometry(images, draw_photometry(rng(n), [0], [photometry]))
    theirs = torch.stack(
        [v2.functional.pil_to_tensor(picture) for picture in pillow_pipeline(images, photometry)]
    ).float()
    for name, value in {
        "mean": lambda images: images.mean((0, 2, 3)),
        "contrast within images": lambda images: images.std((2, 3)).mean(0),
        "spread between images": lambda images: images.mean((2, 3)).std(0),
    }.items():
        # Two standard errors of sampling, and about one level by which the authors' rounding darkens.
        assert (value(ours) - value(theirs)).abs().max() <= 3, name


def pillow_pipeline(images, photometry):
    """Augment each image as the authors do: random transforms of torchvision on a Pillow image."""
    torch.manual_seed(0)
    blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(0.1, 2.0).item())))
    pipeline = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([blur], p=photometry.blur_probability),
            v2.RandomSolarize(128, photometry.solarize_probability),
        ]
    )
    return [pipeline(v2.functional.to_pil_image(image)) for image in images]
