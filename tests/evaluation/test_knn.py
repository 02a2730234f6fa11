import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvision.errors import DataError, UsageError
from sslvision.evaluation import knn
from sslvision.evaluation.knn import knn_rankings, knn_top

GOLDEN = Path(__file__).parents[1] / "golden" / "knn.safetensors"
Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def split(golden: dict[str, Tensor]) -> Split:
    return golden["train_features"], golden["train_labels"], golden["test_features"], golden["test_labels"]


@pytest.mark.parametrize("k", [10, 20])
def test_the_vote_matches_the_authors_numbers_exactly(golden: dict[str, Tensor], split: Split, k: int) -> None:
    assert knn_top(*split, k=k) == tuple(golden[f"expected.k{k}"].tolist())


@pytest.mark.parametrize("k", [10, 20])
def test_rankings_for_several_k_hold_the_authors_numbers_for_each(
    golden: dict[str, Tensor], split: Split, k: int
) -> None:
    *features, labels = split
    ranking = knn_rankings(*features, ks=(20, 1, 10), num_classes=7)[k]
    hits = ranking == labels[:, None]
    assert [100 * int(hits[:, 0].sum()) / 200, 100 * int(hits.sum()) / 200] == golden[f"expected.k{k}"].tolist()


def test_rankings_for_several_k_are_those_of_separate_runs(split: Split) -> None:
    *features, _ = split
    together = knn_rankings(*features, ks=(10, 1, 200, 600), num_classes=7)
    assert list(together) == [10, 1, 200, 600]
    for k, ranking in together.items():
        assert ranking.equal(knn_rankings(*features, ks=[k], num_classes=7)[k])
    assert not together[1].equal(together[200])


def test_similarities_are_computed_once_for_several_k(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    *features, _ = split
    asked, topk = [], Tensor.topk

    def watched_topk(similarity: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        asked.append(k)
        return topk(similarity, k, dim)

    monkeypatch.setattr(Tensor, "topk", watched_topk)
    knn_rankings(*features, ks=(10, 20, 5), num_classes=7, chunk=100)
    assert asked == [20, 20]


def test_a_ranking_holds_no_class_twice_and_lists_classes_without_votes_by_index(split: Split) -> None:
    *features, _ = split
    rankings = knn_rankings(*features, ks=(1, 20), num_classes=9)
    for ranking in rankings.values():
        assert ranking.shape == (200, 5)
        assert all(len(set(row)) == 5 for row in ranking.tolist())
    for first, *rest in rankings[1].tolist():
        assert rest == [c for c in range(6) if c != first][:4]


def test_three_classes_are_ranked_as_three(split: Split) -> None:
    features, labels, test_features, _ = split
    few = labels < 3
    ranking = knn_rankings(features[few], labels[few], test_features, ks=[5], num_classes=3)[5]
    assert ranking.sort(dim=1).values.equal(torch.arange(3).expand(200, 3))


@pytest.mark.parametrize("chunk", [1, 7, 199, 200, 1000])
def test_the_chunk_size_does_not_change_the_result(split: Split, chunk: int) -> None:
    assert knn_top(*split, chunk=chunk) == knn_top(*split)


def test_the_memory_bound_decides_the_chunk(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, products = knn_top(*split), []
    topk = Tensor.topk

    def watched_topk(similarity: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
        products.append(similarity.numel())
        return topk(similarity, k, dim)

    monkeypatch.setattr(Tensor, "topk", watched_topk)
    monkeypatch.setattr(knn, "SIMILARITIES_AT_ONCE", 6_500)  # ten test images against 600
    assert knn_top(*split) == expected
    assert max(products) == 6_000


def test_the_order_of_the_training_images_does_not_matter(split: Split) -> None:
    features, labels, *test = split
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert knn_top(features[order], labels[order], *test) == knn_top(*split)


def test_renaming_the_classes_does_not_matter(split: Split) -> None:
    features, labels, test_features, test_labels = split
    rename = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    # With everyone voting no class is without a vote, and so no tie is broken by the class's index.
    assert knn_top(features, rename[labels], test_features, rename[test_labels], k=600) == knn_top(*split, k=600)


def test_the_scale_of_a_feature_vector_does_not_matter(split: Split) -> None:
    features, labels, test_features, test_labels = split
    scale = torch.rand(len(features), 1, generator=torch.Generator().manual_seed(0)) * 100 + 0.01
    assert knn_top(features * scale, labels, test_features * 7, test_labels) == knn_top(*split)


def test_a_single_neighbor_decides_alone() -> None:
    angles = torch.tensor([0.0, 0.5, 1.0, 1.5])
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    test = torch.tensor([[math.cos(0.1), math.sin(0.1)], [math.cos(1.4), math.sin(1.4)]])
    assert knn_top(train, torch.tensor([0, 1, 1, 2]), test, torch.tensor([0, 2]), k=1)[0] == 100
    assert knn_top(train, torch.tensor([0, 1, 1, 2]), test, torch.tensor([1, 2]), k=1)[0] == 50


@pytest.mark.parametrize(("temperature", "winner"), [(0.07, 0), (1.0, 1)])
def test_the_temperature_weighs_one_near_against_two_far_neighbors(temperature: float, winner: int) -> None:
    # Similarities 1.0 (class 0), 0.8 and 0.8 (class 1): exp(0.2 / T) against 2 changes sides at T = 0.2 / ln 2 = 0.289.
    train = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.8, 0.0, 0.6]])
    vote = knn_top(train, torch.tensor([0, 1, 1]), train[:1], torch.tensor([winner]), k=3, temperature=temperature)
    assert vote[0] == 100


def test_a_tiny_temperature_is_the_nearest_neighbor_and_does_not_overflow(split: Split) -> None:
    assert knn_top(*split, temperature=1e-4)[0] == knn_top(*split, k=1)[0]


def test_more_neighbors_than_training_images_means_all_of_them(split: Split) -> None:
    features, labels, *test = split
    assert knn_top(features[:15], labels[:15], *test, k=20) == knn_top(features[:15], labels[:15], *test, k=15)


def test_top_5_of_three_classes_is_always_right() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator)
    labels = torch.arange(30) % 3
    top1, top5 = knn_top(train, labels, test, labels.flip(0))
    assert top1 < 100
    assert top5 == 100


