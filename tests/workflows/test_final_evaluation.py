"""The evaluation after training: all processes encode the images, with the weights of the first."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.cli.compose import compose_settings
from sslvision.data.source import Splits
from sslvision.data.sources.digits import open_digits
from sslvision.methods.mae import MAE
from sslvision.workflows.final_evaluation import encode_together
from sslvision.workflows.method import method_from_settings

SMALL = ["data=digits", "backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2", "backbone.patch_size=8"]
TRAINER = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), precision="32-true")


class Counted:
    """Digits that are read one by one; it is known which."""

    name, channels, images = "digits", 1, None

    def __init__(self, digits):
        self.digits, self.classes, self.labels, self.seen = digits, digits.classes, digits.labels, list[int]()

    def __len__(self) -> int:
        return 301

    def read(self, index: int) -> Tensor:
        self.seen.append(index)
        return self.digits.images[index]

    def describe(self, index: int) -> str:
        return str(index)


def encoded(*, first: bool, labeled: bool = True, most: int = 200):
    """Encode as the first process does, with weights of its own, or as another; return the features and who was seen."""
    settings = compose_settings(["recipe=mae", *SMALL, f"evaluate_images={most}"])
    method = method_from_settings(settings)
    assert isinstance(method, MAE)
    digits = open_digits()
    assert digits.test is not None
    splits = Splits(Counted(digits.train), Counted(digits.test))
    if not labeled:
        splits.train.labels = None
    backbones = dict[str, torch.nn.Module]()
    if first:  # other weights than those that the other process builds
        method.normalize.set([0.3], [0.4])
        backbones = {"": method.pretrained(), "untrained_": method_from_settings(settings).pretrained()}
        with torch.no_grad():
            for number, backbone in enumerate(backbones.values()):
                backbone.model.patch_embed.proj.weight.mul_(number + 2)
    data = SimpleNamespace(workers=0, crop_pct=1.0)
    features = encode_together(settings, method, backbones, data, splits, TRAINER)
    return features, [splits.train.seen, splits.test.seen]


def _as_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save([encoded(first=rank == 0), encoded(first=rank == 0, labeled=False)], folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each of two processes has: [labeled, unlabeled] of [features, images seen]."""
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(_as_one_of_two, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("labeled", [True, False])
def test_the_first_of_two_processes_has_the_features_that_one_process_has(of_two, labeled):
    alone, _ = encoded(first=True, labeled=labeled)
    (first, _), (second, _) = (of_process[0 if labeled else 1] for of_process in of_two)
    assert list(first) == ["", "untrained_"]
    assert second == {}
    for name, parts in alone.items():
        assert len(parts) == len(first[name]) == (2 if labeled else 1)
        for (where, features), (found, rows) in zip(parts, first[name], strict=True):
            assert torch.equal(where, found)
            assert len(where) == 200
            torch.testing.assert_close(rows, features, rtol=0, atol=1e-5)
    assert not torch.allclose(first[""][0][1], first["untrained_"][0][1], atol=1e-2)


def test_each_process_reads_its_half_of_the_images_once_for_each_backbone(of_two):
    (_, first), (_, second) = (of_process[0] for of_process in of_two)
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) == 200  # 100 for each of two backbones
        assert not set(one) & set(other)
        assert len(set(one) | set(other)) == 200
