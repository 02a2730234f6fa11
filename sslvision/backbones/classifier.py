"""Classifiers: a backbone whose timm model has a linear head on its features."""

import math

import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.dense import Dense
from sslvision.errors import UsageError


def classify(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the logits (B, K) in float32 of normalized images (B, C, H, W), by a backbone with a head."""
    return backbone.model.get_classifier()(backbone(images)).float()


def put_head(backbone: Backbone, classes: int) -> None:
    """Give a backbone's timm model a new linear head with near-zero weights (standard deviation 2e-5, as in MAE).

    Raises:
        UsageError: There are fewer than two classes, or the head of the model is not one linear layer on the features.
    """
    if classes < 2:
        raise UsageError(f"There are {classes} classes in the data; classification needs two or more.")
    model = backbone.model
    model.reset_classifier(classes)
    head = model.get_classifier()
    if not (isinstance(head, nn.Linear) and head.in_features == backbone.embed_dim and reads_features(backbone)):
        raise UsageError(
            f"The head of a {type(model).__name__} is not one linear layer on one feature, so fine-tuning does not "
            "support it: choose another backbone.name, such as vit_small_patch16_224 or resnet50."
        )
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def reads_features(backbone: Backbone) -> bool:
    """Return whether the head of a timm model gets the backbone's features unchanged."""
    if not isinstance(backbone, Dense):
        return True
    was_training, read = backbone.training, []
    hook = backbone.model.get_classifier().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    shape = (1, backbone.channels, *backbone.image_size)
    image = torch.linspace(-1, 1, math.prod(shape), device=next(backbone.parameters()).device).view(shape)
    backbone.eval()
    backbone.model(image)
    same = len(read) == 1 and torch.equal(read[0], backbone(image))
    backbone.train(was_training)
    hook.remove()
    return same
