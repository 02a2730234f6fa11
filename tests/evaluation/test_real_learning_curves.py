"""What is read from the curves of real runs, healthy and with planted faults: see golden/curves/README.md."""

import math
from pathlib import Path

import pytest

from sslvision.evaluation.learning_curves import read_curves
from sslvision.runs.metrics import read_metrics

CURVES = Path(__file__).parents[1] / "golden" / "curves"
KNOWN = {"classes": math.log(10), "mae": 1.0, "dino": math.log(256)}


def read(name, *, validation_images=120, **settings):
    kind = name.split("_")[0]
    kind, chance = ("supervised", KNOWN["classes"]) if kind == "finetune" else (kind, KNOWN[kind])
    metrics = read_metrics(CURVES / f"{name}.csv")
    images = validation_images if kind == "supervised" else 599
    return read_curves(metrics, kind=kind, settings=settings, chance_loss=chance, validation_images=images)


@pytest.mark.parametrize("name", ["mae", "dino", "finetune"])
def test_nothing_is_said_of_healthy_runs(name):
    assert read(name) == []


FAULTS = {
    "mae_rate_a_thousandth": ("flat", {"base_lr": 1.6e-5}, ("base_lr=0.00016",)),
    "mae_decayed_early": ("decayed_early", {"epochs": 2}, ("epochs=4",)),
    "finetune_rate_x30": ("diverging", {"lr_ratio": 3}, ("lr_ratio=0.3",)),
    "finetune_20_labels": (
        "overfitting",
        {"labels_per_class": 2},
        ("mixup=0.8", "label_smoothing=0.1", "backbone.drop_path_rate=0.1"),
    ),
    "finetune_dropout_0.9": ("overregularized", {"backbone": {"drop_rate": 0.9}}, ("backbone.drop_rate=0",)),
    "finetune_labels_shuffled": ("validation_at_chance", {}, ()),
    "finetune_weight_decay_10": ("overregularized", {"method": {"weight_decay": 10}}, ("weight_decay=0.05",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_planted_fault_is_named_first_and_its_setting_is_what_to_type(name):
    rule, settings, words = FAULTS[name]
    images = {"finetune_20_labels": 10, "finetune_labels_shuffled": 30}
    readings = read(name, validation_images=images.get(name, 120), **settings)
    assert (readings[0].rule, readings[0].words) == (rule, words)
