import pytest
import torch

from sslvision.errors import UsageError
from sslvision.training.trainer import build_trainer


def build(folder, **options):
    return build_trainer(folder=folder, epochs=3, steps=300, dry_run=False, loggers=[], callbacks=[], options=options)


def test_what_the_person_says_wins_over_the_defaults(tmp_path):
    trainer = build(tmp_path, accelerator="cpu", precision="64-true", accumulate_grad_batches=4)
    assert trainer.precision == "64-true"
    assert trainer.accumulate_grad_batches == 4
    assert trainer.max_epochs == 3


@pytest.mark.parametrize(("steps", "every"), [(2, 1), (90, 1), (1_000, 10), (9_360, 50), (500_000, 50)])
def test_a_run_of_any_length_has_a_learning_curve(tmp_path, steps, every):
    trainer = build_trainer(
        folder=tmp_path, epochs=1, steps=steps, dry_run=False, loggers=[], callbacks=[], options={"accelerator": "cpu"}
    )
    assert trainer.log_every_n_steps == every


def test_a_cpu_trains_in_bf16_only_if_it_has_units_for_it(tmp_path, monkeypatch):
    for units, precision in (
        ({}, "32-true"),
        ({"avx512_bf16": True}, "bf16-mixed"),
        ({"amx_bf16": True}, "bf16-mixed"),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert build(tmp_path, accelerator="cpu").precision == precision


def test_what_lightning_refuses_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="accelerator=abacus"):
        build(tmp_path, accelerator="abacus")
