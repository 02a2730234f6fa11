"""Draw docs/learning-curves.png: the shapes of learning curves, each as `read_curves` names it.

    python scripts/make_learning_curves_picture.py

The curves are made up, so that each shows one thing. The script fails if the rules read one of them otherwise.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sslvision.evaluation.learning_curves import read_curves
from sslvision.figures.curves import BLUE, GREEN, INK, MUTED, ORANGE, style

FILE = Path(__file__).parents[1] / "docs" / "learning-curves.png"
AT = np.arange(1, 121) / 120  # share of the run
COSINE = 0.5 * (1 + np.cos(np.pi * AT))
HEALTHY = 0.3 + 0.9 * (1 + 40 * AT) ** -0.8

# Loss and learning rate of pretraining, by the rule that reads them; None for a healthy run.
LOSSES = {
    None: (HEALTHY, COSINE),
    "diverging": (np.where(AT < 0.35, HEALTHY, HEALTHY + 1.6 * (AT - 0.35)), COSINE),
    "flat": (1.2 - 0.01 * AT, COSINE),
    "slow_start": (np.where(AT < 0.4, 1.2, 0.35 + 0.85 * np.exp(-8 * (AT - 0.4))), COSINE),
    "decayed_early": (np.where(AT < 0.25, 1.2 - 2.2 * AT, 0.65 - 0.05 * (AT - 0.25)), np.where(AT < 0.25, 1.0, 0.03)),
    "unfinished": (1.2 - 0.8 * AT, np.ones_like(AT)),
    "noisy": (1.2 - 0.35 * (1 - np.exp(-6 * AT)), COSINE),
}
# Accuracy on training and validation images, and the loss on the latter.
ACCURACIES = {
    "overfitting": (100 - 45 * np.exp(-18 * AT), 62 - 12 * np.exp(-18 * AT) - 4 * AT, 1.2 + AT),
    "underfitting": (54 - 35 * np.exp(-8 * AT), 53 - 33 * np.exp(-9 * AT), 1.3 + np.exp(-9 * AT)),
    "validation_at_chance": (100 * AT**0.5, 10 + 0 * AT, 2.3 + 2 * AT),
    "overregularized": (35 - 20 * np.exp(-6 * AT), 72 - 40 * np.exp(-6 * AT), 0.9 + np.exp(-9 * AT)),
    "degrading": (95 - 30 * np.exp(-10 * AT), 88 - 30 * np.exp(-14 * AT) - 12 * AT**2, 0.5 + 0 * AT),
}


def main():
    figure = Figure(figsize=(9, 6.4), dpi=130, layout="constrained", facecolor="white")
    panels = list(figure.subplots(3, 4, sharex=True).flat)
    rng = np.random.default_rng(3)
    for axes, (rule, (loss, lr)) in zip(panels, LOSSES.items(), strict=False):
        scatter = 0.25 if rule == "noisy" else 0.012
        loss = loss + scatter * rng.standard_normal(len(AT))
        check(rule, {"loss": loss, "lr": 1e-3 * lr}, kind="mae", settings={})
        start(axes, rule)
        axes.plot(AT, loss, color=BLUE, lw=1.3)
        axes.plot(AT, 0.3 * lr, color=ORANGE, lw=1, alpha=0.8)
        axes.set_ylim(0, 2.1)
    for axes, (rule, (train, validation, loss)) in zip(panels[len(LOSSES) :], ACCURACIES.items(), strict=True):
        train, validation = (np.clip(one + rng.standard_normal(len(AT)), 0, 100) for one in (train, validation))
        metrics = {"loss": 2 * np.exp(-6 * AT) + 0.1, "lr": 1e-3 * COSINE, "train_top1": train}
        metrics |= {"val_top1": validation, "val_loss": loss}
        settings = {"backbone": {"drop_rate": 0.9}} if rule == "overregularized" else {}
        check(rule, metrics, kind="supervised", settings=settings)
        start(axes, rule)
        axes.plot(AT, train, color=BLUE, lw=1.3)
        axes.plot(AT, validation, color=GREEN, lw=1.3)
        axes.set_ylim(0, 105)
    figure.supxlabel(
        "share of the run; blue: training loss or accuracy, orange: learning rate, green: validation accuracy",
        size=9,
        color=INK,
    )
    figure.savefig(FILE)


def check(rule, metrics, *, kind, settings):
    """Fail unless a curve is read by its rule, and by no other."""
    columns = {"step": 1200 * AT, "epoch": 20 * AT, **metrics}
    columns = {name: [float(value) for value in column] for name, column in columns.items()}
    found = [one.rule for one in read_curves(columns, kind=kind, settings=settings, chance_loss=math.log(10))]
    assert found == ([] if rule is None else [rule]), (rule, found)


def start(axes, rule):
    """Prepare a panel under the name of its rule."""
    style(axes)
    axes.set_title(rule or "healthy", size=9, loc="left", color=INK, weight="bold")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["left"].set_color(MUTED)


if __name__ == "__main__":
    main()