def test_a_test_class_that_training_lacks_counts_as_wrong() -> None:
    train = torch.eye(4)
    assert knn_top(train, torch.tensor([0, 1, 2, 3]), train, torch.tensor([0, 1, 2, 9]), k=1)[0] == 75


def test_half_precision_and_autocast_give_the_full_precision_vote(split: Split) -> None:
    features, labels, test_features, test_labels = split
    rounded = features.half().float(), labels, test_features.half().float(), test_labels
    with torch.autocast("cpu", torch.bfloat16):
        assert knn_top(features.half(), labels, test_features.half(), test_labels) == knn_top(*rounded)


@pytest.mark.parametrize("setting", [{"k": 0}, {"temperature": 0.0}, {"chunk": 0}])
def test_a_setting_that_cannot_be_is_refused(split: Split, setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="above 0"):
        knn_top(*split, **setting)  # type: ignore[arg-type]


def test_features_of_a_diverged_backbone_are_refused(split: Split) -> None:
    features, labels, *test = split
    poisoned = features.clone()
    poisoned[3, 2] = math.nan
    with pytest.raises(DataError, match="training features contain NaN"):
        knn_top(poisoned, labels, *test)


def test_labels_and_features_that_do_not_fit_are_refused(split: Split) -> None:
    features, labels, test_features, test_labels = split
    with pytest.raises(DataError, match=r"\(599, 16\) and \(600,\)"):
        knn_top(features[1:], labels, test_features, test_labels)
    with pytest.raises(DataError, match="same backbone"):
        knn_top(features, labels, test_features[:, :8], test_labels)
    with pytest.raises(DataError, match="unlabeled"):
        knn_top(features, labels - 1, test_features, test_labels)
    with pytest.raises(DataError, match=r"0\.\.4"):
        knn_top(features, labels, test_features, test_labels, num_classes=5)


@pytest.mark.parametrize("ks", [[], [10, 0]])
def test_rankings_need_a_k_and_every_k_above_0(split: Split, ks: list[int]) -> None:
    *features, _ = split
    with pytest.raises(UsageError, match="above 0"):
        knn_rankings(*features, ks=ks, num_classes=7)


def test_rankings_refuse_what_does_not_fit_without_test_labels(split: Split) -> None:
    features, labels, test_features, _ = split
    with pytest.raises(DataError, match="test features contain NaN"):
        knn_rankings(features, labels, test_features / 0, ks=[5], num_classes=7)
    with pytest.raises(DataError, match=r"0\.\.2"):
        knn_rankings(features, labels, test_features, ks=[5], num_classes=3)
