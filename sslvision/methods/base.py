"""What every method is: views, losses, and what happens after an update. Lightning meets it here and nowhere else."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from sslvision.backbones.base import Backbone
from sslvision.data.batch import Batch
from sslvision.errors import Diverged, UsageError
from sslvision.nn.normalize import Normalize
from sslvision.nn.randomness import ImageRandom
from sslvision.optim.groups import decay_groups
from sslvision.views.geometry import Crop


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
        self.latest, self.logged = {}, {}
        self._sums: dict[str, Tensor] = {}
        self._summed = 0

    # What a method is.

    @abstractmethod
    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return all a step sees: augmented images, masks. All randomness of the images is here, drawn from `rng`."""

    @abstractmethod
    def losses(self, views: list[Tensor], clock: Clock) -> dict[str, Tensor]:
        """Return "loss", which is minimised, and whatever else is worth logging. A pure function of the weights."""

    @abstractmethod
    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return "lr" and "weight_decay" of the update at `clock`."""

    @abstractmethod
    def pretrained(self) -> Backbone:
        """Return the backbone that stage two uses."""

    def before_update(self, clock: Clock) -> None:
        """Do what is due between the gradients and the update, such as clipping. Called once per update."""

    def after_update(self, clock: Clock) -> None:
        """Do what follows an optimizer update, such as moving a teacher. Called once per update."""

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
        """Return the loss of one batch."""
        with torch.autocast(self.device.type, enabled=False):
            views = self.views(batch, ImageRandom(self.seed, batch.epoch, batch.places))
        metrics = self.losses(views, self.clock)
        self.latest = {name: value.detach() for name, value in metrics.items()}
        for name, value in self.latest.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._summed += 1
        return metrics["loss"]

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
        """Give the method its gradients, summed over micro-batches and averaged over processes."""
        self.before_update(self.clock)

    def _write_log(self, clock: Clock, rates: dict[str, float]) -> None:
        """Write the means since the last time, over all processes: the one place where a step waits for the device."""
        means = torch.stack(list(self._sums.values())) / self._summed
        values = self.trainer.strategy.reduce(means, reduce_op="mean").tolist()
        metrics = dict(zip(self._sums, values, strict=True)) | rates
        self._sums, self._summed = {}, 0
        if not math.isfinite(metrics["loss"]):
            raise Diverged(
                f"The loss is {metrics['loss']} around step {clock.step + 1}: training has diverged. Lower the learning "
                f"rate (it is {rates['lr']:.3g} now), lengthen the warm-up, or set trainer.gradient_clip_val=1."
            )
        self.logged = metrics
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": (clock.step + 1) / clock.steps_per_epoch}, step=clock.step + 1)
