"""A run with a budget or a number of updates: its length belongs to the run, and takes along what counts epochs."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning.callbacks import Callback

from sslvision.cli.compose import compose_settings, compose_values
from sslvision.cli.recipes import PRETRAIN
from sslvision.errors import UsageError
from sslvision.training.callbacks import keep_budget
from sslvision.workflows import budget, pretraining
from sslvision.workflows.budget import length_of_steps, scale_epochs


@pytest.fixture
def seconds_of_an_update(monkeypatch):
    """Let updates be timed as ever, and then take so many seconds each: seconds_of_an_update(10.0)."""
    measure = budget.time_updates

    def fixed(each):
        def time_updates(*arguments, **options):
            timed = measure(*arguments, **options)
            timed.each, timed.startup = each, 0.0
            return timed

        monkeypatch.setattr(budget, "time_updates", time_updates)
        monkeypatch.setattr(budget, "LONGEST_S", 0.0)  # ten updates are enough, as their time is not used
        monkeypatch.setattr(keep_budget, "CORRECTED_AT", ())  # by the time of real updates

    return fixed


class Updates(Callback):
    """A clock by which nothing but updates takes time, so many seconds each."""

    def __init__(self, each):
        self.each, self.now = each, 0.0

    def perf_counter(self):
        return self.now

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.now += self.each


class Power(Exception):
    """It went out."""


class Break(Callback):
    """Break a run after so many updates."""

    def __init__(self, after):
        self.after = after

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.after:
            raise Power


@pytest.fixture
def run(monkeypatch, tiny_settings):
    """Make a tiny run: run(folder, words). It breaks after `break_after` updates, which take `each` seconds if given."""
    build = pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})

    def run(folder, *words, break_after=None, each=None):
        more = [] if break_after is None else [Break(break_after)]
        if each is not None:
            more.append(clock := Updates(each))
            monkeypatch.setattr(keep_budget, "time", clock)
        monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *given: [*build(*given), *more])
        replaced = ["epochs", *(word.split("=")[0] for word in words)]  # the length is given by the test
        words = [*(word for word in tiny_settings("mae") if word.split("=")[0] not in replaced), *words]
        with pytest.raises(Power) if break_after is not None else nullcontext():
            return pretraining.pretrain(compose_settings(["recipe=mae", *words]), Path(folder), words)

    return run


@pytest.mark.parametrize(("budget", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("3d", 259_200)])
def test_a_budget_is_a_number_and_a_unit(budget, seconds):
    assert compose_settings(["recipe=mae", f"budget={budget}"]).budget_seconds == seconds


@pytest.mark.parametrize("budget", ["30", "0m", "-3m", "30 m", "soon", "1w", "m"])
def test_anything_else_is_refused_with_examples(budget):
    with pytest.raises(UsageError, match=r"must be a time above 0, such as 90s, 30m, 2h or 3d"):
        compose_settings(["recipe=mae", f"budget={budget}"])


def test_a_length_is_given_once():
    with pytest.raises(UsageError, match=r"epochs=2 and budget=30m .* give one of them"):
        compose_settings(["recipe=mae", "budget=30m", "epochs=2"])
    with pytest.raises(UsageError, match=r"budget=30m and max_steps=9 .* give one of them \(~max_steps removes"):
        compose_settings(["recipe=mae", "budget=30m", "max_steps=9"])
    with pytest.raises(UsageError, match=r"epochs=2 and budget=30m .* give one of them"):
        compose_values({"recipe": "mae", "budget": "30m", "epochs": 2}, PRETRAIN)


def test_what_counts_epochs_keeps_its_share_of_the_run_unless_it_was_given():
    words = ["recipe=dino", "budget=1h", "freeze_prototypes_epochs=2"]
    settings = compose_settings(words)  # 40 epochs, warm-up 2, k-NN and checkpoints every 10
    for epochs, warmup, every in ((8, 0.4, 2), (400, 20.0, 100), (0.5, 0.025, 1)):
        scaled, changes = scale_epochs(settings, epochs, words)
        assert scaled.epochs == max(1, epochs)
        assert scaled.method["warmup_epochs"] == pytest.approx(warmup)
        assert scaled.method["freeze_prototypes_epochs"] == 2
        assert (scaled.knn_every_epochs, scaled.checkpoint_every_epochs) == (every, every)
        assert f"warmup_epochs 2 -> {warmup:g}" in changes
    unscaled, changes = scale_epochs(settings, 40, words)
    assert unscaled == settings
    assert changes == []
    never = compose_settings([*words, "knn_every_epochs=0"])
    assert scale_epochs(never, 8, [])[0].knn_every_epochs == 0


def test_a_number_of_updates_is_the_length_wherever_its_epochs_end_resumed_or_not(run, tmp_path):
    run(tmp_path / "whole", "max_steps=6")  # of four to an epoch
    assert (tmp_path / "whole/metrics.csv").read_text().splitlines()[-1].startswith("6,1.5,")
    assert yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["epochs"] == 2

    run(tmp_path / "broken", "max_steps=6", "checkpoint_every_steps=1", break_after=5)
    with pytest.raises(UsageError, match=r"max_steps: 6 then"):
        run(tmp_path / "broken", "max_steps=7", "resume=auto")
    config = tmp_path / "broken/config.yaml"  # without its recipe, whose warm-up is scaled
    pretraining.pretrain(compose_settings([f"recipe={config}", "resume=auto"]), tmp_path / "broken", ["resume=auto"])
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


def test_what_a_recipe_counts_in_epochs_keeps_its_share_of_a_number_of_updates():
    settings = compose_settings(["recipe=dino", "max_steps=100", "batch_size=100"])  # 40 epochs, warm-up 2
    length = length_of_steps(settings, 1000, [])  # ten updates to an epoch
    assert (length.updates, length.settings.epochs, length.settings.method["warmup_epochs"]) == (100, 10, 0.5)


@pytest.mark.thorough
def test_a_run_with_a_budget_is_the_run_of_as_many_updates_resumed_or_not(
    run, seconds_of_an_update, monkeypatch, tmp_path
):
    seconds_of_an_update(2880.0)  # ten hours, less what the test takes: twelve updates, three epochs
    run(tmp_path / "budget", "budget=10h")
    run(tmp_path / "epochs", "epochs=3")
    assert_same_weights(tmp_path / "budget", tmp_path / "epochs")
    assert yaml.safe_load((tmp_path / "budget/config.yaml").read_text())["epochs"] == 3

    run(tmp_path / "broken", "budget=10h", "checkpoint_every_steps=1", break_after=5)
    monkeypatch.setattr(budget, "time_updates", None)  # nothing is measured again
    run(tmp_path / "broken", "budget=10h", "checkpoint_every_steps=1", "resume=auto")
    assert_same_weights(tmp_path / "budget", tmp_path / "broken")
    for other in ("budget=2h", "epochs=3"):
        with pytest.raises(UsageError, match=r"budget: 10h then|without a budget"):
            run(tmp_path / "broken", other, "resume=auto")


@pytest.mark.thorough
def test_a_run_whose_updates_take_longer_than_measured_is_shortened_on_the_way_resumed_or_not(
    run, seconds_of_an_update, monkeypatch, tmp_path, capsys
):
    seconds_of_an_update(2880.0)  # twelve updates, by the time measured before
    monkeypatch.setattr(keep_budget, "CORRECTED_AT", (0.2, 0.6))
    run(tmp_path / "whole", "budget=10h", each=3800.0)  # nine fill it
    assert "so the run has 9 instead of 12." in " ".join(capsys.readouterr().out.split())
    whole = torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)
    assert whole["global_step"] == 9
    assert [one["updates"] for one in whole["sslvision"]["budget"]["corrections"]] == [9, 9]
    assert yaml.safe_load((tmp_path / "whole/config.yaml").read_text())["epochs"] == 3

    run(tmp_path / "broken", "budget=10h", each=3800.0, break_after=5)  # after the correction, which saved a checkpoint
    monkeypatch.setattr(budget, "time_updates", None)
    run(tmp_path / "broken", "budget=10h", "resume=auto", each=3800.0)
    assert_same_weights(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.thorough
def test_a_run_whose_updates_take_less_than_measured_is_lengthened_on_the_way(
    run, seconds_of_an_update, monkeypatch, tmp_path
):
    seconds_of_an_update(2880.0)
    monkeypatch.setattr(keep_budget, "CORRECTED_AT", (0.2, 0.6))
    run(tmp_path / "run", "budget=10h", each=1000.0)
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert (last["global_step"], last["sslvision"]["settings"]["epochs"]) == (36, 9)


@pytest.mark.thorough
def test_a_budget_below_an_epoch_ends_within_it(run, seconds_of_an_update, tmp_path):
    seconds_of_an_update(2880.0)
    run(tmp_path / "short", "batch_size=50", "budget=10h")
    assert (tmp_path / "short/metrics.csv").read_text().splitlines()[-1].startswith("12,0.52")  # of 23 updates


@pytest.mark.thorough
def test_a_budget_that_is_over_before_training_says_what_suffices(run, seconds_of_an_update, tmp_path):
    seconds_of_an_update(5.0)
    with pytest.raises(
        UsageError, match=r"budget=45s is over before .* an update takes 5 s. Give at least budget=5\d\ds"
    ):
        run(tmp_path / "none", "budget=45s")
    assert not (tmp_path / "none").exists()


def assert_same_weights(folder, other):
    one, two = (
        torch.load(each / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for each in (folder, other)
    )
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
