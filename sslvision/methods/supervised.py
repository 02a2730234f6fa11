"""Supervised training of a classifier: fine-tuning of a pretrained backbone, in whole or in part, or training from scratch.

    crop -> cut out, erase -> mix with the next image -> backbone -> features -> linear head -> cross-entropy

The recipe is MAE's (He et al. 2021, arXiv:2111.06377, appendix A.1, table 9), after BEiT's and DeiT's: layer-wise
learning rates, Mixup, CutMix, random erasing, label smoothing. Each of them can be disabled, and the lowest layers can be
frozen. With a fitted head (`start_head`) this is LP-FT (Kumar et al. 2022, arXiv:2202.10054): a fitted head has no large
first gradients, which would distort good features.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer

from sslvision.augment.crops import Crop
from sslvision.augment.mixing import check_share, cut_out, erase, mix_images
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.classifier import classify, put_head
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock, Method
from sslvision.nn.compilation import force_eager
from sslvision.nn.freezing import eval_frozen, freeze_lowest, layers
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.nn.weight_noise import with_noise
from sslvision.optim.optimizers import build_optimizer
from sslvision.optim.param_groups import layer_groups
from sslvision.optim.schedules import warmup_cosine


class Supervised(Method):
    """A classifier: a backbone and, as the head of its timm model, a linear layer.

    Args:
        backbone: Gets a new head. All of it trains, except for `freeze` or `freeze_stages`.
        classes: Names of the classes.
        labels: (N,) int64 labels of the training source, from 0.
        validation_labels: Labels of the validation source, if there is one.
        lr: Peak learning rate of the head for the whole batch; with `layer_decay` lower layers have smaller ones.
        crop_scale: Share of the image's area that a random resized crop covers; [1, 1] for the whole image.
        flip: Mirror half of the images.
        freeze: Number of the lowest blocks to freeze together with the stem; below 1, the share of them.
        freeze_stages: Number of the lowest stages to freeze, instead.
        optimizer: Any of timm.optim.list_optimizers() that needs only gradients.
        optimizer_options: Arguments of the optimizer, such as momentum or betas.
        weight_decay, layer_decay: See layer_groups.
        warmup_epochs: Epochs of linear warm-up, fractions allowed.
        min_lr: Learning rate at the end.
        mixup, cutmix: See mix_images.
        erase: Probability that a box of an image is erased.
        cutout: Side of the square of each image that is set to its mean, as a share of the image's side; 0 for none.
        weight_noise: Standard deviation of the noise on the weights in each step, as a share of their root mean square.
        label_smoothing: Share of each target that is spread over all classes.
        class_weights: "none"; "balanced", by inverse frequency, with a mean of 1 over the training images; or K numbers.
        ema: Decay of an exponential moving average of the weights, which is then evaluated and saved; 0 for none. The decay
            is smaller in the first updates (timm's warm-up), so that the average of a short run forgets the initial weights.
        mean, std: Pixel statistics per channel, on the scale 0..1.
        seed: Seed for crops, mixing and erasing.

    Raises:
        UsageError: A value is out of its range, or the backbone does not support a linear head.
    """

    labels: Tensor
    validation_labels: Tensor | None
    class_weights: Tensor | None
    shown: Mapping[str, str] = {"loss": "loss", "train_top1": "top-1"}

    # B images, D channels of a feature, K classes

    def __init__(
        self,
        backbone: Backbone,
        *,
        classes: Sequence[str],
        labels: Tensor,
        validation_labels: Tensor | None = None,
        lr: float = 1e-3,
        crop_scale: tuple[float, float] = (0.35, 1.0),
        flip: bool = True,
        freeze: float = 0,
        freeze_stages: int = 0,
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        weight_decay: float = 0.05,
        layer_decay: float = 1.0,
        warmup_epochs: float = 0.0,
        min_lr: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erase: float = 0.0,
        cutout: float = 0.0,
        weight_noise: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: str | Sequence[float] = "none",
        ema: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ):
        check_settings(lr, min_lr, warmup_epochs, weight_decay, label_smoothing, ema, weight_noise)
        for name, share in (("mixup", mixup), ("cutmix", cutmix), ("erase", erase), ("cutout", cutout)):
            check_share(name, share)
        crop = Crop(backbone.image_size, (crop_scale[0], crop_scale[1]), flip=flip)
        super().__init__(crops=[crop], mean=mean, std=std, seed=seed)
        self.save_hyperparameters(ignore=["backbone", "labels", "validation_labels"], logger=False)
        self.classes, K = tuple(classes), len(classes)
        self.backbone = backbone.requires_grad_(True)
        put_head(backbone, K)
        self.frozen = freeze_lowest(backbone.model, blocks=freeze, stages=freeze_stages)
        self.frozen_unit = "stages" if freeze_stages else "blocks"
        self.mixup, self.cutmix, self.erasing, self.cutout = mixup, cutmix, erase, cutout
        self.label_smoothing, self.weight_noise = label_smoothing, weight_noise
        self.schedule_lr = partial(warmup_cosine, peak=lr, end=min_lr, warmup_epochs=warmup_epochs)
        self.lr, self.weight_decay, self.layer_decay = lr, weight_decay, layer_decay
        self.optimizer_name, self.optimizer_options = optimizer, dict(optimizer_options or {})
        self.register_buffer("labels", checked_labels(labels, K), persistent=False)
        self.register_buffer("validation_labels", checked_labels(validation_labels, K), persistent=False)
        self.register_buffer("class_weights", weights_of_classes(class_weights, labels, K), persistent=False)
        self.ema = ModelEmaV3(backbone, decay=ema, use_warmup=True).requires_grad_(False) if ema else None
        self.has_fitted_head = False
        self._measured: list[Tensor] = []  # per validation batch: correct images, sum of losses, images
        self.configure_optimizers()  # raises now if an option is impossible
        self.train()

    @property
    def evaluated(self) -> Backbone:
        """Return the classifier to evaluate: the EMA if there is one, else the trained backbone."""
        backbone = self.backbone if self.ema is None else self.ema.module
        assert isinstance(backbone, Backbone)
        return backbone

    def pretrained(self) -> Backbone:
        """Return `evaluated`."""
        return self.evaluated

    def train(self, mode: bool = True) -> "Supervised":
        """Set the mode of trained layers; frozen layers and the EMA stay in eval mode."""
        super().train(mode)
        eval_frozen(self.backbone.model)
        if self.ema is not None:
            self.ema.eval()
        return self

    def on_train_epoch_start(self) -> None:
        """Set the modes again: an evaluation between epochs may have put the whole backbone into train mode."""
        self.train()

    @torch.no_grad()
    def start_head(self, weight: Tensor, bias: Tensor) -> None:
        """Initialize the head by a linear probe, weight (K, D) and bias (K,), of the backbone's features (LP-FT)."""
        self.has_fitted_head = True
        for backbone in (self.backbone, self.evaluated):
            head = backbone.model.get_classifier()
            assert (weight.shape, bias.shape) == (head.weight.shape, head.bias.shape)
            head.weight.copy_(weight)
            head.bias.copy_(bias)

    # A step.

    def batch_of(self, batch: Any) -> Batch:
        """Refuse batches of other loaders: labels belong to the indices of images, which only `ImageData` gives."""
        raise UsageError("Supervised finds labels by the index of an image: train it with sslvision's ImageData.")

    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return normalized, cut, erased and mixed images (B, C, H, W) and their targets (B, K), shares of the classes."""
        labels = self.labels[batch.shown][:, None]  # (B, 1)
        targets = torch.zeros(len(labels), len(self.classes), device=labels.device).scatter_(1, labels, 1.0)
        images = cut_out(self.normalize(batch.crops[0]), rng, self.cutout)
        images = erase(images, rng, self.erasing)
        return list(mix_images(images, targets, rng, mixup=self.mixup, cutmix=self.cutmix))

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the cross-entropy with the targets, and the accuracy in percent for the class with the largest share.

        With class weights the loss of an image is the sum over classes of weight * share * -log p, and the loss is the mean
        over images. It is not divided by the sum of weights, which depends on the composition of the batch.
        """
        images, targets = views
        logits = with_noise(classify, self.backbone, images, share=self.weight_noise)  # (B, K)
        loss = F.cross_entropy(logits, targets, self.class_weights, label_smoothing=self.label_smoothing)
        return {"loss": loss, "train_top1": 100 * (logits.argmax(1) == targets.argmax(1)).float().mean()}

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return the learning rate of the head (linear warm-up, then half a cosine, per update) and the weight decay."""
        return {"lr": self.schedule_lr(clock.epoch, epochs=clock.epochs), "weight_decay": self.weight_decay}

    def after_update(self, clock: Clock) -> None:
        """Update the EMA, buffers included."""
        if self.ema is not None:
            self.ema.update(self.backbone, step=clock.step + 1)

    def optimizer(self) -> Optimizer:
        """Return the optimizer of timm that was chosen by name."""
        model, options = self.backbone.model, self.optimizer_options
        return build_optimizer(self.optimizer_name, self.groups(), lr=self.lr, options=options, module=model)

    def groups(self) -> list[dict[str, Any]]:
        """Return the trained parameters in groups by layer."""
        return layer_groups(self.backbone.model, weight_decay=self.weight_decay, layer_decay=self.layer_decay)

    # Validation.

    @torch.no_grad()
    @force_eager()
    def classify(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of uint8 images (B, C, H, W) by `evaluated` in eval mode."""
        was_training = self.training
        self.eval()
        logits = classify(self.evaluated, self.normalize(images))
        self.train(was_training)
        return logits

    @force_eager()
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Measure one validation batch: indices (B,) and uint8 images (B, C, H, W)."""
        indices, images = batch
        if not len(indices):  # no image of this batch could be read
            return
        assert self.validation_labels is not None
        labels = self.validation_labels[indices]
        logits = classify(self.evaluated, self.normalize(images))
        correct, loss = (logits.argmax(1) == labels).sum(), F.cross_entropy(logits, labels, reduction="sum")
        self._measured.append(torch.stack([correct, loss, torch.full_like(loss, len(labels))]))

    def on_validation_epoch_end(self) -> None:
        """Pass `val_top1` in percent and `val_loss`, over all processes, to callbacks and loggers."""
        measured, self._measured = torch.stack([*self._measured, torch.zeros(3, device=self.device)]).sum(dim=0), []
        correct, loss, count = self.trainer.strategy.reduce(measured, reduce_op="sum").tolist()
        if not count:
            return
        metrics = {"val_top1": 100 * correct / count, "val_loss": loss / count}
        for name, value in metrics.items():
            self.trainer.callback_metrics[name] = torch.tensor(value)
        epoch = 0.0 if self.trainer.sanity_checking else self.clock.epoch  # sanity check: before training
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": epoch}, step=self.trainer.global_step)

    def describe(self) -> dict[str, str]:
        """Return the trained share, the optimizer, learning rates and regularization."""
        parameters = list(self.backbone.parameters())
        trained, everything = (sum(p.numel() for p in parameters if p.requires_grad or each) for each in (False, True))
        rows = {"classes": str(len(self.classes))}
        rows["trained"] = f"{trained / 1e6:.3g} of {everything / 1e6:.3g} M parameters"
        if self.frozen:
            *body, _ = layers(self.backbone.model, stages=self.frozen_unit == "stages")
            held = sum(name in set(self.frozen) for name, *_ in body) - 1  # without the stem
            rows["trained"] += f"; stem and lowest {held} of {len(body) - 1} {self.frozen_unit} frozen"
        options = [f"{key} {value}" for key, value in self.optimizer_options.items()]
        rows["optimizer"] = ", ".join([self.optimizer_name, *options])
        if self.layer_decay < 1:
            lowest = min(group["lr_scale"] for group in self.groups())
            rows["layer-wise rates"] = (
                f"{self.lr * lowest:.2g} (lowest) to {self.lr:.2g} (head), x {self.layer_decay:g} a layer"
            )
        settings = {"Mixup": self.mixup, "CutMix": self.cutmix, "erase": self.erasing, "Cutout": self.cutout}
        settings |= {"label smoothing": self.label_smoothing, "weight decay": self.weight_decay}
        settings["weight noise"] = self.weight_noise
        settings["EMA"] = self.ema.decay if self.ema else 0
        rows["regularization"] = ", ".join(f"{name} {value:g}" for name, value in settings.items() if value) or "none"
        return rows


def check_settings(
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    weight_decay: float,
    label_smoothing: float,
    ema: float,
    weight_noise: float,
) -> None:
    """Raise UsageError if a setting is out of range."""
    if not (lr > 0 and min(min_lr, warmup_epochs, weight_decay) >= 0):
        raise UsageError(f"{lr=} must be greater than 0; {min_lr=}, {warmup_epochs=} and {weight_decay=} 0 or more.")
    for name, value in {"label_smoothing": label_smoothing, "ema": ema, "weight_noise": weight_noise}.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value:g} must be from 0 (none) to less than 1.")


def checked_labels(labels: Tensor | None, classes: int) -> Tensor | None:
    """Return the labels, or raise UsageError if they are out of range."""
    if labels is not None and len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise UsageError(
            f"Labels from {labels.min()} to {labels.max()} do not number {classes} classes, from 0 to {classes - 1}: were "
            "all images labeled, and training and validation images alike?"
        )
    return labels


def weights_of_classes(weights: str | Sequence[float], labels: Tensor, classes: int) -> Tensor | None:
    """Return the weight of each class (K,), or None for equal weights. Raises UsageError."""
    if isinstance(weights, str):
        if weights not in ("none", "balanced"):
            raise UsageError(
                f"class_weights={weights} is unknown: it must be none, balanced, or a list of {classes} numbers."
            )
        if weights == "none":
            return None
        counts = labels.bincount(minlength=classes).float()
        return torch.where(counts > 0, len(labels) / (counts.clamp(min=1) * (counts > 0).sum()), 0.0)
    given = torch.tensor([float(weight) for weight in weights])
    if len(given) != classes or not (given >= 0).all() or not 0 < given.sum() < float("inf"):
        raise UsageError(f"class_weights={list(weights)} must be {classes} numbers of 0 or more, one for each class.")
    return given
