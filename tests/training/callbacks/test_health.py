"""Both collapses of DINO are provoked and named; a healthy run is not disturbed."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from sslvision.errors import Diverged
from sslvision.methods.base import Clock, Method
from sslvision.training.callbacks.health import Health

# 156 updates on the embedded images, enough for either collapse.
QUICK = [
    "data=embedded",
    "batch_size=128",
    "epochs=2",
    "warmup_epochs=0.2",
    "freeze_prototypes_epochs=0",
    "trainer.log_every_n_steps=5",
    "knn_every_epochs=0",
]


def test_without_centering_the_run_ends_with_a_single_prototype_collapse(train_tiny, tmp_path):
    with pytest.raises(Diverged, match="Single-prototype collapse") as raised:
        # With seed 0 two prototypes share the images for long, and which way that ends, rounding decides.
        train_tiny(tmp_path / "run", *QUICK, "center_momentum=1.0", "health=stop", "seed=2", recipe="dino")
    assert "center_momentum=0.9" in str(raised.value)


def test_without_sharpening_the_run_ends_with_a_uniform_collapse(train_tiny, tmp_path):
    with pytest.raises(Diverged, match="Uniform collapse") as raised:
        train_tiny(
            tmp_path / "run",
            *QUICK,
            "teacher_temp=1.0",
            "warmup_teacher_temp=1.0",
            "health=stop",
            recipe="dino",
        )
    assert "Set teacher_temp well below student_temp" in str(raised.value)


@pytest.mark.e2e
def test_a_healthy_run_gives_no_alarm(train_tiny, tmp_path, capsys):
    assert train_tiny(tmp_path / "run", *QUICK, "health=stop", recipe="dino")["findings"] == []
    assert "ollapse" not in capsys.readouterr().err


class Ailing(Method):
    """Its metrics are whatever the test says; a "fever" is a fault."""

    def __init__(self):
        super().__init__(crops=[], mean=[0.5], std=[0.5], betas=(0.9, 0.99), seed=0)

    @property
    def clock(self):
        return Clock(0, 1, 1)

    def diagnose(self, means, clock):
        return {"Fever": "hot; drink [tea]."} if means["loss"] > 37 else {}

    views = losses = schedule = pretrained = None


Ailing.__abstractmethods__ = frozenset()


def watch(temperatures, *, action="warn", every=20):
    """Show temperatures, one log after another, to a Health, and return it and what it printed."""
    printed = io.StringIO()
    health = Health(action, Console(file=printed, width=200))
    patient = Ailing()
    for number, temperature in enumerate(temperatures, start=1):
        patient.logged = {"loss": temperature}
        for step in range(2):  # the same metrics are looked at once
            trainer = SimpleNamespace(global_step=number * every + step, is_global_zero=True)
            health.on_train_batch_end(trainer, patient, None, torch.empty(0), 0)
    return health, printed.getvalue()


def test_a_fault_is_said_once_and_training_goes_on():
    health, printed = watch([38.0] * 12)
    assert printed == "Fever, from step 20 to 100: hot; drink [tea].\n"
    assert list(health.found.values()) == [printed.strip()]


def test_a_fault_that_comes_and_goes_is_none():
    assert watch([38.0] * 4 + [36.0] + [38.0] * 4)[1] == ""


def test_a_fault_of_a_few_steps_is_none_however_often_they_are_logged():
    assert watch([38.0] * 40, every=1)[1] == ""


def test_stopping_says_how_to_go_on():
    with pytest.raises(Diverged, match=r"Fever.*health=warn"):
        watch([38.0] * 5, action="stop")
