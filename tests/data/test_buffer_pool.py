"""Shared memory for batches: used again when nobody has the batch any more, and never before."""

import multiprocessing
from io import BytesIO
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from test_loader import CROPS, Images

from sslvision.data.buffer_pool import MAX_BUFFERS, BufferPool, _received
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches

SHAPES = [(4, 3, 24, 24), (4, 3, 12, 12)]


@pytest.fixture
def pool(monkeypatch):
    """Those of a loader's process, in this one."""
    monkeypatch.setattr("sslvision.data.buffer_pool.get_worker_info", lambda: "of a worker")
    return BufferPool()


def handed_over(crops):
    """What the other process gets."""
    function, (memory, shapes) = crops.__reduce__()
    assert function is _received
    return function(memory.detach(), shapes)


def place_of(crops):
    return crops[0].data_ptr()


def test_memory_is_used_again_once_the_last_crop_of_a_batch_is_gone(pool):
    crops = pool.take(SHAPES)
    first = place_of(crops)
    received = handed_over(crops)
    part = received[1][0, 0]  # a view of the last crops
    del crops, received
    assert place_of(pool.take(SHAPES)) != first
    del part
    assert place_of(pool.take(SHAPES)) == first


def test_memory_is_not_used_again_before_it_was_handed_over(pool):
    assert len({place_of(pool.take(SHAPES)) for _ in range(3 * MAX_BUFFERS)}) >= MAX_BUFFERS


def test_a_smaller_batch_fits_into_the_memory_of_a_larger_one_and_not_the_other_way(pool):
    small, large = [(2, *shape[1:]) for shape in SHAPES], SHAPES
    first = place_of(handed_over(pool.take(large)))
    assert place_of(handed_over(pool.take(small))) == first
    assert [crops.shape for crops in pool.take(small)] == [torch.Size(shape) for shape in small]
    larger = [(9, *shape[1:]) for shape in SHAPES]
    assert [crops.shape for crops in pool.take(larger)] == [torch.Size(shape) for shape in larger]


def test_crops_of_a_batch_do_not_overlap(pool):
    crops = pool.take(SHAPES)
    for number, crop in enumerate(crops):
        crop.fill_(number + 1)
    assert [set(crop.unique().tolist()) for crop in crops] == [{1}, {2}]
    assert [set(crop.unique().tolist()) for crop in handed_over(crops)] == [{1}, {2}]


def test_a_batch_travels_as_one_piece_of_memory(pool):
    written = BytesIO()
    ForkingPickler(written).dump(pool.take(SHAPES))
    assert written.getvalue().count(b"rebuild_storage") == 1


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(how, marks=pytest.mark.e2e if how == "spawn" else ())
        for how in multiprocessing.get_all_start_methods()
    ],
)
def test_batches_that_are_kept_are_never_written_over_however_the_worker_was_started(start):
    """More than the worker makes ahead, and than it keeps memory for."""

    def loader(workers):
        sampler = EpochBatches(96, global_batch=4, seed=3)
        made = training_loader(Images(96, in_memory=False), CROPS, sampler, workers=workers, pin_memory=False)
        if workers:
            made.multiprocessing_context = start
        return made

    here, there = list(loader(0)), list(loader(1))
    assert len(there) == 24 > 2 * MAX_BUFFERS
    for batch, other in zip(here, there, strict=True):
        for crops, others in zip(batch.crops, other.crops, strict=True):
            torch.testing.assert_close(crops, others, rtol=0, atol=0)
