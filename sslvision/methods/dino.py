"""Emerging properties in self-supervised vision transformers (DINO; Caron et al. 2021, arXiv:2104.14294).

A student sees two global and several local crops of an image, a teacher the global ones. From each crop, the student learns
to predict the teacher's output for the other global crop. The teacher is the exponential moving average of the student;
centering prevents it from giving all images the same output on one prototype, sharpening from giving a uniform one.

    crops -> student -> p_s            loss = mean over t, s != t of H(p_t, p_s)
    global crops -> teacher -> center, sharpen -> p_t
    teacher <- m teacher + (1 - m) student,   center <- c center + (1 - c) mean of the teacher's outputs
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sslvision.augment.color import Photometry, apply_photometry, draw_photometry, recolor, solarize_and_normalize
from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.released import part_of, released_dino, vit_like
from sslvision.backbones.visualize import visualize_features
from sslvision.data.batch import Batch
from sslvision.errors import UsageError
from sslvision.methods.base import Clock, Method
from sslvision.methods.dino_collapse import name_collapse
from sslvision.methods.dino_head import DINOHead
from sslvision.nn.ema import batch_statistics, update_ema
from sslvision.nn.image_size import written
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.optim.schedules import cosine_by_step

LOCAL = 96 / 224  # of the image's sides: the paper's local crops
FEW, MANY = 0.3, 0.75  # of the image's sides: other local crops are told


class DINO(Method):
    """Self-distillation with no labels.

    Args:
        backbone: Becomes the student; the teacher starts as its copy.
        prototypes: K, number of outputs of the head (65,536).
        hidden, bottleneck, batch_norm, norm_last_layer: See DINOHead.
        student_temp: Temperature of the student's softmax (0.1).
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: Temperature of the teacher's softmax at the start and
            after so many epochs, linear in whole epochs.
        center_momentum: Momentum of the center (0.9).
        momentum: EMA momentum of the teacher at the start; it rises to 1 by a half cosine.
        freeze_prototypes_epochs: Epochs in which the prototypes are not updated.
        clip_gradient: Largest norm of each parameter's gradient; 0 for no clipping.
        global_scale, local_scale: Share of the image's area that a global and a local crop covers.
        local_crops, local_size: Number of local crops, and their side in pixels (squares of images of any shape), or [h, w];
            None: 96/224 of the image's sides in whole patches, or the image's size for a backbone that reads no other.
        jitter, gray: Probabilities of color jitter and of grayscale.
        jitter_strength: See Photometry.
        blur: Probabilities of blurring the first global crop, the second one, and local crops.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        solarize: Probability of solarizing the second global crop.
        lr, min_lr, warmup_epochs: Peak and final learning rate of the whole batch, and epochs of linear warm-up.
        weight_decay, weight_decay_end, betas: Weight decay of AdamW at the start and at the end, and its betas.
        optimizer, optimizer_options: Any other timm optimizer by name, and its options. See Method.
        freeze_backbone_epochs: Epochs in which the head alone is updated. See Method.
        mean, std: Pixel statistics per channel, on the scale 0..1.
        seed: Seed for crops and augmentations.

    Raises:
        UsageError: A value is out of its range.
    """

    # B images, S crops of each (the first 2 global), D features, K prototypes

    center: Tensor
    teacher_temperature: Tensor
    teacher_means: Tensor
    micro_batches: Tensor
    compilable = ("pair_loss", "recolor", "finish")
    capturable = True
    shown: Mapping[str, str] = {
        "loss": "loss",
        "loss_over_ln_k": "/ ln K",
        "teacher_entropy": "entropy",
        "kl": "KL",
        "center_norm": "center",
    }

    def __init__(
        self,
        backbone: Backbone,
        *,
        prototypes: int = 65_536,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        student_temp: float = 0.1,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: float = 0,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_prototypes_epochs: float = 1,
        clip_gradient: float = 3.0,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_crops: int = 8,
        local_size: int | Sequence[int] | None = None,
        jitter: float = 0.8,
        jitter_strength: float = 1.0,
        gray: float = 0.2,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
        lr: float = 5e-4,
        min_lr: float = 1e-6,
        warmup_epochs: float = 10.0,
        weight_decay: float = 0.04,
        weight_decay_end: float = 0.4,
        betas: tuple[float, float] = (0.9, 0.999),
        optimizer: str = "adamw",
        optimizer_options: Mapping[str, Any] | None = None,
        freeze_backbone_epochs: float = 0.0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ):
        if min(student_temp, warmup_teacher_temp, teacher_temp) <= 0:
            raise UsageError(f"{student_temp=}, {warmup_teacher_temp=} and {teacher_temp=} must each be more than 0.")
        if not (0 <= momentum <= 1 and 0 <= center_momentum <= 1):
            raise UsageError(f"{momentum=} and {center_momentum=} must each be from 0 to 1.")
        local_shape = check_local_crops(backbone, local_crops, local_size)
        crops = [Crop(backbone.image_size, global_scale)] * 2 + [Crop(local_shape, local_scale)] * local_crops
        common: dict[str, Any] = {"mean": mean, "std": std, "betas": betas, "seed": seed}
        common |= {"optimizer": optimizer, "optimizer_options": optimizer_options}
        super().__init__(crops=crops, freeze_backbone_epochs=freeze_backbone_epochs, **common)
        self.save_hyperparameters(ignore=["backbone"], logger=False)
        color = {"jitter_probability": jitter, "jitter_strength": jitter_strength, "gray_probability": gray}
        view = partial(Photometry, **color, blur_sigma=blur_sigma)
        first, second = view(blur_probability=blur[0]), view(blur_probability=blur[1], solarize_probability=solarize)
        self.photometry = [first, second, *[view(blur_probability=blur[2])] * local_crops]  # one per crop
        self.student_temp, self.center_momentum, self.clip_gradient = student_temp, center_momentum, clip_gradient
        self.teacher_temps = (warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.freeze_prototypes_epochs, self.warmup_epochs = freeze_prototypes_epochs, warmup_epochs
        self.schedule_lr = partial(cosine_by_step, start=lr, end=min_lr)
        self.schedule_weight_decay = partial(cosine_by_step, start=weight_decay, end=weight_decay_end)
        self.schedule_momentum = partial(cosine_by_step, start=momentum, end=1.0)
        head = DINOHead(
            backbone.embed_dim,
            prototypes,
            hidden=hidden,
            bottleneck=bottleneck,
            batch_norm=batch_norm,
            norm_last_layer=norm_last_layer,
        )
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.register_buffer("center", torch.zeros(1, prototypes))
        # For the current update: temperature, and the sum of the teacher's mean outputs over so many micro-batches.
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temp), persistent=False)
        self.register_buffer("teacher_means", torch.zeros(1, prototypes), persistent=False)
        self.register_buffer("micro_batches", torch.zeros(()), persistent=False)
        self.pair_loss, self.recolor, self.finish = cross_entropy_of_pairs, recolor, solarize_and_normalize

    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return S augmented, normalized crops: two of the backbone's image size, and the local ones, (B, C, h, w) each."""
        augmented, B = list[Tensor](), len(batch.indices)
        drawn = draw_photometry(rng, range(len(self.crops)), self.photometry)
        finish = partial(self.finish, normalize=self.normalize)
        for first, end in ((0, 2), (2, len(self.crops))):  # crops of one size together: these are many small operations
            if crops := batch.crops[first:end]:
                part = drawn.part(first * B, end * B)
                of_size = apply_photometry(torch.cat(crops), part, recolor_fn=self.recolor, finish_fn=finish)
                augmented += of_size.chunk(len(crops))
        return augmented

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the cross-entropy between teacher and student over all pairs of different crops, and its parts.

        Adds up the teacher's mean outputs, from which `after_update` updates the center.
        """
        B = len(views[0])
        if clock is not None:
            self.set_clock(clock)
        with torch.no_grad(), batch_statistics(self.teacher):
            target = embed(self.teacher, torch.cat(views[:2])).to(self.center.dtype)  # (2B, K)
            q = ((target - self.center) / self.teacher_temperature).softmax(dim=-1)  # with the center before the update
            self.teacher_means += target.mean(dim=0, keepdim=True)
            self.micro_batches += 1
        z = embed(self.student, *(torch.cat(crops) for crops in (views[:2], views[2:]) if crops))  # (SB, K)
        z = z.to(target.dtype).unflatten(0, (-1, B))  # (S, B, K)
        loss = self.pair_loss(q.unflatten(0, (2, B)), z, self.student_temp)
        entropy = entropy_of(q).mean()
        return {
            "loss": loss,
            "loss_over_ln_k": loss.detach() / math.log(q.shape[1]),
            "teacher_entropy": entropy,
            "kl": loss.detach() - entropy,
            # What an output tells about its image: 0 if all images get the same output.
            "mutual_information": entropy_of(q.mean(dim=0)) - entropy,
            "center_norm": self.center.norm(),
        }

    @torch.no_grad()
    def after_update(self, clock: Clock) -> None:
        """Move the teacher towards the student, and the center towards the mean of the teacher's outputs (Eq. 4)."""
        update_ema(self.teacher, self.student, self.schedule_momentum(clock.step, steps=clock.steps))
        mean = self.teacher_means / self.micro_batches  # (1, K)
        self.teacher_means.zero_()
        self.micro_batches.zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        mean = mean.where(mean.isfinite(), self.center)  # one non-finite batch must not spoil all that follow
        self.center.lerp_(mean, 1 - self.center_momentum)

    def before_update(self, clock: Clock, gradients: list[Tensor], norms: Sequence[Tensor]) -> None:
        """Clip each parameter's gradient by its own norm, and freeze the prototypes in the first epochs."""
        if self.clip_gradient:
            torch._foreach_mul_(gradients, (self.clip_gradient / (torch.stack([*norms]) + 1e-6)).clamp(max=1).unbind())
        if clock.epoch < self.freeze_prototypes_epochs:
            head = self.student["head"]
            assert isinstance(head, DINOHead)
            head.last_layer.zero_grad(set_to_none=True)

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return learning rate and weight decay of an update (section 3.2, "Implementation details")."""
        warmup = round(self.warmup_epochs * clock.steps_per_epoch)
        return {
            "lr": self.schedule_lr(clock.step, steps=clock.steps, warmup_steps=warmup),
            "weight_decay": self.schedule_weight_decay(clock.step, steps=clock.steps),
        }

    def set_clock(self, clock: Clock) -> None:
        """Write the teacher's temperature to its buffer."""
        self.teacher_temperature.fill_(self.teacher_temp(clock))

    def teacher_temp(self, clock: Clock) -> float:
        """Return the teacher's temperature: linear over the warm-up epochs, constant within an epoch."""
        start, end, epochs = self.teacher_temps
        epoch = int(clock.epoch)
        last = max(epochs - 1, 1)
        return start + (end - start) * min(epoch, last) / last if epoch < epochs else end

    def train(self, mode: bool = True) -> "DINO":
        """Set the student's mode. The teacher stays in eval mode: drop-path must not blur the targets."""
        super().train(mode)
        self.teacher.eval()
        return self

    def pretrained(self) -> Backbone:
        """Return the teacher's backbone, the better of the two (section 5.2)."""
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, Backbone)
        return backbone

    def describe(self) -> dict[str, str]:
        """Return the numbers and sizes of the crops."""
        local = self.crops[2:]
        some = f", {len(local)} local ones of {written(local[0].shape)} pixels" if local else ", no local ones"
        return {"crops": f"2 global ones of {written(self.crops[0].shape)}{some}"}

    def remarks(self) -> list[str]:
        """Name local crops that are small or large for the images, as those of a recipe for another image size are."""
        (side, _), (image, _) = self.crops[-1].shape, self.crops[0].shape
        if len(self.crops) == 2 or side == image or FEW * image <= side <= MANY * image:
            return []
        usual = check_local_crops(self.pretrained(), 1, None)
        return [
            f"Local crops have {side} pixels of {image}, where {LOCAL:.2g} of the side is usual: local_size={written(usual)}, "
            "or local_size=null for that share of any image size."
        ]

    def pictures(self, images: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
        """Return the attention of the teacher's class token and its patch features; see `visualize_features`."""
        seen = self.normalize(images)
        return visualize_features(self.pretrained(), seen, self.normalize.undo(seen))

    def diagnose(self, means: Mapping[str, float], clock: Clock) -> dict[str, str]:
        """Name a collapse in words. Near-uniform outputs are no alarm before the end of the warm-up."""
        return name_collapse(
            entropy=means["teacher_entropy"],
            information=means["mutual_information"],
            prototypes=self.center.shape[1],
            settled=clock.epoch >= max(self.warmup_epochs, self.freeze_prototypes_epochs),
        )

    @classmethod
    def from_official(
        cls, checkpoint: str | Path | Mapping[str, Any], *, heads: int | None = None, **settings: Any
    ) -> "DINO":
        """Read a checkpoint that the authors released: student and teacher with their heads, or a backbone alone.

        Args:
            checkpoint: Its file, which is loaded with weights_only=True, or its content.
            heads: Number of attention heads, which weights do not tell; by default one per 64 channels.
            settings: Further arguments of DINO. Those of the head are inferred from a full checkpoint.

        Raises:
            UsageError: It is neither.
        """
        states, center = released_dino(checkpoint)
        backbone = vit_like(part_of(states["teacher"], "backbone.model."), heads=heads)
        full = "head.last_layer.weight_v" in states["teacher"]
        if full:
            settings = DINOHead.settings_of(part_of(states["teacher"], "head.")) | settings
        method = cls(backbone, **settings)
        for whose, network in (("student", method.student), ("teacher", method.teacher)):
            missing, unexpected = network.load_state_dict(states[whose], strict=False)
            if unexpected or (full and missing) or any(name.startswith("backbone.") for name in missing):
                raise UsageError(
                    f"The weights of the {whose} do not fit: missing {missing[:3]}, unknown {unexpected[:3]}."
                )
        if center is not None:
            method.center.copy_(center)
        return method


def check_local_crops(backbone: Backbone, local_crops: int, local_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return height and width of local crops. Raises UsageError for a number or a size that is impossible."""
    if local_crops < 0:
        raise UsageError(f"{local_crops=} must be 0 or more.")
    if local_size is not None:
        return backbone.check_image_size(local_size, "local_size") if local_crops else backbone.image_size
    height, width = (max(1, round(side * LOCAL / backbone.stride)) * backbone.stride for side in backbone.image_size)
    return (height, width) if backbone.supports_image_size((height, width)) else backbone.image_size


def embed(network: nn.ModuleDict, *images: Tensor) -> Tensor:
    """Return the logits (N, K) of images (n, C, h, w), given as one tensor for each size."""
    return network["head"](network["backbone"](*images))


def entropy_of(q: Tensor) -> Tensor:
    """Return the entropy in nats of distributions (..., K)."""
    return torch.special.entr(q).sum(dim=-1)


def cross_entropy_of_pairs(q: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy H(q_t, softmax(logits_s / temperature)) over t and s != t (Eq. 3).

    No pair is computed by itself. With z = logits / temperature, and as q sums to 1, H(q, softmax(z)) = logsumexp(z) - q.z,
    whose second term is linear in q and z: all pairs are the sum of the q's times the sum of the z's, less the same-view ones.

    Args:
        q: (2, B, K) teacher's distributions of the global crops.
        logits: (S, B, K) student's logits; crops 0 and 1 are the teacher's.
        temperature: Temperature of the student's softmax.
    """
    loss: Tensor = _CrossEntropyOfPairs.apply(q, logits, temperature)
    return loss


class _CrossEntropyOfPairs(torch.autograd.Function):
    """The gradient of z_s is softmax(z_s) for each of its pairs, less their q's: few passes over (S, B, K)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, logits: Tensor, temperature: float) -> Tensor:
        S, B, _ = logits.shape
        z = logits / temperature  # (S, B, K)
        p = z.softmax(dim=-1)  # (S, B, K)
        logsumexp = z.amax(dim=-1) - p.amax(dim=-1).log()  # (S, B), for log p = z - logsumexp
        ctx.save_for_backward(q, p)
        ctx.pairs, ctx.temperature = B * (2 * S - 2), temperature
        all_pairs = 2 * logsumexp.sum() - (q.sum(dim=0) * z.sum(dim=0)).sum()
        same_view = logsumexp[:2].sum() - (q * z[:2]).sum()
        return (all_pairs - same_view) / ctx.pairs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        q, p = ctx.saved_tensors
        scale = gradient / (ctx.pairs * ctx.temperature)
        grad_logits = p * (2 * scale)  # (S, B, K)
        grad_logits[:2] /= 2
        grad_logits -= q.sum(dim=0) * scale
        grad_logits[:2] += q * scale
        return None, grad_logits, None
