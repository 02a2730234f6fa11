"""The host waits for the GPU in no step, once the first ones are made: CUDA says so itself (set_sync_debug_mode)."""

import warnings

import pytest
import pytorch_lightning as L
import torch
from small_methods import CLOCK, PAIRS, batch_for, small, views_of

from sslvision.methods.base import Method
from sslvision.workflows import pretraining

pytestmark = pytest.mark.gpu

WARM_UP = 3  # steps in which kernels are chosen and tables are made


def set_waits(how):
    """Make every wait an "error", or not ("default")."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(how)


@pytest.fixture(autouse=True)
def may_wait_afterwards(cuda):
    yield
    set_waits("default")


@pytest.mark.parametrize(("kind", "backbone"), PAIRS)
def test_a_step_from_bytes_to_the_update_waits_for_nothing(cuda, kind, backbone):
    method = small(kind, backbone, drop_path=0.1 if backbone != "dense" else 0.0).to(cuda)
    optimizer, batch = method.configure_optimizers(), batch_for(method, cuda)
    for number in range(WARM_UP + 2):
        set_waits("error" if number >= WARM_UP else "default")
        torch.cuda.manual_seed(number)
        views = views_of(method, batch)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = method.losses(views, CLOCK)["loss"]
        (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
        method.prepare_update(optimizer, CLOCK)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(CLOCK)


class Strict(L.Callback):
    """From the start of a batch to the end of its update every wait is an error."""

    steps = 0

    def on_train_start(self, trainer, *_):
        trainer.fit_loop.epoch_loop.max_steps = 12

    def on_train_batch_start(self, *_):
        self.steps += 1
        set_waits("error" if self.steps > WARM_UP else "default")

    def on_train_batch_end(self, *_):
        set_waits("default")

    def on_exception(self, *_):
        set_waits("default")


@pytest.mark.filterwarnings("default")  # of inductor
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize(("method", "compiled"), [("mae", False), ("dino", False), ("mae", True)])
def test_no_step_of_a_run_waits(run_tiny, tmp_path, monkeypatch, method, compiled):
    strict, watchers = Strict(), pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *about: [strict, *watchers(*about)])
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    monkeypatch.setattr(Method, "_write_log", lambda *_: None)  # the last update writes the log, and waits
    words = ["batch_size=64", "epochs=1", "knn_every_epochs=0", "trainer.accelerator=cuda", "backbone.depth=2"]
    words += ["trainer.log_every_n_steps=1000", f"compile={compiled}".lower()]
    run_tiny(tmp_path / "run", *words, recipe=method)
    assert strict.steps == 12
