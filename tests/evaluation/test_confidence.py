import json
import math

import numpy as np
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


def test_the_interval_covers_the_true_accuracy_in_about_95_of_100_test_sets() -> None:
    truth, images, sets = 0.8, 400, 600
    covered = 0
    for seed, correct in enumerate(np.random.default_rng(0).binomial(images, truth, size=sets)):
        low, high = score(*first_right(int(correct), images), classes=2, seed=seed).interval
        covered += low <= 100 * truth <= high
    assert 0.92 < covered / sets < 0.975  # four deviations of the 600 test sets about 0.95


def test_the_interval_is_that_of_images_drawn_again() -> None:
    ranking, labels = first_right(140, 200)
    low, high = score(ranking, labels, classes=2).interval
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(200, (4000, 200), generator=generator)
    accuracies = 100 * (ranking[:, 0] == labels).double()[drawn].mean(1)
    assert [low, high] == pytest.approx(accuracies.quantile(torch.tensor([0.025, 0.975]).double()).tolist(), abs=0.8)


def test_four_times_the_images_halve_the_interval() -> None:
    widths = [high - low for low, high in (score(*first_right(7 * n, 10 * n), classes=2).interval for n in (100, 400))]
    assert widths[0] / widths[1] == pytest.approx(2, abs=0.2)


def test_the_interval_depends_on_the_seed_and_on_nothing_else() -> None:
    arguments = first_right(731, 1000)
    first = score(*arguments, classes=2, seed=3).interval
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].tolist()  # noqa: NPY002
    assert score(*arguments, classes=2, seed=3).interval == first
    assert {score(*arguments, classes=2, seed=seed).interval for seed in range(10)} != {first}
    assert torch.get_rng_state().equal(states[0])
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == states[1]  # noqa: NPY002


@pytest.mark.parametrize(("correct", "interval"), [(0, (0, 0)), (30, (100, 100))])
def test_all_right_or_none_leaves_no_interval(correct: int, interval: tuple[float, float]) -> None:
    assert score(*first_right(correct, 30), classes=2).interval == interval


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
