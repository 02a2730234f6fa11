import pytest
import torch

from sslvision.data.sampler import EpochBatches
from sslvision.errors import DataError, UsageError


def indices(batches):
    return [[index for _, index in batch] for batch in batches]


def test_an_epoch_shows_every_image_once_but_for_the_remainder():
    batches = EpochBatches(103, global_batch=10, seed=0)
    seen = [index for batch in indices(batches) for index in batch]
    assert len(batches) == 10
    assert len(seen) == len(set(seen)) == 100


def test_epochs_have_different_orders_and_the_same_epoch_always_the_same():
    def epoch(number):
        return indices(EpochBatches(50, global_batch=10, seed=0, updates_done=lambda: 5 * number))

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    keys = list(EpochBatches(50, global_batch=10, seed=0, updates_done=lambda: 15))
    assert {epoch for batch in keys for epoch, _ in batch} == {3}


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_an_update_sees_the_same_images_on_any_number_of_processes(world, accumulate):
    alone = [set(batch) for batch in indices(EpochBatches(100, global_batch=16, seed=1))]
    shares = [
        indices(EpochBatches(100, global_batch=16, seed=1, rank=rank, world=world, accumulate=accumulate))
        for rank in range(world)
    ]
    for update, expected in enumerate(alone):
        micro = [share[update * accumulate + i] for share in shares for i in range(accumulate)]
        seen = [index for batch in micro for index in batch]
        assert len(seen) == len(set(seen)) == 16
        assert set(seen) == expected


def test_a_resumed_epoch_goes_on_at_the_update_it_stopped_at():
    whole = list(EpochBatches(100, global_batch=16, seed=1, accumulate=2))
    rest = list(EpochBatches(100, global_batch=16, seed=1, accumulate=2, updates_done=lambda: 4))
    assert rest == whole[8:]


def test_fewer_images_than_a_batch_are_refused_with_both_numbers():
    with pytest.raises(DataError, match=r"7 images.*fewer than one batch of 16"):
        EpochBatches(7, global_batch=16, seed=0)


def test_a_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(UsageError, match="multiple of 6"):
        EpochBatches(100, global_batch=16, seed=0, world=3, accumulate=2)


def test_keys_carry_the_epoch_for_the_randomness_of_the_images():
    (first, *_) = EpochBatches(32, global_batch=16, seed=0, updates_done=lambda: 2)
    assert torch.tensor(first).shape == (16, 2)
