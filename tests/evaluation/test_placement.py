import dataclasses

import pytest
import torch

from sslvision.data.source import Splits
from sslvision.data.sources.embedded import open_embedded
from sslvision.evaluation import evaluate
from sslvision.evaluation.evaluate import evaluate_backbone, evaluate_pixels
from sslvision.evaluation.linear_probe import bytes_of_fit
from sslvision.evaluation.placement import place_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def a_gigabyte_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 80 << 30))


@pytest.mark.usefixtures("a_gigabyte_is_free")
@pytest.mark.parametrize(
    ("device", "needed", "place"),
    [(CUDA, 1 << 30, CUDA), (CUDA, (1 << 30) + 1, CPU), (CPU, 1, CPU), (torch.device("mps"), 1, CPU)],
)
def test_features_go_to_the_gpu_that_has_room(device, needed, place):
    assert place_for(device, needed) == place


def test_a_fit_takes_no_more_than_is_asked_for():
    features = torch.zeros(50_000, 768)
    assert 5 * features.nbytes < bytes_of_fit(features, 1000) < 3 << 30


@pytest.fixture(scope="module")
def few():
    whole = open_embedded()
    parts = [
        dataclasses.replace(part, images=part.images[:300], labels=part.labels[:300])
        for part in (whole.train, whole.test)
    ]
    return Splits(*parts)


class Stub(torch.nn.Module):
    """A backbone without layers."""

    image_size, embed_dim, crop_pct = (32, 32), 16, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return images.flatten(1)[:, 300:700:25] * self.weight


def test_the_scores_are_computed_where_the_backbone_is(few, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "place_for", lambda device, needed: (asked.append((device, needed)), CPU)[1])
    evaluate_pixels(few, at_most=100, device=CUDA)
    evaluate_pixels(few, at_most=100)
    evaluate_backbone(Stub(), torch.nn.Identity(), few, at_most=100)
    assert [device for device, _ in asked] == [CUDA, CPU, CPU]
    assert asked[0][1] == bytes_of_fit(torch.zeros(100, 1024), 10)


@pytest.mark.gpu
def test_scores_of_a_gpu_are_those_of_a_cpu(few):
    here, there = (evaluate_pixels(few, at_most=300, device=device) for device in (CPU, CUDA))
    assert here == pytest.approx(there, abs=0.7)  # two of 300 images
