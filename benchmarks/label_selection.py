"""Whether `sslvision select` beats labels drawn at random: accuracy of k-NN and of a linear probe at few labels a class.

python benchmarks/label_selection.py --embeddings outputs/embedded [--per-class 10] [--seeds 5]

The embeddings must have labels, and images of the split `test`, on which the accuracy is measured. As many of the others as
there are classes, times PER_CLASS, are chosen: by cover (k-center greedy), by clusters (the most typical image of each), or at
random. These see no label, so that their classes need not be balanced; `balanced` draws the same number from each class at
random, for which all labels must be known. Each seed leaves out another fifth of the images to choose from, so that every way
to choose has a spread; the last column is the difference to `random` with the same images, and its standard error.
"""

import argparse
import statistics

import torch

from sslvision.embeddings.k_center import k_center
from sslvision.embeddings.k_means import k_means, most_typical
from sslvision.embeddings.vectors import open_embeddings
from sslvision.evaluation.knn import knn_top
from sslvision.evaluation.linear_probe import linear_probe

CPU = torch.device("cpu")
WAYS = ("random", "balanced", "cover", "clusters")
SCORES = ("k-NN, k = 5", "linear probe")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, help="a folder that sslvision embed wrote")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows = open_embeddings(arguments.embeddings)
    if rows.labels is None or "test" not in rows.splits:
        parser.error("these embeddings have no labels, or no images of the split test")
    names = sorted({*rows.labels})
    labels = torch.tensor([names.index(label) for label in rows.labels])
    is_test = torch.tensor([split == "test" for split in rows.splits])
    test, others = is_test.nonzero()[:, 0], (~is_test).nonzero()[:, 0]
    vectors, n = rows.vectors.float(), arguments.per_class * len(names)
    print(f"{n:,} labels of {len(others):,} images, {len(test):,} test images, {arguments.seeds} seeds\n")
    results = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        kept = others[order[: len(others) * 4 // 5]]
        for way in WAYS:
            chosen = kept[choose(way, vectors[kept], labels[kept], n, seed)]
            results[way].append(scores(vectors, labels, chosen, test, classes=len(names)))
    report(results)


def choose(way, vectors, labels, n, seed):
    """Return the indices of n vectors."""
    if way == "cover":
        return torch.tensor(k_center(vectors, n, device=CPU)[0])
    if way == "clusters":
        return torch.tensor(most_typical(k_means(vectors, n, seed=seed, device=CPU)))
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(1000 + seed))
    if way == "random":
        return order[:n]
    classes = labels.unique()
    return torch.cat([order[labels[order] == label][: n // len(classes)] for label in classes])


def scores(vectors, labels, chosen, test, *, classes):
    """Return the accuracies of k-NN and of the linear probe in percent, and the number of classes among the chosen."""
    given = (vectors[chosen], labels[chosen], vectors[test], labels[test])
    knn, _ = knn_top(*given, k=5, num_classes=classes)
    return knn, linear_probe(*given, num_classes=classes).top1, len(labels[chosen].unique())


def report(results):
    print(f"{'':<10}{'classes':>9}" + "".join(f"{name:>16}{'to random':>16}" for name in SCORES))
    for way, of_seeds in results.items():
        columns = f"{statistics.mean(one[-1] for one in of_seeds):>9.1f}"
        for place in range(len(SCORES)):
            own = [one[place] for one in of_seeds]
            gain = [one[place] - other[place] for one, other in zip(of_seeds, results["random"], strict=True)]
            columns += f"{in_words(own, 1):>16}{in_words(gain, len(gain) ** 0.5):>16}"
        print(f"{way:<10}{columns}")


def in_words(values, divisor):
    deviation = statistics.stdev(values) / divisor if len(values) > 1 else 0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
