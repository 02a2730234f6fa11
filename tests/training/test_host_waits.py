"""Between two lines of the log no step asks the device for a number, so the host runs ahead and a GPU never starves for it.

On a CPU nothing waits, so here every question is counted that would make the host wait for a GPU: scalars and lists read
off tensors, shapes that depend on values, and numbers sent to the device. Real training, Lightning and all callbacks in it.
On a GPU CUDA says so itself: tests/gpu/test_no_waits.py.
"""

import traceback
from types import SimpleNamespace

import pytest
import pytorch_lightning as L
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslvision.backbones import swin
from sslvision.training.callbacks.stop_on_signal import StopOnSignal
from sslvision.workflows import finetuning, pretraining

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
COPIES = {"tolist", "cpu", "numpy", "__array__", "tensor", "as_tensor", "from_numpy"}
# Where the host may wait, and why.
MAY = {
    "_write_log": "writes the log, every so many updates",
    "_show": "shows the last metrics, at most once a second",
    "_get_iterator": "begins an epoch: the loader is on the host",
    "save_checkpoint": "writes a checkpoint",
    "_next_index": "asks the sampler for the next images, which is on the host",
    "_next_data": "reads images, which are on the host",
}


class Watch(TorchDispatchMode):
    """Note where tensors are asked for numbers, while `on`."""

    def __init__(self):
        super().__init__()
        self.on, self.found, self.steps, self.copies = False, [], 0, Copies(self)

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def note(self, what):
        frames = traceback.extract_stack()
        if not any(frame.name in MAY for frame in frames):
            ours = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames if __file__ != frame.filename]
            self.found.append(f"{what} in {' < '.join(ours[:-5:-1])}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.on:
            name = func.overloadpacket.__name__
            indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
            if name in READS or any(place is not None and place.dtype == torch.bool for place in indices):
                self.note(name)
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.watch.on and getattr(func, "__name__", "") in COPIES:
            self.watch.note(func.__name__)
        return func(*args, **(kwargs or {}))


class From(L.Callback):
    """Watch from the second update to the last, the eighth."""

    def __init__(self, watch):
        self.watch = watch

    def on_train_start(self, trainer, *_):
        trainer.fit_loop.epoch_loop.max_steps = 8

    def on_train_batch_start(self, trainer, *_):
        self.watch.on = trainer.global_step > 0
        self.watch.steps += self.watch.on

    def on_train_end(self, *_):
        self.watch.on = False


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: list(range(3))[x.argmax()],
        lambda x: 1.0 if x.max() > 2 else 0.0,
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: torch.nn.utils.clip_grad_norm_([x], 1.0, error_if_nonfinite=True),
        lambda x: x + torch.tensor([1.0]),
    ],
)
def test_the_watch_sees_questions(ask):
    x = torch.tensor([0.0, 1.0])
    x.grad = x.clone()
    with Watch() as watch:
        ask(x)
        assert not watch.found
        watch.on = True
        ask(x)
        watch.on = False
    assert watch.found


def test_the_watch_sees_nothing_in_arithmetic():
    x = torch.ones(3, requires_grad=True)
    with Watch() as watch:
        watch.on = True
        torch.where(x > 0, x, 0.0)[torch.arange(2)].softmax(0).square().sum().backward()
        torch.optim.AdamW([x], fused=True).step()
        watch.on = False
    assert not watch.found


SMALL = [
    "data=digits",
    "batch_size=64",
    "epochs=1",
    "knn_every_epochs=0",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1000",
]
BACKBONES = {
    "": ["embed_dim=32", "depth=2", "num_heads=2", "patch_size=8"],
    "_swin": ["embed_dim=16", "depths=[2,2]", "num_heads=[2,4]", "patch_size=4", "image_size=32"],
}
METHODS = {
    "mae": ["decoder_embed_dim=16", "decoder_num_heads=2"],
    "dino": ["prototypes=64", "hidden=32", "bottleneck=16", "local_size=16"],
}
MORE = ["trainer.accumulate_grad_batches=2", "trainer.gradient_clip_val=1"]


@pytest.fixture
def watch(monkeypatch):
    """Watch training as on a GPU, and leave out what comes after it."""
    watch, watchers = Watch(), pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *about: [From(watch), *watchers(*about)])
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    cut = swin.build_windows
    # On a CPU the windows with tokens are counted, as it costs nothing there.
    monkeypatch.setattr(swin, "build_windows", lambda *about, count: cut(*about, count=False))
    return watch


@pytest.mark.parametrize("more", [[], pytest.param(MORE, marks=pytest.mark.thorough)], ids=["", "accumulated, clipped"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_pretraining_asks_the_device_nothing(watch, settings_of, tmp_path, method, backbone, more):
    words = [*SMALL, *METHODS[method], *(f"backbone.{word}" for word in BACKBONES[backbone]), *more]
    settings = settings_of("pretrain", f"recipe={method}{backbone}", *words)
    with watch:
        pretraining.pretrain(settings, tmp_path / "run")
    assert watch.steps == (14 if more else 7)
    assert not watch.found


def test_a_step_of_fine_tuning_asks_the_device_nothing(watch, settings_of, tiny_run, tmp_path, monkeypatch):
    few = ["labels_per_class=20", "epochs=1", "min_updates=10", "evaluations=1", "holdout=0", "head_first=false"]
    regular = ["mixup=0.8", "cutmix=1", "erase=0.5", "label_smoothing=0.1", "class_weights=balanced", "ema=0.9"]
    words = [*few, *regular, "scratch=false", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1000"]
    settings = settings_of("finetune", f"run={tiny_run}", *words)
    callbacks = finetuning.finetuning_callbacks
    monkeypatch.setattr(finetuning, "finetuning_callbacks", lambda *given: [From(watch), *callbacks(*given)])
    with watch:
        finetuning.finetune(settings, tmp_path / "run")
    assert watch.steps == 7
    assert not watch.found


def test_several_processes_agree_on_signals_without_asking_the_device(tmp_path):
    """Lightning would broadcast a tensor of the device in every batch, and read it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        told = SimpleNamespace(world_size=2, global_step=0, fit_loop=trainer.fit_loop, is_last_batch=False)
        stop = StopOnSignal(tmp_path / "last.ckpt", tmp_path)
        stop.on_train_start(told, None)
        with Watch() as watch:
            watch.on = True
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
            watch.on = False
        assert not watch.found
        stop.teardown(told, None, "fit")
    finally:
        dist.destroy_process_group()
