"""Patches get classes, scores of patches become pixels, and overlaps are counted."""

import math

import pytest
import torch

from sslvision.evaluation.linear_probe import fit_probe
from sslvision.evaluation.segmentation import Bank, Overlaps, full_size, patch_classes, patch_colors


def test_a_patch_has_the_class_of_most_of_its_pixels_also_of_a_mask_of_another_size():
    mask = torch.zeros(40, 80, dtype=torch.int64)
    mask[:20, :40] = 7
    mask[20:, 70:] = 2  # a quarter of the last patch
    mask[20:, :40] = -1
    assert patch_classes(mask, (2, 2)).tolist() == [[7, 0], [-1, 0]]
    assert patch_classes(mask[::3, ::3], (2, 2)).tolist() == [[7, 0], [-1, 0]]


def test_colors_of_patches_lie_where_the_patches_lie():
    images = torch.zeros(1, 3, 16, 32)
    images[:, 0, 8:, 24:] = 1.0
    features = patch_colors((2, 4))(images)
    assert features.shape == (1, 2, 4, 48)
    assert features.sum(dim=-1).nonzero().tolist() == [[0, 1, 3]]


def test_interpolated_scores_are_those_of_all_classes_at_once():
    scores = torch.rand(3, 4, 21, generator=torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(scores.permute(2, 0, 1)[None], (30, 50), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(full_size(scores, (30, 50)), whole)


def test_both_ways_find_classes_that_lie_apart():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(3).repeat(40)
    centers = torch.eye(3).repeat(1, 2)
    features = centers[classes] + 0.1 * torch.randn(120, 6, generator=generator)
    fitted = fit_probe(features, classes, num_classes=3)
    bank = Bank(features, classes, fitted, 3, k=5)
    for scores in (bank.knn_scores(centers.reshape(1, 3, 6)), bank.linear_scores(centers.reshape(1, 3, 6))):
        assert scores.shape == (1, 3, 3)
        assert torch.allclose(scores.sum(dim=-1), torch.ones(1, 3))
        assert scores.argmax(dim=-1).tolist() == [[0, 1, 2]]


def test_overlaps_are_those_counted_by_hand():
    true = torch.tensor([[0, 0, 1, 1], [0, 0, 1, -1]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 2]])
    joined = Overlaps.joined([Overlaps.of(predicted, true, 3)])
    first, second, none = joined.per_class().tolist()
    assert first == pytest.approx(100 * 3 / 5)
    assert second == pytest.approx(100 * 2 / 4)
    assert math.isnan(none)  # predicted only where the mask has no class
    assert joined.miou == pytest.approx(55.0)
    assert joined.accuracy == pytest.approx(100 * 5 / 7)


def test_the_interval_holds_the_mean_and_shrinks_with_more_images():
    generator = torch.Generator().manual_seed(0)

    def width(images):
        parts = []
        for _ in range(images):
            true = torch.randint(0, 3, (8, 8), generator=generator)
            wrong = torch.rand(8, 8, generator=generator) < 0.3
            parts.append(Overlaps.of(torch.where(wrong, (true + 1) % 3, true), true, 3))
        low, high = Overlaps.joined(parts).interval()
        assert low < Overlaps.joined(parts).miou < high
        return high - low

    assert width(200) < 0.6 * width(20)


def test_an_image_whose_mask_has_no_class_changes_neither_the_mean_nor_its_interval():
    true = torch.tensor([[0, 1], [1, 1]])
    one, ignored = Overlaps.of(true, true, 2), Overlaps.of(true, torch.full_like(true, -1), 2)
    scores = Overlaps.joined([one, ignored])
    assert (scores.miou, scores.interval()) == (100.0, (100.0, 100.0))
