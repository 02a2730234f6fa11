"""What views are made of on a GPU, without one: tensors that have shapes and a device and no numbers.

Asking one for a number, or for a shape that depends on numbers, is an error; what goes from the host to the device is seen.
"""

import functools
from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslvision.augment import blur, color, crops, randomness
from sslvision.augment.blur import blur_matrix, gaussian_blur
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.data.loader import cut_crops
from sslvision.evaluation.knn import knn_rankings
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.normalize import Normalize

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


class Seen(TorchDispatchMode):
    """Note what is copied from the host, and in which precision matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.copied, self.precisions = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        copied = args if name in ("copy_", "copy") else (result, args[0]) if name in ("_to_copy", "to") else ()
        if {one.device.type for one in copied[:2]} == {"cpu", "cuda"}:
            self.copied.append(str(func))
        if name in PRODUCTS:
            self.precisions.add(torch.get_float32_matmul_precision())
        return result


@contextmanager
def without_numbers():
    """Let nothing that is kept outlive the tensors without numbers."""
    kept = [one for module in (blur, crops, color, randomness) for one in vars(module).values()]
    kept = [one for one in kept if isinstance(one, functools._lru_cache_wrapper)]
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    randomness._scalar(0)  # the host's
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)
        for one in kept:
            one.cache_clear()


def seen_of(make):
    """Call twice: what is kept goes to the device in the first."""
    with without_numbers():
        make()
        with Seen() as seen:
            make()
    return seen


def method_of(name, size):
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=size, patch_size=16, embed_dim=32, depth=1, num_heads=2
    )
    if name == "mae":
        return MAE(backbone, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return DINO(backbone, prototypes=8, hidden=8, bottleneck=8, local_crops=2, local_size=size // 2)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", ["mae", "dino"])
def test_views_wait_for_no_device_and_are_cut_and_blurred_in_full_precision(name, size):
    method, B = method_of(name, size), 4

    def views():
        images = torch.zeros(B, 3, size + 16, size, dtype=torch.uint8, device="cuda")
        place = torch.zeros(B, dtype=torch.int64, device="cuda")
        batch = cut_crops(Batch([images], place, place, [], place), method.crops, 0)
        return method.views(batch, ImageRandom(0, place, place))

    with without_numbers():
        method.normalize = Normalize((0.5,) * 3, (0.5,) * 3).to("cuda")
    seen = seen_of(views)
    assert not seen.copied
    assert seen.precisions == {"highest"}


def test_a_number_that_goes_to_the_device_would_be_seen():
    def one():
        return torch.zeros(3, device="cuda") + torch.tensor([1.0]).to("cuda")

    assert seen_of(one).copied


@pytest.mark.parametrize("length", [16, 96])
def test_a_blur_waits_for_no_device(length):
    seen = seen_of(
        lambda: gaussian_blur(torch.rand(2, 3, length, 96, device="cuda"), torch.rand(2, device="cuda"), 2.0)
    )
    assert not seen.copied
    assert not seen_of(lambda: blur_matrix(torch.rand(2, device="cuda"), length)).copied


def test_neighbors_are_compared_in_full_precision():
    def rank():
        train, test, labels = (torch.zeros(*shape, device="cuda") for shape in ((20, 8), (5, 8), (20,)))
        knn_rankings(train, labels.long(), test, ks=[3], num_classes=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sslvision.evaluation.knn.check_features", lambda *_, num_classes: num_classes)
        assert seen_of(rank).precisions == {"highest"}
