import json
import math

import pytest
import torch
from torch import Tensor

from sslvision.errors import DataError
from sslvision.evaluation import confidence
from sslvision.evaluation.confidence import as_json, ranking_of, score

RANKING = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0], [2, 0, 1], [0, 1, 2]])
LABELS = torch.tensor([0, 0, 0, 2, 2])  # of 4 classes; 1 and 3 have no test images


def first_right(correct: int, of: int) -> tuple[Tensor, Tensor]:
    """A ranking of one class for each image, of which so many are right."""
    labels = torch.zeros(of, dtype=torch.int64)
    return (torch.arange(of) >= correct).long()[:, None], labels


def test_top_1_counts_the_first_class_and_top_5_any() -> None:
    ranking = torch.tensor([[5, 0, 1, 2, 3], [1, 2, 3, 4, 5], [0, 9, 8, 7, 6], [9, 8, 7, 6, 0]])
    scores = score(ranking, torch.tensor([5, 5, 5, 9]), classes=10)
    assert scores.top1 == 50
    assert scores.top5 == 75


def test_the_confusion_has_true_classes_as_rows_and_every_image_once() -> None:
    scores = score(RANKING, LABELS, classes=4)
    assert scores.confusion.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert scores.confusion.dtype == torch.int64
    assert scores.confusion.sum(1).equal(LABELS.bincount(minlength=4))
    assert scores.confusion.sum(0).equal(RANKING[:, 0].bincount(minlength=4))
    assert 100 * scores.confusion.trace() / 5 == scores.top1


def test_a_class_without_test_images_has_no_accuracy_and_no_part_in_the_mean() -> None:
    scores = score(RANKING, LABELS, classes=4)
    assert scores.per_class.isnan().tolist() == [False, True, False, True]
    assert scores.per_class[[0, 2]].tolist() == pytest.approx([100 / 3, 50])
    assert scores.mean_per_class == pytest.approx((100 / 3 + 50) / 2)


def test_the_mean_per_class_counts_rare_classes_in_fully() -> None:
    labels = torch.tensor([0] * 9 + [1])
    scores = score(torch.zeros(10, 1, dtype=torch.int64), labels, classes=2)
    assert (scores.top1, scores.mean_per_class) == (90, 50)


def interval_of(correct: int, of: int) -> tuple[float, float]:
    return score(*first_right(correct, of), classes=2).interval


@pytest.mark.parametrize(
    ("correct", "of", "published"),
    [  # Newcombe 1998, Stat. Med. 17: 857-872, table I, method 3
        (81, 263, (25.53, 36.62)),
        (15, 148, (6.24, 16.05)),
        (0, 20, (0.00, 16.11)),
        (1, 29, (0.61, 17.18)),
    ],
)
def test_the_interval_is_the_published_one_of_the_score_test(
    correct: int, of: int, published: tuple[float, float]
) -> None:
    assert interval_of(correct, of) == pytest.approx(published, abs=0.005)
    low, high = interval_of(of - correct, of)
    assert (100 - high, 100 - low) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("of", [1, 2, 7, 30, 1000])
def test_all_right_or_none_leaves_an_interval_that_narrows_with_the_images(of: int) -> None:
    z2 = 1.959964**2
    assert interval_of(0, of) == pytest.approx((0, 100 * z2 / (of + z2)))
    assert interval_of(of, of) == pytest.approx((100 * of / (of + z2), 100))
    assert interval_of(0, of)[0] == 0
    assert interval_of(of, of)[1] == 100


@pytest.mark.parametrize("of", [1, 5, 40, 333])
def test_the_interval_contains_the_accuracy_and_stays_within_0_to_100(of: int) -> None:
    for correct in range(of + 1):
        low, high = interval_of(correct, of)
        assert 0 <= low <= 100 * correct / of <= high <= 100
        assert high - low > 0


@pytest.mark.parametrize(("truth", "images"), [(0.8, 400), (0.97, 40), (0.5, 12), (0.1, 25)])
def test_the_interval_covers_the_true_accuracy_in_about_95_of_100_test_sets(truth: float, images: int) -> None:
    chances = [math.comb(images, k) * truth**k * (1 - truth) ** (images - k) for k in range(images + 1)]
    intervals = [interval_of(k, images) for k in range(images + 1)]
    covered = sum(chance for chance, (low, high) in zip(chances, intervals, strict=True) if low <= 100 * truth <= high)
    assert 0.92 < covered < 0.99


def test_four_times_the_images_halve_the_interval() -> None:
    widths = [high - low for low, high in (interval_of(7 * n, 10 * n) for n in (100, 400))]
    assert widths[0] / widths[1] == pytest.approx(2, abs=0.01)


def test_a_ranking_of_logits_is_best_first_and_breaks_ties_by_index() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0, -1.0, 3.0], [1.0] * 7])
    assert ranking_of(logits).tolist() == [[1, 3, 6, 4, 2], [0, 1, 2, 3, 4]]
    assert ranking_of(logits[:, :3]).tolist() == [[1, 2, 0], [0, 1, 2]]


def test_many_logits_are_ranked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = ranking_of(logits)
    monkeypatch.setattr(confidence, "LOGITS_AT_ONCE", 7 * 30)
    assert ranking_of(logits).equal(whole)
    assert whole.equal(logits.topk(5).indices)


def test_logits_of_a_diverged_classifier_are_refused() -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = math.nan
    with pytest.raises(DataError, match="1 of 3 images are NaN"):
        ranking_of(logits)


@pytest.mark.parametrize(
    ("ranking", "labels", "message"),
    [
        (RANKING[:, 0], LABELS, r"\(5,\) and \(5,\)"),
        (RANKING[:4], LABELS, r"\(4, 3\) and \(5,\)"),
        (RANKING[:0], LABELS[:0], "M above 0"),
        (torch.arange(6)[None], LABELS[:1], r"\(1, 6\)"),
        (RANKING, LABELS - 1, "labels reach from -1 to 1"),
        (RANKING, LABELS + 2, "labels reach from 2 to 4"),
        (RANKING + 2, LABELS, "predicted classes reach from 2 to 4"),
    ],
)
def test_rankings_and_labels_that_do_not_fit_are_refused(ranking: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(ranking, labels, classes=4)


def test_the_json_is_rounded_and_holds_no_nan() -> None:
    scores = score(RANKING, LABELS, classes=4)
    found = as_json(scores, ("ant", "bee", "cat", "dog"))
    assert json.loads(json.dumps(found, allow_nan=False)) == {
        "top1": 40.0,
        "top5": 100.0,
        "top1_interval": [round(end, 2) for end in scores.interval],
        "mean_per_class": 41.67,
        "per_class": {"ant": 33.33, "bee": None, "cat": 50.0, "dog": None},
    }


def test_classes_that_share_a_name_keep_their_accuracies_apart() -> None:
    found = as_json(score(RANKING, LABELS, classes=4), ("crane", "bee", "crane", "dog"))
    assert found["per_class"] == {"crane (0)": 33.33, "bee": None, "crane (2)": 50.0, "dog": None}


def test_names_for_another_number_of_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="argument 2"):
        as_json(score(RANKING, LABELS, classes=4), ("ant", "bee"))


def test_an_image_counts_once_where_two_classes_of_one_name_are_both_among_its_five():
    assert score(torch.tensor([[0, 1, 0]]), torch.tensor([0]), classes=2).top5 == 100
