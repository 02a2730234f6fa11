"""The order of an epoch: a permutation that looks random, computed at any position without the others."""

import numpy as np
import pytest

from sslvision.augment.randomness import permutation
from sslvision.data import order
from sslvision.data.order import SORTED, Order
from sslvision.data.sampler import EpochBatches

SIZES = (1, 2, 3, 5, 7, 8, 9, 100, 127, 128, 129, 1000, 4095, 4096, 4097)
MANY = SORTED + 1  # the fewest that are not sorted


@pytest.fixture
def never_sorted(monkeypatch):
    monkeypatch.setattr(order, "SORTED", 0)


def whole(n, seed=0, epoch=0):
    return Order(n, seed=seed, epoch=epoch)[:]


@pytest.mark.parametrize("n", SIZES)
def test_any_number_of_images_is_permuted_by_the_network(n, never_sorted):
    for epoch in range(3):
        assert np.array_equal(np.sort(whole(n, epoch=epoch)), np.arange(n))


@pytest.mark.parametrize("n", [MANY, (1 << 17) - 1, 1 << 17, (1 << 17) + 1, 300_001])
def test_many_images_are_permuted_whole(n):
    seen = np.zeros(n, bool)
    seen[whole(n)] = True
    assert seen.all()


def test_few_images_are_sorted_by_random_keys_as_before():
    assert whole(1000, seed=3, epoch=2).tolist() == permutation(1000, seed=3, epoch=2).tolist()
    assert Order(SORTED, seed=0, epoch=0).sorted is not None
    assert Order(MANY, seed=0, epoch=0).sorted is None


def test_a_slice_is_that_of_the_whole_order():
    for n in (1000, 100_003):
        every = whole(n)
        shown = Order(n, seed=0, epoch=0)
        for positions in (slice(0, 10), slice(5, 900, 7), slice(n - 3, n + 5), slice(-4, None), slice(9, 9)):
            assert shown[positions].tolist() == every[positions].tolist()
        assert len(shown) == n


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = [whole(MANY, seed, epoch) for seed in (0, 1, 2**40, -1) for epoch in (0, 1, 2)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).mean() < 1e-3  # 1 in 65,537 is expected


def test_the_order_of_many_images_never_changes_between_versions():
    assert whole(100_000)[:4].tolist() == [84574, 20543, 60507, 3031]
    assert Order(10**9, seed=7, epoch=3)[10**9 - 4 :].tolist() == [80673384, 203971726, 767817038, 824342958]


@pytest.mark.parametrize("n", [MANY, 1 << 17, 200_000])
def test_positions_and_images_are_independent(n):
    cells = 32
    position = np.arange(n)
    image = whole(n, seed=1)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (position * cells // n, image * cells // n), 1)
    expected = n / cells**2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    free = (cells - 1) ** 2  # degrees of freedom
    assert abs(chi_square - free) < 5 * (2 * free) ** 0.5


@pytest.mark.parametrize("n", [MANY, 200_000])
def test_low_bits_of_neighboring_images_are_independent(n):
    image = whole(n, seed=4) % 16
    counts = np.zeros((16, 16))
    np.add.at(counts, (image[:-1], image[1:]), 1)
    expected = (n - 1) / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 225) < 5 * (2 * 225) ** 0.5


@pytest.mark.parametrize("n", [MANY, 200_000])
def test_neighbors_in_the_order_are_a_third_of_the_images_apart(n):
    for apart in (1, 2, 256):
        image = whole(n, seed=2)
        distance = np.abs(image[apart:] - image[:-apart])
        assert abs(distance.mean() / n - 1 / 3) < 5 * (1 / 18 / n) ** 0.5 * 1.5  # neighboring distances share an image
        correlation = np.corrcoef(image[apart:], image[:-apart])[0, 1]
        assert abs(correlation) < 5 / n**0.5


def test_one_image_stays_in_place_on_average(never_sorted):
    stayed = [int((whole(257, seed) == np.arange(257)).sum()) for seed in range(500)]
    assert abs(np.mean(stayed) - 1) < 5 / 500**0.5  # mean and variance 1, as of a Poisson number
    assert abs(np.var(stayed) - 1) < 0.5


def test_every_image_is_first_equally_often(never_sorted):
    first = np.bincount([int(Order(10, seed=seed, epoch=5)[:1][0]) for seed in range(1000)], minlength=10)
    assert ((first - 100) ** 2 / 100).sum() < 9 + 5 * 18**0.5


def test_orders_of_two_epochs_are_independent():
    one, other = whole(MANY, epoch=0), whole(MANY, epoch=1)
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / MANY**0.5


def test_a_billion_images_are_begun_at_any_update_with_the_same_images_on_two_processes():
    update = 123_456_789

    def first(rank, world):
        batches = EpochBatches(10**9, global_batch=8, seed=0, rank=rank, world=world, updates_done=lambda: update)
        return next(iter(batches))

    alone = first(0, 1)
    assert sorted(first(0, 2) + first(1, 2)) == sorted(alone)
    assert alone == EpochBatches(10**9, global_batch=8, seed=0).of_update(update)
    assert {epoch for epoch, _ in alone} == {0}
    assert len({image for _, image in alone}) == 8
