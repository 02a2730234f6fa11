"""Mixup, CutMix, Cutout and random erasing: their distributions, their sums, and whom an image depends on."""

import pytest
import torch
from torch.distributions import Beta

from sslvision.augment.mixing import TRIES, beta, cut_out, erase, mix_images
from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError

N = 20_000


def rng_of(indices):
    indices = torch.as_tensor(indices)
    return ImageRandom(0, torch.zeros_like(indices), indices)


def batch_of(count, *, classes=10, side=16):
    """Images (count, 3, side, side), each of one value, and one-hot targets: of image i, i + 1 and class i."""
    values = torch.arange(1, count + 1, dtype=torch.float32)
    images = values[:, None, None, None].expand(-1, 3, side, side).clone()
    return images, torch.eye(classes)[torch.arange(count) % classes]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0])
def test_shares_have_the_distribution_of_beta(alpha):
    draws = beta(rng_of(range(N)).uniform("mix share", 2 * TRIES), torch.full((N,), alpha)).double()
    wanted = Beta(torch.tensor(alpha, dtype=torch.float64), torch.tensor(alpha, dtype=torch.float64))
    assert ((draws >= 0) & (draws <= 1)).all()
    for power, expected in ((1, 0.5), (2, wanted.variance.item() + 0.25)):
        moment = draws**power
        assert abs(moment.mean().item() - expected) < 5 * moment.std().item() / N**0.5
    fourth = ((2 * draws - 1) ** 4).mean().item()  # E = 3 / ((2 alpha + 1) (2 alpha + 3))
    assert abs(fourth - 3 / ((2 * alpha + 1) * (2 * alpha + 3))) < 0.012


def test_a_share_is_a_number_even_where_nothing_or_everything_is_drawn():
    for number in (0.0, 1 - 2**-24):
        share = beta(torch.full((1, 2 * TRIES), number), torch.tensor([0.001]))
        assert torch.equal(share, torch.tensor([0.5]))


def test_mixup_gives_every_pixel_and_the_target_the_same_share_of_the_next_image():
    images, targets = batch_of(8)
    mixed, shares = mix_images(images, targets, rng_of(range(8)), mixup=0.8, cutmix=0.0)
    kept = shares[torch.arange(8), torch.arange(8)]
    assert (shares.sum(dim=1) - 1).abs().max() <= 1e-6
    assert (shares > 0).sum(dim=1).tolist() == [2] * 8
    expected = kept * images[:, 0, 0, 0] + (1 - kept) * images.roll(-1, 0)[:, 0, 0, 0]
    assert (mixed - expected[:, None, None, None]).abs().max() <= 1e-5
    assert kept.std() > 0.1  # a share of each image's own


def test_cutmix_pastes_one_box_and_the_target_goes_by_its_area_exactly():
    count, side = 500, 24
    images, targets = batch_of(count, classes=count, side=side)
    mixed, shares = mix_images(images, targets, rng_of(range(count)), mixup=0.0, cutmix=1.0)
    foreign = mixed[:, 0] != images[:, 0]  # (B, H, W)
    assert torch.equal(mixed[:, 0][foreign], images.roll(-1, 0)[:, 0][foreign])
    kept = shares[torch.arange(count), torch.arange(count)]
    assert torch.equal(kept, 1 - foreign.sum(dim=(1, 2)) / side**2)
    rows, columns = foreign.any(dim=2), foreign.any(dim=1)
    assert torch.equal(foreign, rows[:, :, None] & columns[:, None])
    for sides in (rows, columns):  # without gaps
        assert (sides.int().diff(dim=1).abs().sum(dim=1) + sides[:, 0] + sides[:, -1] <= 2).all()


def test_cutmix_boxes_have_the_asked_area_where_no_border_cuts_them():
    indices = range(4000)
    images, targets = batch_of(4000, classes=2, side=64)
    mixed, _ = mix_images(images, targets, rng_of(indices), mixup=0.0, cutmix=1.0)
    foreign = mixed[:, 0] != images[:, 0]
    rows, columns = foreign.any(dim=2), foreign.any(dim=1)
    whole = ~(rows[:, 0] | rows[:, -1] | columns[:, 0] | columns[:, -1])
    share = beta(rng_of(indices).uniform("mix share", 2 * TRIES), torch.ones(4000))
    side = (64 * (1 - share).sqrt()).long()
    assert torch.equal(rows.sum(1)[whole], side[whole])
    assert torch.equal(columns.sum(1)[whole], side[whole])
    assert whole.sum() > 300


