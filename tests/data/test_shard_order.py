"""The order of images in shards: a permutation that reads each shard once, and can be begun anywhere."""

from itertools import chain

import numpy as np
import pytest
import torch

from sslvision.data.sampler import EpochBatches
from sslvision.data.shard_order import Groups, ShardOrder, shards_ahead
from sslvision.data.sources.digits import open_digits
from sslvision.data.subsets import Subset

SIZES = [5, 3, 0, 7, 4, 6, 1, 8]
GROUPS = Groups(np.cumsum([0, *SIZES]).astype(np.int64), window=3)
N = sum(SIZES)


def order(seed=0, epoch=0, groups=GROUPS):
    return ShardOrder(groups, seed=seed, epoch=epoch)


def shard_of(images):
    return np.searchsorted(GROUPS.bounds, images, side="right") - 1


def test_an_epoch_has_every_image_once_and_a_window_the_images_of_its_shards():
    for epoch in range(4):
        one = order(epoch=epoch)
        images = one[:]
        assert sorted(images.tolist()) == list(range(N))
        begin = 0
        for window, end in enumerate(one.ends.tolist()):
            assert {*shard_of(images[begin:end])} == {*one.shards_of(window)}
            assert {one.window_of(image) for image in images[begin:end]} == {window}
            begin = end


def test_orders_differ_between_epochs_and_seeds_and_mix_the_images_of_a_window():
    assert order()[:].tolist() == order()[:].tolist()
    assert len({tuple(order(seed, epoch)[:]) for seed in range(3) for epoch in range(3)}) == 9
    first = order()[: order().ends[0]]
    assert len({*shard_of(first[: len(first) // 2])}) > 1
    assert (np.diff(first) < 0).any()


def test_any_slice_is_that_of_the_whole():
    whole = order()[:]
    for start in range(0, N + 2, 3):
        for stop in range(start, N + 3, 4):
            for step in (1, 2, 5):
                assert order()[start:stop:step].tolist() == whole[start:stop:step].tolist()


def test_processes_share_the_batches_of_one_and_a_resumed_epoch_is_the_rest_of_it():
    def batches(**options):
        return [
            [index for _, index in batch] for batch in EpochBatches(N, global_batch=4, seed=1, groups=GROUPS, **options)
        ]

    whole = batches()
    assert [*chain(*whole)] == order(seed=1)[: len(whole) * 4].tolist()
    assert batches(updates_done=lambda: 3) == whole[3:]
    for update, batch in enumerate(zip(batches(rank=0, world=2), batches(rank=1, world=2), strict=True)):
        assert sorted(chain(*batch)) == sorted(whole[update])
    sampler = EpochBatches(N, global_batch=4, seed=1, groups=GROUPS)
    assert [index for _, index in sampler.of_update(2)] == whole[2]


def test_the_shards_of_a_window_and_of_the_next_one_are_asked_for_also_across_epochs():
    one, following = order(seed=1), order(seed=1, epoch=1)
    first, last = int(one[0:1][0]), int(one[N - 1 : N][0])
    assert shards_ahead(GROUPS, first, seed=1, epoch=0) == [*one.shards_of(0), *one.shards_of(1)]
    expected = dict.fromkeys([*one.shards_of(len(one.ends) - 1), *following.shards_of(0)])
    assert shards_ahead(GROUPS, last, seed=1, epoch=0) == list(expected)


def test_a_subset_keeps_the_shards_that_its_images_lie_in():
    digits = open_digits().train
    digits.groups = Groups(np.array([0, 500, 600, len(digits)], np.int64), 1)
    indices = torch.tensor([1, 7, 499, 650, 700])
    assert Subset(digits, indices).groups.bounds.tolist() == [0, 3, 3, 5]
    assert Subset(digits, indices.flip(0)).groups is None


@pytest.mark.parametrize("window", [1, 7, 100])
def test_windows_of_one_shard_and_of_all(window):
    one = order(groups=GROUPS._replace(window=window))
    assert sorted(one[:].tolist()) == list(range(N))
    assert len(one.ends) == {1: 7, 7: 1, 100: 1}[window]
