"""What the author of a method writes: `class MyMethod(Method)` with `views`, `losses`, `schedule` and `pretrained`.

Method derives from `lightning.LightningLoop`, the LightningModule that calls these hooks at the right time; a method needs
to override nothing of it. The remaining hooks below are optional, and do nothing unless they are overridden.

    batch of uint8 crops -> views -> losses -> backward -> before_update -> optimizer step -> after_update
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.optim import Optimizer

from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.clock import Clock
from sslvision.methods.lightning import LightningLoop
from sslvision.methods.rebuild import rebuild
from sslvision.nn.compilation import compile_module, compiled
from sslvision.nn.normalize import Normalize
from sslvision.optim.optimizers import build_optimizer, check_optimizer, has_option
from sslvision.optim.param_groups import decay_groups

__all__ = ["Clock", "Method"]


class Method(LightningLoop, ABC):
    """A self-supervised method.

    Args:
        crops: The crops that the loader cuts from each image; `views` gets a batch of each.
        mean, std: Pixel statistics per channel, on the scale 0..1; `self.normalize` applies them.
        betas: Momentum coefficients of AdamW, the default optimizer, and of others that have them.
        optimizer: Name of a timm optimizer (timm.optim.list_optimizers()), which `optimizer()` builds.
        optimizer_options: Its further arguments, such as momentum.
        freeze_backbone_epochs: Epochs, fractions allowed, in which heads and decoders alone are updated, for a backbone that
            starts from weights.
        seed: Seed for all randomness of the images.

    Raises:
        UsageError: betas are out of range.

    Attributes:
        shown: Names of the metrics in the progress bar, and their labels.
        compilable: Names of attributes that are functions of `views` or `losses` worth compiling. See `compile_blocks`.
        capturable: Whether `views` and `losses` can be captured as CUDA graphs: they never wait for the device, and depend
            on time only through the buffers that `set_clock` writes. Every class states this for itself; it is not inherited.
        block_functions: Names of attributes that are functions of a module of `sharded_modules`, which use its weights without
            calling its forward: f(block, ...).
    """

    shown: Mapping[str, str] = {"loss": "loss"}
    compilable: tuple[str, ...] = ()
    capturable: bool = False
    block_functions: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        crops: Sequence[Crop],
        mean: Sequence[float],
        std: Sequence[float],
        betas: tuple[float, float] = (0.9, 0.999),
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        freeze_backbone_epochs: float = 0.0,
        seed: int,
    ):
        super().__init__(seed=seed, freeze_backbone_epochs=freeze_backbone_epochs)
        if not all(0 <= beta < 1 for beta in betas):
            raise UsageError(f"betas={list(betas)} must be two numbers of at least 0 and less than 1.")
        self.crops = tuple(crops)
        self.normalize = Normalize(mean, std)
        self.betas, self.optimizer_name, self.optimizer_options = betas, optimizer, dict(optimizer_options or {})
        check_optimizer(optimizer, self.optimizer_options)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", *, strict: bool = True, **settings: Any
    ) -> Self:
        """Build the method of a checkpoint with its weights, as `MAE.load_from_checkpoint("outputs/a/checkpoints/last.ckpt")`.

        The checkpoint says how it was built if the method calls `save_hyperparameters`, as those here do, or a command wrote
        it; nothing in it is executed. A classifier without `labels` can classify, not train.

        Args:
            checkpoint_path: A checkpoint of a run, or of a Trainer of your own.
            map_location: Device of the result.
            strict: Whether names of weights must match exactly.
            settings: Arguments of the method that replace those of the checkpoint, such as `backbone` or `lr`.

        Raises:
            UsageError: It is damaged, of another method, or does not say how to build this one.
        """
        built: Self = rebuild(cls, checkpoint_path, strict=strict, **settings)
        return built.to(map_location)

    # Every method has these.

    @abstractmethod
    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return everything that a step sees: augmented images, masks.

        This runs on the training device, on a whole batch, in float32. All randomness is drawn from `rng`, so that it is a
        function of seed, epoch and image alone.
        """

    @abstractmethod
    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the "loss" to minimize and any other scalars to log.

        A pure function of weights, buffers, views and time. While a step is captured as a CUDA graph (see `capturable`),
        `clock` is None.
        """

    @abstractmethod
    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return the "lr" and the "weight_decay" of the update at `clock`. See `optimizer` for how they are applied."""

    @abstractmethod
    def pretrained(self) -> Backbone:
        """Return the backbone that is evaluated, exported and fine-tuned."""

    # The optimizer.

    def optimizer(self) -> Optimizer:
        """Return the optimizer, any of torch's or timm's: by default the one chosen by name, on `decay_groups(self)`.

        Before every update each of its parameter groups gets the values of `schedule`. These keys of a group change that:

            "lr_scale": Factor on the scheduled learning rate, as for layer-wise decay. Default 1.
            "constant_lr": True leaves the group's own "lr" as it is, as for SimSiam's predictor. Default False.
            "decayed": False leaves the group's own "weight_decay" as it is: 0 for biases and norms. Default True.

        `decay_groups` builds such groups. The learning rate given to the optimizer itself is never used.
        """
        options = {"betas": self.betas} if has_option(self.optimizer_name, "betas") else {}
        options |= self.optimizer_options
        return build_optimizer(self.optimizer_name, decay_groups(self), lr=0.0, options=options, module=self)

    # What happens around an update.

    def before_update(self, clock: Clock, gradients: list[Tensor], norms: Sequence[Tensor]) -> None:
        """Change the gradients before an update, for example clip them. Called once per update, not per micro-batch.

        Args:
            clock: Time of the update.
            gradients: All gradients there are, to be modified in place.
            norms: Norm of each gradient, as scalars on the device.
        """

    def after_update(self, clock: Clock) -> None:
        """Do what follows an optimizer update, such as moving an EMA teacher. Called once per update."""

    def set_clock(self, clock: Clock) -> None:
        """Write to buffers what `losses` needs to know of the time. Called before each captured step."""

    # What is shown to the user.

    def diagnose(self, means: Mapping[str, float], clock: Clock) -> dict[str, str]:
        """Return the faults that the logged metrics show: by name, what each one means, its likely causes and remedies."""
        return {}

    def pictures(self, images: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
        """Return figures of uint8 images (N, C, H, W): by file name, columns of (heading, images in 0..1)."""
        return {}

    def describe(self) -> dict[str, str]:
        """Return the method's rows of the configuration that is printed before training."""
        return {}

    def remarks(self) -> list[str]:
        """Return in sentences which settings do not go together; they are printed before training."""
        return []

    # How steps are executed. Nothing here changes what is computed.

    def enable_activation_checkpointing(self) -> None:
        """Recompute the activations of the trained backbones in the backward pass instead of keeping them.

        Raises:
            UsageError: The backbone does not support it.
        """
        for module in self.modules():
            if isinstance(module, Backbone) and any(parameter.requires_grad for parameter in module.parameters()):
                module.enable_activation_checkpointing()

    def compilable_modules(self) -> list[nn.Module]:
        """Return the modules, besides backbones, that `compile_blocks` compiles, each one as a whole.

        By default the outermost modules with parameters that contain no backbone: heads, predictors, and a teacher's.
        """
        return _heads(self)

    def sharded_modules(self) -> list[nn.Module]:
        """Return the modules whose weights are gathered one module at a time under trainer.strategy=fsdp2.

        By default the blocks of backbones and `compilable_modules`. All other weights are gathered for the whole step. A
        module of this list is used by calling it, or through `block_functions`.
        """
        backbones = [module for module in self.modules() if isinstance(module, Backbone)]
        return [*(block for backbone in backbones for block in backbone.blocks()), *self.compilable_modules()]

    def compile_blocks(self) -> None:
        """Compile backbones, `compilable_modules` and `compilable` functions on their first call. Call before DDP wraps."""
        for module in self.modules():
            if isinstance(module, Backbone):
                module.compile_blocks()
        for module in self.compilable_modules():
            compile_module(module)
        for name in self.compilable:
            setattr(self, name, compiled(getattr(self, name)))


def _heads(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with parameters that are called themselves and contain no backbone."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, Backbone) or next(child.parameters(), None) is None:
            continue
        container = isinstance(child, nn.ModuleList | nn.ModuleDict)  # these have no forward
        if container or any(isinstance(part, Backbone) for part in child.modules()):
            found += _heads(child)
        else:
            found.append(child)
    return found
