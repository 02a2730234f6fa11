"""The loop that runs a method: Lightning's steps and updates, the log, CUDA graphs, and what a checkpoint has besides weights.

`base.Method` derives from `LightningLoop` and documents the hooks that the loop calls. Authors of methods read base.py.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import pytorch_lightning as L
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom, derive_seed
from sslvision.backbones.backbone import Backbone
from sslvision.data.batch import Batch, whole_images
from sslvision.data.loader import cut_crops
from sslvision.errors import UsageError
from sslvision.methods.clock import Clock
from sslvision.methods.rebuild import describe_method
from sslvision.nn.cuda_graphs import CapturedStep
from sslvision.nn.normalize import Normalize
from sslvision.nn.shards import local_shards, shard_module, through_block, whole_tensor
from sslvision.optim.nonfinite import skip_nonfinite
from sslvision.optim.param_groups import apply_schedule, check_groups


class LightningLoop(L.LightningModule):
    """The LightningModule that every method is.

    Args:
        seed: Seed for the randomness of images, dropout and drop-path.
        freeze_backbone_epochs: Epochs in which the backbone is not updated. See Method.

    Attributes:
        latest: Metrics of the last step, on the device.
        logged: Metrics that were written last: means since the previous time, over all processes.
        losses_logged: Losses of the single updates in `logged`.
        skipped: Updates that were skipped because their gradients were not finite; known when the log is written.
        captures: Whether steps become CUDA graphs. See `capture_steps`.
    """

    latest: dict[str, Tensor]
    logged: dict[str, float]
    losses_logged: list[float]
    skipped: list[int]
    captures: bool = False

    # The hooks, see base.Method.
    views: Callable[[Batch, ImageRandom], list[Tensor]]
    losses: Callable[[list[Tensor], Clock | None], dict[str, Tensor]]
    schedule: Callable[[Clock], dict[str, float]]
    optimizer: Callable[[], Optimizer]
    before_update: Callable[[Clock, list[Tensor], Sequence[Tensor]], None]
    after_update: Callable[[Clock], None]
    set_clock: Callable[[Clock], None]
    pretrained: Callable[[], Backbone]
    sharded_modules: Callable[[], list[nn.Module]]
    block_functions: tuple[str, ...]
    crops: tuple[Crop, ...]
    normalize: Normalize

    def __init__(self, *, seed: int, freeze_backbone_epochs: float = 0.0):
        super().__init__()
        self.seed, self.freeze_backbone_epochs = seed, freeze_backbone_epochs
        self.latest, self.logged, self.losses_logged, self.skipped = {}, {}, [], []
        self._captured: CapturedStep | None = None
        self._whole: list[Any] = []  # under sharding, a copy for evaluation; in a list, so that it is no submodule
        self._micro_batches: list[Tensor] = []  # metrics (M,) of the micro-batches of the coming update
        self._epoch: Tensor | None = None  # sums of the same over the finite updates of the epoch, and their number
        self._updates: list[Tensor] = []  # metrics and gradient norm (M + 1,) of each update since the log was written

    @property
    def clock(self) -> Clock:
        """Return the Trainer's time."""
        trainer = self.trainer
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        return Clock(trainer.global_step, int(trainer.estimated_stepping_batches), steps_per_epoch)

    # Batches of a DataLoader that is not ours.

    def batch_of(self, batch: Any) -> Batch:
        """Cut the method's crops from images of any DataLoader: (B, C, H, W) uint8, or floats in 0..1; labels are ignored.

        Raises:
            UsageError: The batch has no such images.
        """
        trainer = self.trainer
        micro_batch = trainer.global_step * trainer.accumulate_grad_batches + len(self._micro_batches)
        number = micro_batch * trainer.world_size + trainer.global_rank
        images = whole_images(batch, channels=len(self.normalize.mean.flatten()))
        indices = number * (1 << 20) + torch.arange(
            len(images), device=images.device
        )  # its random numbers follow from these
        epoch = torch.full_like(indices, trainer.current_epoch)
        return cut_crops(Batch([images], indices, epoch, [], indices), self.crops, self.seed)

    # A step: the loss of one micro-batch.

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one batch: a Batch, or what `batch_of` makes one of."""
        batch = batch if isinstance(batch, Batch) else self.batch_of(batch)
        clock = self.clock
        inputs = [*batch.crops, batch.indices, batch.epoch, batch.shown]
        if self.captures and self._captured is None:
            self._captured = CapturedStep(self._step_of, self, inputs)
        self._seed_device(clock)
        if self._captured is not None and self._captured.fits(inputs):
            self.set_clock(clock)
            if self._micro_batches:  # the gradients of the update's previous micro-batch are in the graph's memory
                self._captured.keep_gradients()
            metrics = self._captured(*inputs)
        else:
            metrics = self._step(batch, clock)
        loss = metrics["loss"]
        self.latest = {name: value.detach() for name, value in metrics.items()}
        self._micro_batches.append(torch.stack([value.to(loss.dtype) for value in self.latest.values()]))  # (M,)
        # An infinite loss can have finite gradients, and processes share only gradients: make them NaN.
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _seed_device(self, clock: Clock) -> None:
        """Seed dropout and drop-path by seed, update, process and micro-batch."""
        seed = derive_seed(self.seed, clock.step, self.trainer.global_rank, len(self._micro_batches))
        torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow where there is no GPU
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def _step(self, batch: Batch, clock: Clock | None) -> dict[str, Tensor]:
        """Return the metrics of a batch."""
        with torch.autocast(self.device.type, enabled=False):
            views = self.views(batch, ImageRandom(self.seed, batch.epoch, batch.indices))
        return self.losses(views, clock)

    def capture_steps(self) -> None:
        """Capture views and losses as CUDA graphs in the first step, see nn/cuda_graphs.py. Call after `compile_blocks`."""
        self.captures = True

    def _step_of(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Return the metrics of a batch given as its tensors, at the time of `set_clock`."""
        *crops, indices, epoch, shown = inputs
        return self._step(Batch(crops, indices, epoch, [], shown), None)

    def on_fit_end(self) -> None:
        """Free the memory of CUDA graphs: evaluation does not use them."""
        self._captured = None

    # Weights in shards.

    def configure_model(self) -> None:
        """Shard all weights if the trainer's strategy has a mesh of devices for it, as trainer.strategy=fsdp2 has."""
        mesh = self.device_mesh
        if mesh is None or self._whole:
            return
        from torch.distributed.device_mesh import init_device_mesh

        # The copy has no weights but while they are gathered: see whole.
        without = {id(one): nn.Parameter(one.to("meta"), one.requires_grad) for one in self.parameters()}
        self._whole = [copy.deepcopy(self, {id(self.trainer): None, id(mesh): None, **without})]
        for module in self.modules():
            for name in getattr(module, "block_functions", ()):
                setattr(module, name, through_block(getattr(module, name)))
        # A mesh of one dimension takes the group of all processes, and so its timeout.
        processes = init_device_mesh(mesh.device_type, (self.trainer.world_size,))
        low = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
        shard_module(self, self.sharded_modules(), processes, forwards=["training_step"], compute=low)

    def on_fit_start(self) -> None:
        """Refuse FSDP 1, under which a trainer of one's own would train something else."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise UsageError(
                "FSDPStrategy flattens parameters, so that weight decay spares all of them: use sslvision's strategy fsdp2 "
                "(sslvision.training.sharding.FSDP2), or DDP."
            )

    @contextmanager
    def whole(self) -> Iterator[Self]:
        """Yield the method with whole weights in this process, for evaluation: under sharding a copy, which all have to gather.

        All processes have to enter; what they do inside is theirs.
        """
        if not self._whole:
            yield self
            return
        (whole,) = self._whole
        with torch.no_grad():
            weights = {name: whole_tensor(tensor).clone() for name, tensor in self.state_dict().items()}
        whole.load_state_dict(weights, assign=True)
        try:
            yield whole.to(self.device)
        finally:
            whole.load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()}, assign=True)

    # An update: one optimizer step.

    def configure_optimizers(self) -> Optimizer:
        """Build the method's optimizer and check its parameter groups."""
        optimizer = self.optimizer()
        check_groups(optimizer)
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            # True means that the optimizer unscales fp16 gradients itself; Lightning then refuses to clip, in bf16 too.
            optimizer._step_supports_amp_scaling = False
        return optimizer

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Apply the schedule, update, run `after_update`, and write the log when it is due."""
        clock = self.clock
        rates = self.schedule(clock)
        apply_schedule(optimizer.param_groups, rates)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Here, not in on_train_batch_end: ModelCheckpoint saves before that, and a resumed run would lack one call.
        self.after_update(clock)
        done = clock.step + 1
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by Lightning's logger connector
        if done % every == 0 or done == clock.steps:
            self._write_log(clock, rates)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Prepare the update with the gradients of the global batch, and keep its metrics for the log."""
        norm = self.prepare_update(optimizer, self.clock)
        if self.trainer.precision == "16-mixed":  # its scaler searches a scale by skipping updates: no reason for alarm
            norm = norm.nan_to_num(0.0, 0.0)
        metrics = torch.stack(self._micro_batches).mean(dim=0)  # (M,)
        self._updates.append(torch.cat([metrics, norm[None]]))  # (M + 1,)
        counted = torch.cat([self._updates[-1], torch.ones_like(norm[None])])  # (M + 2,)
        counted = torch.where(counted.isfinite().all(), counted, 0.0)
        self._epoch = counted if self._epoch is None else self._epoch.to(counted.device) + counted
        self._micro_batches = []

    def prepare_update(self, optimizer: Optimizer, clock: Clock) -> Tensor:
        """Skip the update if a gradient is not finite, and run `before_update`. Return the norm of all gradients."""
        if clock.epoch < self.freeze_backbone_epochs:  # without a gradient, a parameter is neither updated nor decayed
            for module in self.modules():
                if isinstance(module, Backbone):
                    module.zero_grad(set_to_none=True)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm, norms = skip_nonfinite(optimizer, gradients)
        self.before_update(clock, local_shards(gradients), norms)
        return norm

    # The log.

    def _write_log(self, clock: Clock, rates: dict[str, float]) -> None:
        """Write the means since the last time, over all processes. Nothing else in a step waits for the device."""
        done, (columns, finite) = clock.step + 1, self._columns()
        self._updates = []
        self.skipped += [done - len(finite) + 1 + index for index, good in enumerate(finite) if not good]
        if not any(finite):
            return
        columns = {name: list(itertools.compress(column, finite)) for name, column in columns.items()}
        self.losses_logged = columns["loss"]
        self.logged = {name: sum(column) / len(column) for name, column in columns.items()} | rates
        for logger in self.loggers:
            logger.log_metrics({**self.logged, "epoch": done / clock.steps_per_epoch}, step=done)

    def _columns(self) -> tuple[dict[str, list[float]], list[bool]]:
        """Return the metrics of each update since the log was written, over all processes, and whether it was finite."""
        if not self._updates:
            return {}, []
        updates = torch.stack([update.to(self.device) for update in self._updates])  # (n, M + 1)
        means = self.trainer.strategy.reduce(updates, reduce_op="mean")
        assert isinstance(means, Tensor)
        columns = dict(zip([*self.latest, "grad_norm"], means.T.tolist(), strict=True))
        finite = [math.isfinite(loss + norm) for loss, norm in zip(columns["loss"], columns["grad_norm"], strict=True)]
        return columns, finite

    def on_train_epoch_end(self) -> None:
        """Give callbacks such as ModelCheckpoint(monitor="loss") the means of the epoch, in `trainer.callback_metrics`."""
        if self._epoch is None:
            return
        sums = self.trainer.strategy.reduce(self._epoch.to(self.device), reduce_op="mean")
        assert isinstance(sums, Tensor)
        self._epoch = None
        means = (sums[:-1] / sums[-1]).unbind()  # on the device: who monitors none waits for none
        self.trainer.callback_metrics.update(zip([*self.latest, "grad_norm"], means, strict=True))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the metrics that are not yet in the log, so that a resumed run writes the same log.

        `good` is False if the last update was skipped: weights that give no finite gradients may be useless though finite.
        """
        columns, finite = self._columns()
        updates = [list(update) for update in zip(*columns.values(), strict=True)]
        good = finite[-1] if finite else self.trainer.global_step not in self.skipped
        epoch = None if self._epoch is None else self._epoch.tolist()
        checkpoint["log"] = {"updates": updates, "skipped": list(self.skipped), "good": good, "epoch": epoch}
        describe_method(checkpoint, getattr(self, "unsharded_class", type(self)), self.pretrained())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the metrics that are not yet in the log."""
        self._updates = [torch.tensor(update) for update in checkpoint["log"]["updates"]]
        self.skipped = list(checkpoint["log"]["skipped"])
        epoch = checkpoint["log"].get("epoch")
        self._epoch = None if epoch is None else torch.tensor(epoch)
