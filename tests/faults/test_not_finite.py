"""Rows 11 and 12: updates without finite gradients are left out, told and kept; a run of nothing else ends; spikes are told."""

import csv
import json
import math

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from sslvision.errors import Diverged
from sslvision.methods.mae import MAE
from sslvision.optim.nonfinite import skip_nonfinite
from sslvision.training.callbacks.skipped_updates import longest_sequence
from sslvision.workflows import pretraining

pytestmark = pytest.mark.faults

WORDS = ["data=digits", "batch_size=200", "knn_every_epochs=0", "lr=1e-3"]  # ten updates


def spoil(monkeypatch, method, losses):
    """Replace the loss of some updates: {update, from 1: factor}."""
    compute = method.losses

    def spoilt(self, views, clock):
        metrics = compute(self, views, clock)
        return metrics | {"loss": metrics["loss"] * losses.get(clock.step + 1, 1.0)}

    monkeypatch.setattr(method, "losses", spoilt)


class Weights(Callback):
    """Copies of the weights and of the optimizer's state after every update, by its number."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state_dict()["state"]
        tensors = [*pl_module.state_dict().values(), *(tensor for one in state.values() for tensor in one.values())]
        self.after[trainer.global_step] = [tensor.clone() for tensor in tensors]


@pytest.fixture
def weights(monkeypatch):
    build, watching = pretraining.pretraining_callbacks, Weights()
    monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *given: [*build(*given), watching])
    return watching.after


def rows_of(file):
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("broken", [math.nan, pytest.param(math.inf, marks=pytest.mark.e2e)])
def test_an_update_that_is_not_finite_changes_neither_weights_nor_optimizer(
    broken, optimizer, weights, run_tiny, tmp_path, monkeypatch, capsys
):
    spoil(monkeypatch, MAE, {4: broken, 7: broken})
    results = run_tiny(tmp_path / "run", *WORDS, "trainer.log_every_n_steps=3", f"optimizer={optimizer}")
    same = {update: all(map(torch.equal, weights[update - 1], weights[update])) for update in range(2, 11)}
    assert [update for update, unchanged in same.items() if unchanged] == [4, 7]
    assert math.isfinite(results["loss"])
    assert any("2 updates were skipped" in finding for finding in results["findings"])
    assert "Update 4 was skipped" in capsys.readouterr().err
    assert all(math.isfinite(float(row["loss"])) for row in rows_of(tmp_path / "run" / "metrics.csv") if row["loss"])


def test_the_images_of_a_broken_update_are_named_and_its_crops_kept(train_tiny, tmp_path, monkeypatch):
    seen = []
    views = MAE.views
    monkeypatch.setattr(MAE, "views", lambda self, batch, rng: [seen.append(batch), views(self, batch, rng)][1])
    spoil(monkeypatch, MAE, {4: math.nan})
    train_tiny(tmp_path / "run", *WORDS)
    rows = rows_of(tmp_path / "run" / "not_finite" / "update-00000004.csv")
    assert [(int(row["epoch"]), int(row["place"])) for row in rows] == [(0, int(place)) for place in seen[3].indices]
    assert rows[0]["image"]
    kept = torch.load(tmp_path / "run" / "not_finite" / "update-00000004.pt")
    assert torch.equal(kept["crops"][0], seen[3].crops[0])


def test_a_row_of_them_ends_the_run_and_what_was_saved_before_is_good(run_tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, MAE, dict.fromkeys(range(4, 11), math.nan))
    words = [*WORDS, "max_skipped=2", "checkpoint_every_steps=1"]
    with pytest.raises(
        Diverged, match=r"3 updates in a row .to update 6; max_skipped=2.*Lower the learning rate"
    ) as raised:
        run_tiny(tmp_path / "run", *words)
    assert raised.value.exit_code == 4
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("good", [0, pytest.param(8, marks=pytest.mark.e2e)])
def test_a_run_whose_end_is_not_finite_is_no_success(good, run_tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, MAE, dict.fromkeys(range(good + 1, 11), math.nan))
    with pytest.raises(Diverged, match="in the last updates"):
        run_tiny(tmp_path / "run", *WORDS, "max_skipped=100")
    assert not (tmp_path / "run" / "export").exists()


def test_a_resumed_run_knows_what_was_left_out_before(train_tiny, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, MAE, {2: math.nan, 8: math.nan})
    train_tiny(tmp_path / "run", *WORDS)
    capsys.readouterr()
    (tmp_path / "run" / "results.json").unlink()
    train_tiny(tmp_path / "run", *WORDS, "resume=auto")  # nothing is left to train
    findings = json.loads((tmp_path / "run" / "results.json").read_text())["findings"]
    assert any("2 updates were skipped" in finding for finding in findings)
    assert "skipped" not in capsys.readouterr().err  # it was told then


def test_a_run_that_diverged_goes_on_from_before_it(train_tiny, tmp_path, monkeypatch):
    """Its last weights are finite, and may be spoilt all the same."""
    words = [*WORDS, "max_skipped=2", "checkpoint_every_steps=2", "resume=auto"]
    with monkeypatch.context() as broken:
        spoil(broken, MAE, dict.fromkeys(range(4, 11), math.nan))
        with pytest.raises(Diverged):
            train_tiny(tmp_path / "run", *words)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 5
    results = train_tiny(tmp_path / "run", *words)
    assert "Resumed from last-2.ckpt (update 2)" in results["findings"][0]


def test_a_loss_a_hundred_times_higher_is_told_and_training_goes_on(train_tiny, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, MAE, {7: 100.0})
    results = train_tiny(tmp_path / "run", *WORDS, "trainer.log_every_n_steps=2")
    assert "The loss jumped between updates 7 and 8" in capsys.readouterr().err
    assert any("The loss jumped" in finding for finding in results["findings"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_optimizers_without_a_fused_kernel_are_kept_from_harm(kind):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    for gradient in ([1.0, 1.0, 1.0], [1.0, math.nan, math.inf]):
        weight.grad = torch.tensor(gradient)
        norm, _ = skip_nonfinite(optimizer, [weight.grad])
        optimizer.step()
    assert not norm.isfinite()
    assert weight.isfinite().all()


def test_the_guard_asks_the_device_nothing(monkeypatch):
    """No .item(), no truth of a tensor: the host would wait for them at every step."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    weight.grad = torch.tensor([1.0, math.nan, 1.0])
    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} was called"))
    skip_nonfinite(optimizer, [weight.grad])
    monkeypatch.undo()
    optimizer.step()
    assert torch.equal(weight, torch.ones(3))


def test_rows_are_counted_without_gaps():
    assert [longest_sequence(updates) for updates in ([], [5], [1, 3, 4, 5, 9, 10], [2, 4, 6])] == [0, 1, 3, 1]
