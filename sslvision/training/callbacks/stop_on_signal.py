"""Signals: training saves its state at the next optimizer update and ends; a resumed run continues exactly from there.

    SIGTERM, SIGINT, SIGHUP   save, exit 143, 130, 129
    SIGUSR1 under SLURM       save, requeue the job, exit 143

Outside of training there is nothing to save, and the command ends at once (system/signals.py).
"""

import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.trainer.states import TrainerFn

from sslvision.errors import Stopped
from sslvision.system.resuming import command_to_resume
from sslvision.system.signals import NOT_REQUEUED, SAME_REQUEST_S, handled_signals, of_requeueing, requeue

ASK_EVERY_S = 1.0  # how often processes ask one another for signals, about
WARM, TIMED, MOST = 5, 20, 1000  # updates that are not timed, and that are; most between two questions


class StopOnSignal(Checkpoint):
    """Save at the first optimizer update after a signal, never between accumulated micro-batches, and stop.

    A validation or the end of an epoch due at that update is completed first, because a resumed run would skip it. A second
    signal of the same kind, seconds after the first, ends the run at once, without saving.

    A signal may reach all processes or one of them. They agree on it by an all-reduce of one number in a separate gloo
    group, so that no host waits for its device: after every update at first, and once a second as soon as they know, all of
    them, how many updates that is. It replaces Lightning's handling, which synchronizes with the device in every batch and
    saves nothing.

    (A `Checkpoint` is called after all other callbacks.)

    Args:
        checkpoint: Where to save.
        folder: The run folder.
        requeues: Whether the same command line, started again by SLURM, resumes from the checkpoint.
        timeout: Seconds that a process waits for the others.

    Raises:
        Stopped: In all processes, at the same update.
    """

    def __init__(self, checkpoint: Path, folder: Path, *, requeues: bool = False, timeout: int = 1800):
        self.checkpoint, self.folder, self.requeues = checkpoint, folder, requeues
        self.timeout = timedelta(seconds=timeout)
        self._received, self._received_at, self._step = 0, 0.0, 0
        self._updates, self._every, self._timed_from = 0, 1, 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._group: dist.ProcessGroup | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disable Lightning's signal handling: under SLURM it saves in mid-update, otherwise it exits with 0."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle signals until the end of training."""
        self._received, self._step, self._process = 0, trainer.global_step, os.getpid()
        self._updates, self._every = 0, 1  # updates since then, and between two questions
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)  # type: ignore[assignment]  # of all processes
            # https://github.com/Lightning-AI/pytorch-lightning/issues/21487
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._receive) for signum in handled_signals()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if this batch completed an update and a signal was received."""
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            if not self._asks():
                return
            epoch = trainer.fit_loop.epoch_loop
            assert trainer.fit_loop._data_fetcher is not None
            more_is_due = trainer.is_last_batch or epoch._should_check_val_fx(trainer.fit_loop._data_fetcher)
            self._stop_if_asked(trainer, now=not more_is_due)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop after a validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop after what happens at the end of an epoch."""
        self._stop_if_asked(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore the signal handlers."""
        self._restore()
        self._end_group()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the signal handlers, and raise a signal that came too late again."""
        self._restore()
        self._end_group()
        if self._received:
            signal.raise_signal(self._received)

    def _receive(self, signum: int, frame: Any) -> None:
        """Record the signal; the current step is finished first."""
        if os.getpid() != self._process or of_requeueing(signum):  # a loader's process, forked with this handler
            return
        if self._received == signum and time.monotonic() - self._received_at > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(signum)
        elif self._received != signum:
            self._received, self._received_at = signum, time.monotonic()

    def _asks(self) -> bool:
        """Return whether the processes ask one another after this update; they agree on that."""
        self._updates += 1
        if self._updates == WARM:
            self._timed_from = time.monotonic()
        if self._group is not None and self._updates == WARM + TIMED:
            each = torch.tensor((time.monotonic() - self._timed_from) / TIMED)
            dist.all_reduce(each, op=dist.ReduceOp.MAX, group=self._group)
            self._every = max(1, min(MOST, int(ASK_EVERY_S / max(float(each), 1e-6))))
        return self._group is None or self._updates % self._every == 0

    def _stop_if_asked(self, trainer: L.Trainer, *, now: bool = True) -> None:
        signum = self._received
        if self._group is not None:
            asked = torch.tensor(signum)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
            signum = int(asked)
        if not signum:
            return
        trainer.save_checkpoint(self.checkpoint)
        if not now:
            return
        name, step = signal.Signals(signum).name, trainer.global_step
        if name == "SIGUSR1":
            signum = signal.SIGTERM
            outcome = self._requeue(trainer) if self.requeues else NOT_REQUEUED
            raise Stopped(f"{name}: saved at step {step:,} in {self.checkpoint}. {outcome}", signum)
        raise Stopped(
            f"{name}: saved at step {step:,} in {self.checkpoint}; resume with: {command_to_resume(self.folder)}",
            signum,
        )

    def _requeue(self, trainer: L.Trainer) -> str:
        """Have the first process requeue the job, and the others wait for it: srun ends the job when one of them has ended."""
        outcome = requeue() if trainer.is_global_zero else ""
        if self._group is not None:
            dist.barrier(group=self._group)
        return outcome

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _end_group(self) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None
