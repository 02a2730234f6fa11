"""Signals: what is saved, what a shell is told, and that a resumed run ends as if nothing had been."""

import os
import re
import signal
import time

import pytest
import torch
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector
from safetensors.torch import load_file

from sslvision.cli.compose import compose_settings
from sslvision.cli.main import _interrupted
from sslvision.cli.recipes import COMMANDS
from sslvision.errors import Stopped
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.system import signals
from sslvision.system.signals import Interrupted
from sslvision.system.torch_files import load_verified
from sslvision.training.callbacks import stop_on_signal
from sslvision.workflows import finetuning

pytestmark = pytest.mark.faults

ACCUMULATED = "trainer.accumulate_grad_batches=2"
KNN = "knn_every_epochs=1"


@pytest.fixture(scope="module")
def undisturbed(train_tiny, tmp_path_factory):
    """The weights at the end of a tiny run of eight updates, and its metrics, by its further words."""
    known = {}

    def weights(*words):
        if words not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            train_tiny(folder, *words)
            known[words] = (saved(folder)["state_dict"], (folder / "metrics.csv").read_text())
        return known[words]

    return weights


@pytest.fixture(autouse=True)
def handled():
    """Signals do what they usually do: started with nohup or in the background of a script, a program ignores some."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def send(monkeypatch):
    """Have a signal come, once, while a batch is under way: send(signal.SIGTERM, batch=3), counted from 1."""

    def at(signum, *, batch):
        losses, seen = MAE.losses, []

        def interrupted(self, views, clock):
            seen.append(clock.step)
            if len(seen) == batch:
                signal.raise_signal(signum)
            return losses(self, views, clock)

        monkeypatch.setattr(MAE, "losses", interrupted)

    return at


@pytest.fixture
def handlers():
    """Have signals outside of training raise, as on the command line, and leave them as they were."""
    before = {signum: signal.getsignal(signum) for signum in (*stop_on_signal.handled_signals(), signal.SIGUSR1)}
    signals.raise_interrupted()
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def saved(folder):
    return load_verified(folder / "checkpoints" / "last.ckpt")


def assert_same(weights, others):
    assert weights.keys() == others.keys()
    assert not [name for name, value in weights.items() if not torch.equal(value, others[name])]


@pytest.mark.parametrize(
    ("signum", "exit_code", "batch", "step"),
    [
        pytest.param(signal.SIGHUP, 129, 2, 2, marks=pytest.mark.e2e),
        (signal.SIGINT, 130, 5, 5),
        (signal.SIGTERM, 143, 4, 4),  # the last of an epoch
        pytest.param(signal.SIGTERM, 143, 8, 8, marks=pytest.mark.e2e),  # the last of all
    ],
)
def test_a_signal_stops_at_the_update_it_comes_in_and_the_resumed_run_ends_the_same(
    signum, exit_code, batch, step, send, train_tiny, undisturbed, tmp_path
):
    """Rows 2 and 4."""
    before = {one: signal.getsignal(one) for one in stop_on_signal.handled_signals()}
    send(signum, batch=batch)
    with pytest.raises(Stopped, match=rf"{signal.Signals(signum).name}: saved at step {step} in .*last.ckpt") as end:
        train_tiny(tmp_path / "run", KNN)
    assert end.value.exit_code == exit_code
    assert {one: signal.getsignal(one) for one in before} == before
    assert saved(tmp_path / "run")["global_step"] == step
    train_tiny(tmp_path / "run", KNN, "resume=auto")
    weights, metrics = undisturbed(KNN)
    assert_same(saved(tmp_path / "run")["state_dict"], weights)
    assert (tmp_path / "run" / "metrics.csv").read_text() == metrics  # the k-NN at the end of an epoch too


def test_between_accumulated_batches_a_signal_waits_for_the_update(send, train_tiny, undisturbed, tmp_path):
    """Row 3."""
    send(signal.SIGTERM, batch=3)  # the first of two of the second update
    with pytest.raises(Stopped, match="saved at step 2"):
        train_tiny(tmp_path / "run", ACCUMULATED)
    assert saved(tmp_path / "run")["global_step"] == 2
    train_tiny(tmp_path / "run", ACCUMULATED, "resume=auto")
    assert_same(saved(tmp_path / "run")["state_dict"], undisturbed(ACCUMULATED)[0])


def test_a_second_signal_ends_the_run_at_once_and_unsaved(handlers, train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(stop_on_signal, "SAME_REQUEST_S", 0.0)
    losses = MAE.losses

    def twice(self, views, clock):
        if clock.step == 1:
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
        return losses(self, views, clock)

    monkeypatch.setattr(MAE, "losses", twice)
    with pytest.raises(Interrupted):
        train_tiny(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_the_same_signal_twice_in_a_moment_is_one_request(handlers, train_tiny, tmp_path, monkeypatch):
    """A launcher passes on what the process has received from the terminal already."""
    losses = MAE.losses

    def twice(self, views, clock):
        if clock.step == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return losses(self, views, clock)

    monkeypatch.setattr(MAE, "losses", twice)
    with pytest.raises(Stopped, match="saved at step 2"):
        train_tiny(tmp_path / "run")


@pytest.mark.parametrize(
    "update", [4, pytest.param(5, marks=pytest.mark.e2e)]
)  # a validation falls on every second one
def test_fine_tuning_stops_and_goes_on_as_if_nothing_had_been(update, settings_of, tiny_run, tmp_path, monkeypatch):
    """Rows 2 and 4, of fine-tuning: no validation may be left out, for the best weights by these are kept."""
    words = [
        *(f"run={tiny_run}", "data=digits", "epochs=0", "min_updates=8", "evaluations=4", "scratch=false", "lr=0.01"),
        *("head_first=false", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.log_every_n_steps=1"),
        *("trainer.enable_progress_bar=false", "resume=auto"),
    ]
    settings = settings_of("finetune", *words)
    whole = finetuning.finetune(settings, tmp_path / "whole")
    after_update, sent = Supervised.after_update, []

    def interrupted(self, clock):
        after_update(self, clock)
        if clock.step + 1 == update and not sent:
            sent.append(update)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Supervised, "after_update", interrupted)
    with pytest.raises(Stopped, match=f"saved at step {update} "):
        finetuning.finetune(settings, tmp_path / "run")
    again = finetuning.finetune(settings, tmp_path / "run")
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    one, other = (load_file(tmp_path / run / "export" / "model.safetensors") for run in ("whole", "run"))
    assert_same(one, other)
    one, other = ((tmp_path / run / "metrics.csv").read_text() for run in ("whole", "run"))
    assert one == other


def test_lightning_still_has_what_is_replaced_of_it():
    """Its own watch for signals: without these names ours would stand beside it."""
    assert callable(_SignalConnector.register_signal_handlers)
    assert callable(_TrainingEpochLoop._broadcast_sigterm_tensor)
    assert callable(_TrainingEpochLoop._should_check_val_fx)


# SLURM.


@pytest.fixture
def slurm(handlers, tmp_path, monkeypatch):
    """A job of SLURM, and an scontrol that writes down what it is asked and returns `exit_code`."""
    asked, folder = tmp_path / "asked", tmp_path / "bin"
    folder.mkdir()

    def control(exit_code=0):
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {asked}\necho "Not allowed" >&2\nexit {exit_code}\n')
        (folder / "scontrol").chmod(0o755)
        return asked

    for name, value in {
        **{"JOB_ID": "4712", "ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "3", "JOB_NAME": "pretrain"},
        **{"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"},
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setitem(signals._job, "requeued", False)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    return control


def test_under_slurm_the_job_is_saved_and_requeued_and_the_same_words_go_on(
    slurm, send, train_tiny, undisturbed, tmp_path
):
    asked = slurm()
    send(signal.SIGUSR1, batch=3)
    with pytest.raises(Stopped, match=r"SIGUSR1: saved at step 3 in .*SLURM has requeued job 4711_3") as end:
        train_tiny(tmp_path / "run", "resume=auto")
    assert end.value.exit_code == 143
    assert asked.read_text() == "requeue 4711_3\n"
    assert not [*tmp_path.rglob("hpc_ckpt*")]  # Lightning's own way, which is not exact
    train_tiny(tmp_path / "run", "resume=auto")
    assert_same(saved(tmp_path / "run")["state_dict"], undisturbed(KNN)[0])


def test_a_job_that_would_not_go_on_is_not_requeued(slurm, send, train_tiny, tmp_path):
    asked = slurm()
    send(signal.SIGUSR1, batch=2)
    with pytest.raises(Stopped, match=r"saved at step 2 .*no resume=auto"):
        train_tiny(tmp_path / "run")
    assert not asked.exists()


def test_a_refusal_of_slurm_is_passed_on(slurm, send, train_tiny, tmp_path):
    slurm(exit_code=1)
    send(signal.SIGUSR1, batch=2)
    with pytest.raises(
        Stopped, match=r"saved at step 2 .*SLURM did not requeue job 4711_3 .*Not allowed.*submit it again"
    ):
        train_tiny(tmp_path / "run", "resume=auto")


def test_the_sigterm_by_which_slurm_ends_a_requeued_job_changes_nothing(slurm, send, train_tiny, tmp_path):
    """It comes while the run is ending, and reaches scontrol too, which is a process of the job."""
    slurm()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\nkill -TERM {os.getpid()} $$\n")
    send(signal.SIGUSR1, batch=2)
    with pytest.raises(Stopped, match=r"^SIGUSR1: saved at step 2 .*SLURM has requeued job 4711_3") as end:
        train_tiny(tmp_path / "run", "resume=auto")
    assert end.value.exit_code == 143
    signal.raise_signal(signal.SIGTERM)  # outside of training: would raise Interrupted


EMBEDDED = ["run=test_vit", "data=digits"]


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (
            "pretrain",
            ["recipe=mae", "name=a", "resume=auto"],
            r"^SIGUSR1 outside of training\. SLURM has requeued job 4711_3",
        ),
        ("pretrain", ["recipe=mae", "name=a"], "not requeued: its command has no resume=auto"),
        ("embed", EMBEDDED, r"same command goes on: .* SLURM has requeued job 4711_3"),
        ("embed", [*EMBEDDED, "overwrite=true"], "not requeued: its command has overwrite=true"),
        ("scale", ["recipe=mae", "budget=10m", "name=a"], r"0 trainings .*goes on.* SLURM has requeued job 4711_3"),
        ("scale", ["recipe=mae", "budget=10m", "name=a", "dry_run=true"], "not requeued, as a dry run begins anew"),
        ("probe", EMBEDDED, "not requeued: this command begins anew each time"),
    ],
)
def test_outside_of_training_a_job_is_requeued_if_its_command_goes_on(
    command, words, told, slurm, monkeypatch, tmp_path
):
    asked = slurm()
    monkeypatch.setenv("SSLVISION_RUN_FOLDER", str(tmp_path / "outputs" / "a"))
    settings = compose_settings(words, COMMANDS[command])
    stopped = _interrupted(signal.SIGUSR1, COMMANDS[command], words, settings)
    assert re.search(told, str(stopped))
    assert stopped.exit_code == 143
    assert asked.exists() == ("has requeued" in told)


def test_a_job_whose_time_is_too_short_for_an_update_is_not_started_for_ever(slurm, monkeypatch, tmp_path):
    asked, words = slurm(), ["recipe=mae", "name=a", "resume=auto"]
    monkeypatch.setenv("SSLVISION_RUN_FOLDER", str(tmp_path))
    settings = compose_settings(words)

    def told(restarts):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        return str(_interrupted(signal.SIGUSR1, COMMANDS["pretrain"], words, settings))

    assert "has requeued" in told(1)
    assert "in none of its 3 starts was there time for an update" in told(2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert "has requeued" in told(2)
    assert asked.read_text().count("requeue") == 2


def test_a_job_of_slurm_is_not_put_to_sleep_by_a_sigterm(slurm, send, train_tiny, tmp_path):
    """Lightning, where it requeues, lets a SIGTERM pass."""
    asked = slurm()
    send(signal.SIGTERM, batch=2)
    with pytest.raises(Stopped, match="SIGTERM: saved at step 2"):
        train_tiny(tmp_path / "run", "resume=auto")
    assert not asked.exists()