def test_with_both_each_image_chooses_one_with_probability_one_half():
    count = 2000
    images, targets = batch_of(count, classes=2)
    mixed, _ = mix_images(images, targets, rng_of(range(count)), mixup=1.0, cutmix=1.0)
    pasted = ((mixed == images) | (mixed == images.roll(-1, 0))).flatten(1).all(dim=1)
    assert abs(pasted.float().mean().item() - 0.5) < 0.06


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_an_image_depends_on_its_partner_and_on_nothing_else_of_the_batch(alphas):
    mixup, cutmix = alphas
    images, targets = torch.randn(6, 3, 16, 16), torch.eye(6)
    whole, shares = mix_images(images, targets, rng_of([4, 8, 15, 16, 23, 42]), mixup=mixup, cutmix=cutmix)
    pair, pair_shares = mix_images(images[2:4], targets[2:4], rng_of([15, 16]), mixup=mixup, cutmix=cutmix)
    assert torch.equal(whole[2], pair[0])
    assert torch.equal(shares[2], pair_shares[0])
    assert not torch.equal(whole[2], images[2])


def test_alphas_of_0_and_a_probability_of_0_leave_everything_as_it_is():
    images, targets = batch_of(4)
    mixed, shares = mix_images(images, targets, rng_of(range(4)), mixup=0.0, cutmix=0.0)
    assert mixed is images
    assert shares is targets
    assert erase(images, rng_of(range(4)), 0.0) is images


def test_some_images_have_one_box_of_normal_noise():
    count, side = 600, 32
    images = torch.full((count, 3, side, side), 7.0)
    erased = erase(images, rng_of(range(count)), 0.25)
    box = erased[:, 0] != 7  # (B, H, W)
    touched = box.flatten(1).any(dim=1)
    assert abs(touched.float().mean().item() - 0.25) < 0.08
    rows, columns = box.any(dim=2), box.any(dim=1)
    assert torch.equal(box, rows[:, :, None] & columns[:, None])
    area, aspect = box[touched].float().mean(dim=(1, 2)), rows[touched].sum(1) / columns[touched].sum(1)
    assert 0.015 < area.min() < 0.05
    assert 0.3 < area.max() < 0.36
    assert 0.27 < aspect.min() < 0.4
    assert 2.5 < aspect.max() < 3.7
    noise = erased.permute(0, 2, 3, 1)[box]  # (n, 3)
    assert abs(noise.mean().item()) < 0.03
    assert abs(noise.std().item() - 1) < 0.03
    assert abs((noise**4).mean().item() - 3) < 0.2
    assert noise[:, :2].T.corrcoef()[0, 1].abs() < 0.05


def test_noise_is_finite_at_both_ends_of_what_can_be_drawn(monkeypatch):
    images = torch.zeros(2, 1, 16, 16)
    for number in (0.0, 1 - 2**-24):
        monkeypatch.setattr(
            ImageRandom, "uniform", lambda self, purpose, n, u=number: torch.full((2, n), u * (purpose != "erase"))
        )
        erased = erase(images, rng_of(range(2)), 1.0)
        assert 4.5 < erased.abs().max() < 6


def test_what_is_erased_of_an_image_depends_on_the_image_alone():
    images = torch.zeros(4, 3, 16, 16)
    together, alone = erase(images, rng_of([1, 2, 3, 4]), 1.0), erase(images[:1], rng_of([3]), 1.0)
    assert torch.equal(together[2:3], alone)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("settings", [{"mixup": 1.5, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": -0.1}])
def test_alphas_out_of_range_are_refused(settings):
    with pytest.raises(UsageError, match="must be from 0"):
        mix_images(*batch_of(2), rng_of(range(2)), **settings)


def test_a_probability_out_of_range_is_refused():
    with pytest.raises(UsageError, match="erase=25 must be"):
        erase(torch.zeros(1, 1, 8, 8), rng_of([0]), 25)


@pytest.mark.parametrize("side", [0.25, 0.5, 1.0])
def test_cutout_zeroes_one_square_whose_center_is_anywhere_and_leaves_the_rest(side):
    pixels, count = 16, 2000
    images = torch.rand(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0)) + 1
    cut = cut_out(images, rng_of(range(count)), side)
    holes = (cut == 0).all(dim=1)  # (B, H, W)
    assert torch.equal(cut[~holes[:, None].expand_as(cut)], images[~holes[:, None].expand_as(cut)])
    rows, columns = holes.any(dim=2).sum(dim=1), holes.any(dim=1).sum(dim=1)  # (B,), (B,)
    assert torch.equal(holes.sum(dim=(1, 2)), rows * columns)  # a box
    assert rows.max() == columns.max() == side * pixels
    assert rows.min() == side * pixels / 2  # the center lies in the image
    shares = holes.float().mean(dim=0)  # (H, W)
    assert shares.min() > 0.15 * side**2  # anywhere: a corner is cut by a quarter of the centers that cut the middle
    if side < 1:
        middle = shares[pixels // 2, pixels // 2].item()
        assert abs(middle - side**2) < 5 * (side**2 * (1 - side**2) / count) ** 0.5


def test_cutout_of_0_is_none_and_depends_on_nothing_but_the_image():
    images, _ = batch_of(4)
    assert cut_out(images, rng_of(range(4)), 0.0) is images
    assert torch.equal(cut_out(images, rng_of(range(4)), 0.5)[2:], cut_out(images[2:], rng_of([2, 3]), 0.5))
