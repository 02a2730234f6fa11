"""The head of a classifier: one linear layer on a backbone's features, which is the head of its timm model."""

import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.dense import Dense
from sslvision.errors import UsageError


def classify(backbone: Backbone, images: Tensor) -> Tensor:
    """Return the logits (B, K), in float32, that a backbone with a head gives normalized images (B, C, S, S)."""
    return backbone.model.get_classifier()(backbone(images)).float()


def put_head(backbone: Backbone, classes: int) -> None:
    """Give a backbone's timm model a new linear head that says next to nothing yet: weights of deviation 2e-5, as MAE's.

    Raises:
        UsageError: fewer than two classes; or the model has no head that is one linear layer on the backbone's features.
    """
    if classes < 2:
        raise UsageError(f"There are {classes} classes in the data: classification needs two or more.")
    model = backbone.model
    model.reset_classifier(classes)
    head = model.get_classifier()
    if not (isinstance(head, nn.Linear) and head.in_features == backbone.embed_dim and reads_features(backbone)):
        raise UsageError(
            f"The head of a {type(model).__name__} is not one linear layer on one feature, so the network cannot be fine-tuned "
            "here: choose another backbone.name, such as vit_small_patch16_224 or resnet50."
        )
    nn.init.trunc_normal_(head.weight, std=2e-5)
    nn.init.zeros_(head.bias)


@torch.no_grad()
def reads_features(backbone: Backbone) -> bool:
    """Return whether a timm model hands the features of its backbone to its head as they are, with nothing in between."""
    if not isinstance(backbone, Dense):
        return True
    was_training, read = backbone.training, []
    hook = backbone.model.get_classifier().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    side = backbone.image_size[0]
    image = torch.linspace(-1, 1, backbone.channels * side**2, device=next(backbone.parameters()).device)
    image = image.view(1, backbone.channels, side, side)
    backbone.eval()
    backbone.model(image)
    same = len(read) == 1 and torch.equal(read[0], backbone(image))
    backbone.train(was_training)
    hook.remove()
    return same
