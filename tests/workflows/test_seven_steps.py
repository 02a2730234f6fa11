"""The seven steps through the workflow, on planted faults, with very short trainings."""

import json
import math
from unittest import mock

import pytest

pytest.importorskip("optuna")

from sslvision.cli.compose import compose_settings
from sslvision.evaluation.curve_run import Reading
from sslvision.workflows import seven_steps, step_choices, steps
from sslvision.workflows.ladder import Times
from sslvision.workflows.seven_steps import tune_by_steps
from sslvision.workflows.step_choices import (
    asked,
    cell_length,
    coarse,
    grid_length,
    next_exponent,
    rate_name,
    with_decay,
)
from sslvision.workflows.step_trainings import constant, plain
from sslvision.workflows.steps_report import told_after_grids

SHORT = (
    "recipe=mae",
    "data=digits",
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "backbone.patch_size=8",
    "decoder_embed_dim=16",
    "decoder_num_heads=2",
    "batch_size=296",
    "epochs=4",
    "evaluate_images=100",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)


def test_without_regularization_all_of_it_is_off_and_the_rest_is_the_recipes(settings_of):
    settings = settings_of(
        "tune", "run=vit_tiny_patch16_224", "data=digits", "mixup=0.8", "cutmix=1", "cutout=0.4", "weight_noise=0.1",
        "label_smoothing=0.1", "backbone.drop_path_rate=0.2", "randaugment=9", "layer_decay=0.7",
    )  # fmt: skip
    off = plain(settings)
    assert not any(
        off.method[key] for key in ("mixup", "cutmix", "cutout", "weight_noise", "label_smoothing", "weight_decay")
    )
    assert (off.backbone["drop_path_rate"], off.randaugment, off.method["layer_decay"]) == (0, 0, 0.7)
    assert off.method["crop_scale"] == [1.0, 1.0]
    assert plain(settings, augment=True).method["crop_scale"] == settings.method["crop_scale"]


def test_rates_and_decays_are_changed_in_the_terms_of_the_recipe(settings_of):
    mae, dino = (settings_of("tune", f"recipe={name}") for name in ("mae", "dino"))
    assert (rate_name(mae), rate_name(dino)) == ("base_lr", "lr")
    assert rate_name(settings_of("tune", "run=vit_tiny_patch16_224", "data=digits")) == "lr_ratio"
    assert with_decay(dino, 0.01, "dino").method["weight_decay_end"] == pytest.approx(0.1)
    assert constant(1e-3, dino).method["min_lr"] == 1e-3
    assert constant(1e-3, dino).method["warmup_epochs"] == 0
    assert constant(1e-3, dino, warm=True).method["warmup_epochs"] == dino.method["warmup_epochs"]
    cells = coarse(mae, 1e-2)
    assert cells[:3] == [(1e-2, 0.05), (3.33e-3, 0.05), (3e-2, 0.05)]  # the recipe's own decay comes first
    assert {rate for rate, _ in cells[3:6]} == {1e-2}
    assert len(cells) == len(set(cells)) == 12
    assert asked("all") == [1, 2, 3, 4, 5, 6, 7]
    assert asked([2, 3]) == [2, 3]


def test_the_sweep_tries_decades_and_then_what_is_near_the_best():
    tried = {}
    while len(tried) < 7:
        one = next_exponent(tried)
        tried[one] = math.nan if one > 0 else -abs(one + 1.5)  # the recipe's rate is thirty times too high
    assert list(tried) == [0, -1, 1, -2, 2, -1.5, -2.5]
    assert len({next_exponent(tried), *tried}) == 8


def test_a_cell_is_scored_on_fewer_images_where_scoring_would_take_most_of_its_time():
    def length(seconds, rest, scored=10_000):
        return cell_length(seconds, Times(0.1, rest), full=1000, most=0.5, scored=scored)

    assert length(30, 5) == {"share": 0.25, "images": None}
    assert length(100, 5) == {"share": 0.5, "images": None}  # no longer than it may be
    assert length(30, 20) == {"share": pytest.approx(0.2), "images": 5_000}
    assert length(3, 10) == {"share": 0.02, "images": 2_000}  # 10 updates would be too few
    assert length(30, 20, scored=None) == {"share": pytest.approx(0.1), "images": None}


def test_a_grid_has_fewer_cells_rather_than_cells_that_are_too_short():
    def length(cells, *seconds, least=0.1):
        found = grid_length(cells, seconds, Times(0.1, 5.0), least=least, most=0.5, full=1000, scored=None)
        return found["cells"], pytest.approx(found["share"])

    assert length(10, 300) == (10, 0.25)  # 25 of 30 seconds each
    assert length(10, 100, 300) == (10, 0.25)  # the time that suffices for all
    assert length(10, 60) == (4, 0.1)
    assert length(10, 15) == (3, 0.02)  # at least three, as short as it must be
    assert length(10, 60, least=0.0) == (8, 0.025)


def test_curves_do_not_advise_another_rate_than_the_grid_has_measured():
    rising = Reading("diverging", "The loss rose to 2.06.", "The rate is too high.", ("lr_ratio=0.015",))
    assert "Try" not in told_after_grids(rising)
    assert told_after_grids(rising).startswith("The loss rose to 2.06. The grids' other rates")
    rising_still = Reading("unfinished", "The accuracy still rises.", "Train longer.", ("epochs=46",))
    assert told_after_grids(rising_still) == str(rising_still)


def run(folder, *words):
    given = {word.split("=")[0] for word in words}
    kept = [word for word in SHORT if word.split("=")[0] not in given]
    from sslvision.cli.recipes import TUNE

    with mock.patch.multiple(steps, HEART=40, SWEPT=10):
        return tune_by_steps(compose_settings([*kept, *words], TUNE), folder, words)


@pytest.mark.thorough
def test_pixels_off_by_255_are_named_by_the_first_step_which_is_the_last(tmp_path):
    results = run(tmp_path / "off", "data.normalize=[[33.15],[0.00118]]", "steps=[1,2]")
    assert results["stopped_by"] == "initial loss"
    (verdict,) = results["verdicts"]
    assert "normalization: pixels have mean" in verdict["words"]
    assert "data.normalize=computed" in verdict["advice"]


@pytest.mark.thorough
def test_steps_that_passed_are_not_done_again_and_end_in_a_recipe(tmp_path):
    folder = tmp_path / "steps"
    first = run(folder, "steps=[1,3]")
    assert [one["step"] for one in first["verdicts"]] == ["initial loss", "rate"]
    assert all(one["passed"] for one in first["verdicts"])
    assert (folder / "figures" / "rates.png").stat().st_size > 10_000
    with (
        mock.patch.object(steps, "train_for", side_effect=RuntimeError("done again")),
        mock.patch.multiple(seven_steps, COARSE_EPOCHS=1, FINE_EPOCHS=2),
        mock.patch.object(step_choices, "DECAYS", (0.0,)),
    ):
        results = run(folder, "steps=[1,3,4,5,6]")
    assert results["best"] is not None
    settings = compose_settings([f"recipe={folder / 'best.yaml'}"])
    assert settings.base_lr == results["best"]["rate"]
    assert settings.method["weight_decay"] == results["best"]["weight_decay"]
    assert "min_lr" not in settings.method  # the recipe's own schedule
    header = (folder / "best.yaml").read_text().split("method:")[0]
    assert "initial loss: The loss before the first update is" in header
    assert all(line.startswith("#") for line in header.splitlines())
    cells = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    cells = [(cell["grid"], cell["rate"], cell["weight_decay"]) for cell in cells if "grid" in cell]
    assert len(cells) == len(set(cells)) >= 9
