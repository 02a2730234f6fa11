import json
from pathlib import Path

import pytest

from sslvision.optim.schedules import cosine_by_step, warmup_cosine

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["mae_lr_schedule"])
def test_mae_learning_rates_equal_the_authors_at_every_fractional_epoch(case):
    settings = case["args"]
    for epoch, expected in case["at"]:
        rate = warmup_cosine(
            epoch,
            peak=settings["lr"],
            end=settings["min_lr"],
            epochs=settings["epochs"],
            warmup_epochs=settings["warmup_epochs"],
        )
        assert abs(rate - expected) <= 1e-9


@pytest.mark.parametrize("case", GOLDEN["dino_cosine_scheduler"])
def test_dino_schedules_equal_the_authors_at_every_step(case):
    settings = case["args"]
    per_epoch = settings["niter_per_ep"]
    for step, expected in enumerate(case["values"]):
        value = cosine_by_step(
            step,
            start=settings["base_value"],
            end=settings["final_value"],
            steps=settings["epochs"] * per_epoch,
            warmup_steps=settings.get("warmup_epochs", 0) * per_epoch,
            warmup_start=settings.get("start_warmup_value", 0),
        )
        assert abs(value - expected) <= 1e-9


def test_a_schedule_without_warm_up_begins_at_its_peak():
    assert warmup_cosine(0, peak=2.0, epochs=10, warmup_epochs=0) == 2.0
