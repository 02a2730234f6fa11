"""SimSiam (Chen and He 2021, arXiv:2011.10566): each of two views of an image predicts the features of the other."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslvision import Clock, Method
from sslvision.augment.color import Photometry, apply_photometry, draw_photometry
from sslvision.augment.crops import Crop
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.data.batch import Batch
from sslvision.optim.param_groups import decay_groups


class SimSiam(Method):
    """Siamese networks without negative pairs and without a teacher.

    Args:
        backbone: The network to pretrain.
        features: Width of the projection.
        predictor_hidden: Width of the predictor's bottleneck.
        crop_scale: Share of the image's area that a crop covers.
        lr: Peak learning rate of the whole batch.
        weight_decay: Weight decay of matrices.
        mean, std: Pixel statistics per channel.
        seed: Seed for crops and augmentations.
    """

    shown: Mapping[str, str] = {"loss": "loss", "spread": "spread"}

    # B images, D backbone width, F projection width

    def __init__(
        self,
        backbone: Backbone,
        *,
        features: int = 2048,
        predictor_hidden: int = 512,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        lr: float = 0.05,
        weight_decay: float = 1e-4,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int = 0,
    ):
        crop = Crop(backbone.image_size, crop_scale)
        super().__init__(crops=[crop, crop], mean=mean, std=std, seed=seed)
        self.lr, self.weight_decay = lr, weight_decay
        self.photometry = [Photometry(blur_probability=0.5)] * 2
        self.backbone = backbone
        widths = [backbone.embed_dim, features, features, features]
        layers = [layer for i in range(3) for layer in normalized_linear(widths[i], widths[i + 1])]
        self.projector = nn.Sequential(*layers[:-1])  # no ReLU at the end
        self.predictor = nn.Sequential(
            *normalized_linear(features, predictor_hidden), nn.Linear(predictor_hidden, features)
        )

    def views(self, batch: Batch, rng: ImageRandom) -> list[Tensor]:
        """Return two augmented, normalized crops, each (B, C, S, S)."""
        drawn = draw_photometry(rng, range(2), self.photometry)  # for 2B images
        return list(self.normalize(apply_photometry(torch.cat(batch.crops), drawn)).chunk(2))

    def losses(self, views: list[Tensor], clock: Clock | None) -> dict[str, Tensor]:
        """Return the negative cosine similarity, and the spread of the features: near 1, or 0 if all images have the same."""
        z1, z2 = (self.projector(self.backbone(view)) for view in views)  # (B, F) each
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (B, F) each
        similarity = F.cosine_similarity(p1, z2.detach()).mean() + F.cosine_similarity(p2, z1.detach()).mean()
        spread = F.normalize(z1.detach().float(), dim=1).std(dim=0).mean() * math.sqrt(z1.shape[1])
        return {"loss": -similarity / 2, "spread": spread}

    def schedule(self, clock: Clock) -> dict[str, float]:
        """Return the learning rate, half a cosine without warm-up, and the weight decay."""
        return {
            "lr": self.lr * (1 + math.cos(math.pi * clock.step / clock.steps)) / 2,
            "weight_decay": self.weight_decay,
        }

    def optimizer(self) -> torch.optim.Optimizer:
        """Return SGD; the learning rate of the predictor is constant (section 4.2)."""
        groups = [*decay_groups(self.backbone), *decay_groups(self.projector)]
        groups += decay_groups(self.predictor, lr=self.lr, constant_lr=True)
        return torch.optim.SGD(groups, lr=self.lr, momentum=0.9)

    def pretrained(self) -> Backbone:
        """Return the backbone."""
        return self.backbone

    def diagnose(self, means: Mapping[str, float], clock: Clock) -> dict[str, str]:
        """Name a collapse."""
        if means["spread"] > 0.1:
            return {}
        return {"Collapse": "all images have the same features. Likely cause: the learning rate is too high. Lower it."}


def normalized_linear(before: int, after: int) -> list[nn.Module]:
    """Return a linear layer, batch norm and ReLU. For batch norm over several GPUs set trainer.sync_batchnorm=true."""
    return [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
