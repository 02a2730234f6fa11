"""Emerging properties in self-supervised vision transformers (DINO; Caron et al. 2021, arXiv:2104.14294).

A student sees two global and several local crops of an image, a teacher the global ones. The student learns to tell,
from each crop, what the teacher says of the other global crop. The teacher is the student's running mean; centering keeps
it from giving one answer to all, sharpening from giving all answers at once.

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
from sslvision.methods.dino_loss import cross_entropy_of_pairs
from sslvision.nn.compilation import compile_module
from sslvision.nn.ema import own_statistics, update_ema
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.optim.schedules import cosine_by_step

# Loss against ln K, the teacher's entropy, KL between teacher and student, norm of the center.
SHOWN = {"loss": "loss", "loss_over_ln_k": "/ ln K", "teacher_entropy": "entropy", "kl": "KL", "center_norm": "center"}


class DINO(Method):
    """Self-distillation with no labels.

    Args:
        backbone: becomes the student; its copy is the teacher.
        prototypes: K, outputs of the head (65,536).
        hidden, bottleneck, batch_norm, norm_last_layer: see DINOHead.
        student_temp: sharpness of the student (0.1).
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs: sharpness of the teacher, linear per epoch.
        center_momentum: of the center (0.9).
        momentum: of the teacher at the start; 1 at the end, by half a cosine.
        freeze_prototypes_epochs: epochs in which the prototypes stay as they are.
        clip_gradient: largest norm of each parameter's gradient; 0 for no bound.
        global_scale, local_scale: share of the image's area of the crops.
        local_crops, local_size: how many, and their side in pixels.
        jitter, gray: probabilities of color jitter and of grayscale.
        jitter_strength: see Photometry.
        blur: probabilities of a blur of the first global crop, the second, and the local ones.
        blur_sigma: weakest and strongest blur, in pixels.
        solarize: probability of solarizing the second global crop.
        lr, min_lr, warmup_epochs, weight_decay, weight_decay_end, betas: of AdamW, by update.
        mean, std: of the pixels, per channel, on the scale 0..1.
        seed: of the views.

    Raises:
        UsageError: a value is out of its range.
    """

    # B images, S crops of each (the first 2 global), D features, K prototypes

    center: Tensor
    teacher_temperature: Tensor
    teacher_means: Tensor
    micro_batches: Tensor
    compilable = ("pair_loss", "recolor", "finish")
    capturable = True
    shown: Mapping[str, str] = SHOWN

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
        warmup_teacher_temp_epochs: int = 0,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_prototypes_epochs: int = 1,
        clip_gradient: float = 3.0,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_crops: int = 8,
        local_size: int = 96,
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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        seed: int = 0,
    ):
        if min(student_temp, warmup_teacher_temp, teacher_temp) <= 0:
            raise UsageError(f"{student_temp=}, {warmup_teacher_temp=} and {teacher_temp=} must each be more than 0.")
        if not (0 <= momentum <= 1 and 0 <= center_momentum <= 1):
            raise UsageError(f"{momentum=} and {center_momentum=} must each be from 0 to 1.")
        if local_crops < 0 or (local_crops and not backbone.supports_image_size(local_size)):
            raise UsageError(
                f"{local_crops=} of {local_size=} pixels cannot be: give 0 or more, of a size that the backbone can read, such "
                f"as local_size={backbone.image_size[0]}, or for ViT and Swin any multiple of {backbone.stride}."
            )
        crops = [Crop(backbone.image_size[0], global_scale)] * 2 + [Crop(local_size, local_scale)] * local_crops
        super().__init__(crops=crops, mean=mean, std=std, betas=betas, seed=seed)
        color = {"jitter_probability": jitter, "jitter_strength": jitter_strength, "gray_probability": gray}
        view = partial(Photometry, **color, blur_sigma=blur_sigma)
        first, second = view(blur_probability=blur[0]), view(blur_probability=blur[1], solarize_probability=solarize)
        self.photometry = [first, second, *[view(blur_probability=blur[2])] * local_crops]  # of each crop
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
        # Of the coming update: the temperature, the sum of the teacher's means over its micro-batches, and how many there were.
        self.register_buffer("teacher_temperature", torch.tensor(teacher_temp), persistent=False)
        self.register_buffer("teacher_means", torch.zeros(1, prototypes), persistent=False)
        self.register_buffer("micro_batches", torch.zeros(()), persistent=False)
        self.pair_loss, self.recolor, self.finish = cross_entropy_of_pairs, recolor, solarize_and_normalize

    def train(self, mode: bool = True) -> "DINO":
        """Set the student's mode; the teacher stays in eval mode: drop-path must not blur the targets."""
        super().train(mode)
        self.teacher.eval()
        return self

    def compile_blocks(self) -> None:
        """Treat the heads as the blocks; see Method.compile_blocks."""
        super().compile_blocks()
        for network in (self.student, self.teacher):
            compile_module(network["head"])

    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return S augmented, normalized crops: two (B, C, G, G) and the local ones (B, C, L, L)."""
        augmented, B = list[Tensor](), len(batch.indices)
        drawn = draw_photometry(rng, range(len(self.crops)), self.photometry)
        finish = partial(self.finish, normalize=self.normalize)
        for first, end in ((0, 2), (2, len(self.crops))):  # those of a size together: this is many small operations
            if crops := batch.crops[first:end]:
                part = drawn.part(first * B, end * B)
                of_size = apply_photometry(torch.cat(crops), part, recolor_fn=self.recolor, finish_fn=finish)
                augmented += of_size.chunk(len(crops))
        return augmented

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the cross-entropy between teacher and student over all pairs of different crops, and its parts.

        Keeps the mean of the teacher's outputs, by which `after_update` moves the center.
        """
        B = len(views[0])
        if clock is not None:
            self.set_clock(clock)
        with torch.no_grad(), own_statistics(self.teacher):
            target = embed(self.teacher, torch.cat(views[:2])).to(self.center.dtype)  # (2B, K)
            q = ((target - self.center) / self.teacher_temperature).softmax(dim=-1)  # with the center of before
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
            # How much an answer tells about its image: 0 if all images get the same one.
            "mutual_information": entropy_of(q.mean(dim=0)) - entropy,
            "center_norm": self.center.norm(),
        }

    def before_update(self, clock: Clock, gradients: list[Tensor], norms: Sequence[Tensor]) -> None:
        """Bound each parameter's gradient by itself (not all together), and freeze the prototypes in the first epochs."""
        if self.clip_gradient:
            torch._foreach_mul_(gradients, (self.clip_gradient / (torch.stack([*norms]) + 1e-6)).clamp(max=1).unbind())
        if clock.epoch < self.freeze_prototypes_epochs:
            head = self.student["head"]
            assert isinstance(head, DINOHead)
            head.last_layer.zero_grad(set_to_none=True)

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
        mean = mean.where(mean.isfinite(), self.center)  # one broken batch must not spoil all that follow
        self.center.lerp_(mean, 1 - self.center_momentum)

    def set_clock(self, clock: Clock) -> None:
        """Write the teacher's temperature to its buffer."""
        self.teacher_temperature.fill_(self.teacher_temp(clock))

    def teacher_temp(self, clock: Clock) -> float:
        """Return the teacher's temperature: linear over the warm-up epochs, by whole epochs."""
        start, end, epochs = self.teacher_temps
        epoch = int(clock.epoch)
        return start + (end - start) * epoch / max(epochs - 1, 1) if epoch < epochs else end

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Learning rate and weight decay, by update (section 3.2, "Implementation details")."""
        warmup = round(self.warmup_epochs * clock.steps_per_epoch)
        return {
            "lr": self.schedule_lr(clock.step, steps=clock.steps, warmup_steps=warmup),
            "weight_decay": self.schedule_weight_decay(clock.step, steps=clock.steps),
        }

    def pretrained(self) -> Backbone:
        """Return the teacher's backbone, the better of the two (section 5.2)."""
        backbone = self.teacher["backbone"]
        assert isinstance(backbone, Backbone)
        return backbone

    def pictures(self, images: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
        """Return where the teacher's class token looks, and what its patches hold; see `visualize_features`."""
        seen = self.normalize(images)
        return visualize_features(self.pretrained(), seen, self.normalize.undo(seen))

    def diagnose(self, means: Mapping[str, float], clock: Clock) -> dict[str, str]:
        """Name a collapse in words (section 5.3, figure 7). Near-uniform answers are no alarm before the warm-up's end."""
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
        """Read what the authors released: a full checkpoint (student and teacher with heads), or a plain backbone.

        Args:
            checkpoint: a file (loaded with weights_only=True), or its content.
            heads: attention heads, which weights do not tell; by default 64 channels each.
            settings: further arguments of DINO. Those of the head are read off a full checkpoint.

        Raises:
            UsageError: it is neither.
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
                    f"The {whose}'s weights do not fit: missing {missing[:3]}, not expected {unexpected[:3]}."
                )
        if center is not None:
            method.center.copy_(center)
        return method


def embed(network: nn.ModuleDict, *images: Tensor) -> Tensor:
    """Return logits (N, K) of images (n, C, S, S), those of several sizes together."""
    return network["head"](network["backbone"](*images))


def entropy_of(q: Tensor) -> Tensor:
    """Return the entropy in nats of distributions (..., K)."""
    return torch.special.entr(q).sum(dim=-1)
