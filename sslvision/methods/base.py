"""What every method is: views, losses, and what happens after an update. Lightning meets it here and nowhere else."""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom, number
from sslvision.backbones.backbone import Backbone
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.nn.compilation import compiled
from sslvision.nn.cuda_graphs import CapturedStep
from sslvision.nn.normalize import Normalize
from sslvision.optim.groups import decay_groups
from sslvision.optim.nonfinite import skip_nonfinite


@dataclass(frozen=True)
class Clock:
    """Time in optimizer updates, the only time a method sees.

    Attributes:
        step: updates done.
        steps: updates of the whole run.
        steps_per_epoch: updates in one pass over the data.
    """

    step: int
    steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Return passes over the data so far, with fractions."""
        return self.step / self.steps_per_epoch

    @property
    def epochs(self) -> float:
        """Return passes over the data in the whole run."""
        return self.steps / self.steps_per_epoch


class Method(L.LightningModule):
    """A self-supervised method: `views`, `losses`, `schedule`, `pretrained`, and `after_update` where it has a teacher.

    Args:
        crops: what the loader cuts from each image.
        mean, std: per channel, on the scale 0..1.
        betas: of AdamW.
        seed: of all randomness of the images.

    Raises:
        UsageError: betas out of range.
    """

    latest: dict[str, Tensor]  # the last step's metrics, on the device
    logged: dict[str, float]  # the last written ones: means since the time before, over all processes
    losses_logged: list[float]  # those of the single updates in `logged`
    skipped: list[int]  # updates that were left out, as their gradients were not finite; known when the log is written
    compilable: tuple[str, ...] = ()  # functions of views and loss, attributes, that many small operations make
    capturable: bool = False  # whether `views` and `losses` can be a CUDA graph, see `set_clock`; not inherited
    captures: bool = False  # whether they become one in the first step, see `capture_steps`
    shown: Mapping[str, str] = {"loss": "loss"}  # those the progress bar shows, and what it calls them

    def __init__(
        self,
        *,
        crops: Sequence[Crop],
        mean: Sequence[float],
        std: Sequence[float],
        betas: tuple[float, float],
        seed: int,
    ):
        super().__init__()
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"betas={list(betas)} must be two numbers from 0 to less than 1.")
        self.crops = tuple(crops)
        self.normalize = Normalize(mean, std)
        self.betas = betas
        self.seed = seed
        self.latest, self.logged, self.losses_logged, self.skipped = {}, {}, [], []
        self._captured: CapturedStep | None = None
        self._micro_batches: list[Tensor] = []  # of the update that is due: metrics (M,)
        self._updates: list[Tensor] = []  # since the log was written: metrics (M,) and the gradients' norm, (M + 1,)

    # What a method is.

    @abstractmethod
    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return all a step sees: augmented images, masks. All randomness of the images is here, drawn from `rng`."""

    @abstractmethod
    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return "loss", which is minimized, and whatever else is worth logging, all scalars.

        A pure function of weights, buffers, views and time. In a CUDA graph (`capturable`), `clock` is None: Python runs once,
        at the capture, so what depends on time is in buffers that `set_clock` has written.
        """

    def set_clock(self, clock: Clock) -> None:
        """Write to buffers what `losses` needs to know of the time; where steps are CUDA graphs, called before each."""

    @abstractmethod
    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return "lr" and "weight_decay" of the update at `clock`."""

    @abstractmethod
    def pretrained(self) -> Backbone:
        """Return the backbone that stage two uses."""

    def before_update(self, clock: Clock, gradients: list[Tensor], norms: Sequence[Tensor]) -> None:
        """Do what is due between the gradients and the update, such as clipping. Called once per update.

        Args:
            clock: of the update.
            gradients: all there are, to be changed in place.
            norms: of each of them, scalars on the device.
        """

    def after_update(self, clock: Clock) -> None:
        """Do what follows an optimizer update, such as moving a teacher. Called once per update."""

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again there: the same numbers, slower.

        Raises:
            UsageError: the backbone cannot.
        """
        for module in self.modules():
            if isinstance(module, Backbone) and any(parameter.requires_grad for parameter in module.parameters()):
                module.enable_activation_checkpointing()

    def compile_blocks(self) -> None:
        """Have blocks and `compilable` functions compiled when they first run. Before DDP wraps the method."""
        for module in self.modules():
            if isinstance(module, Backbone):
                module.compile_blocks()
        for name in self.compilable:
            setattr(self, name, compiled(getattr(self, name)))

    def capture_steps(self) -> None:
        """Have views and losses captured as CUDA graphs in the first step, see nn/cuda_graphs.py. After `compile_blocks`."""
        self.captures = True

    def diagnose(self, means: Mapping[str, float], clock: Clock) -> dict[str, str]:
        """Return the faults that the logged metrics show, each with what it means, its causes and what to change."""
        return {}

    def pictures(self, images: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
        """Return what the method makes of uint8 images (N, C, S, S): by picture, columns of (heading, images in 0..1)."""
        return {}

    def describe(self) -> dict[str, str]:
        """Return the method's own rows of the effective configuration."""
        return {}

    # How Lightning runs it.

    def configure_optimizers(self) -> Optimizer:
        """Build AdamW; `schedule` sets learning rate and weight decay before every update."""
        optimizer = AdamW(decay_groups(self), lr=0.0, betas=self.betas, fused=True)
        # True says that the optimizer unscales fp16 gradients itself, and Lightning then refuses to clip, in bf16 too.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    @property
    def clock(self) -> Clock:
        """Return the trainer's time."""
        trainer = self.trainer
        steps = int(trainer.estimated_stepping_batches)
        return Clock(
            trainer.global_step, steps, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch. Dropout and drop-path draw from (seed, update, process, accumulated batch)."""
        clock = self.clock
        inputs = [*batch.crops, batch.indices, batch.epoch, batch.shown]
        if self.captures and self._captured is None:
            self._captured = CapturedStep(self._step_of, self, inputs)
        seed = number(self.seed, clock.step, self.trainer.global_rank, len(self._micro_batches))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow where there is no GPU
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        if self._captured is not None and self._captured.fits(inputs):
            self.set_clock(clock)
            if self._micro_batches:  # not the first of its update, whose predecessor's gradients may be written over
                self._captured.keep_gradients()
            metrics = self._captured(*inputs)
        else:
            metrics = self._step(batch, clock)
        loss = metrics["loss"]
        self.latest = {name: value.detach() for name, value in metrics.items()}
        self._micro_batches.append(torch.stack([value.to(loss.dtype) for value in self.latest.values()]))  # (M,)
        # An infinite loss may have finite gradients, and only these are shared by all processes: NaN they shall be.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _step(self, batch: Batch, clock: Clock | None) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, enabled=False):
            views = self.views(batch, ImageRandom(self.seed, batch.epoch, batch.indices))
        return self.losses(views, clock)

    def _step_of(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the losses of a batch given as its tensors; the clock is that of `set_clock`."""
        *crops, indices, epoch, shown = inputs
        return self._step(Batch(crops, indices, epoch, [], shown), None)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the rates of this update, make it, let the method follow, and now and then write the log."""
        clock = self.clock
        rates = self.schedule(clock)
        for group in optimizer.param_groups:
            group["lr"] = rates["lr"] * group.get("lr_scale", 1.0)
            if group["decayed"]:
                group["weight_decay"] = rates["weight_decay"]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_update(clock)
        done = clock.step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        if done % every == 0 or done == clock.steps:
            self._write_log(clock, rates)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Look at the gradients of the global batch, before the update, and keep their norm for the log."""
        norm = self.ready(optimizer, self.clock)
        if self.trainer.precision == "16-mixed":  # its scaler finds a scale by leaving updates out: no cause for alarm
            norm = norm.nan_to_num(0.0, 0.0)
        metrics = torch.stack(self._micro_batches).mean(dim=0)  # (M,)
        self._updates.append(torch.cat([metrics, norm[None]]))  # (M + 1,)
        self._micro_batches = []

    def ready(self, optimizer: Optimizer, clock: Clock) -> Tensor:
        """Do all that is due between the gradients and the update. Return the norm of all gradients, a scalar on the device."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm, norms = skip_nonfinite(optimizer, gradients)
        self.before_update(clock, gradients, norms)
        return norm

    def _write_log(self, clock: Clock, rates: dict[str, float]) -> None:
        """Write the means since the last time, over all processes: the one place where a step waits for the device."""
        done, (columns, finite) = clock.step + 1, self._columns()
        self._updates = []
        self.skipped += [done - len(finite) + 1 + place for place, good in enumerate(finite) if not good]
        if not any(finite):
            return
        columns = {name: list(itertools.compress(column, finite)) for name, column in columns.items()}
        self.losses_logged = columns["loss"]
        self.logged = {name: sum(column) / len(column) for name, column in columns.items()} | rates
        for logger in self.loggers:
            logger.log_metrics({**self.logged, "epoch": done / clock.steps_per_epoch}, step=done)

    def _columns(self) -> tuple[dict[str, list[float]], list[bool]]:
        """Return the metrics of the updates since the log was written, means over all processes, and which were made."""
        if not self._updates:
            return {}, []
        updates = torch.stack([update.to(self.device) for update in self._updates])  # (n, M + 1)
        means = self.trainer.strategy.reduce(updates, reduce_op="mean")
        assert isinstance(means, Tensor)
        columns = dict(zip([*self.latest, "grad_norm"], means.T.tolist(), strict=True))
        made = [math.isfinite(loss + norm) for loss, norm in zip(columns["loss"], columns["grad_norm"], strict=True)]
        return columns, made

    def on_fit_end(self) -> None:
        """Give back the memory of CUDA graphs: what follows is evaluated without them."""
        self._captured = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the next line of the log will be made of, so that a resumed run writes the same one.

        `good` says whether the last update was made: weights that give no finite gradients may be spoilt, though finite.
        """
        columns, made = self._columns()
        updates = [list(update) for update in zip(*columns.values(), strict=True)]
        good = made[-1] if made else self.trainer.global_step not in self.skipped
        checkpoint["log"] = {"updates": updates, "skipped": list(self.skipped), "good": good}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        self._updates = [torch.tensor(update) for update in checkpoint["log"]["updates"]]
        self.skipped = list(checkpoint["log"]["skipped"])
