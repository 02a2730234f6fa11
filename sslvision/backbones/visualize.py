"""Pictures of a backbone's features."""

import torch
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.vit import ViT
from sslvision.figures.maps import at_offsets, enlarged, heat, principal_components


@torch.no_grad()
def visualize_features(backbone: Backbone, images: Tensor, originals: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
    """Return pictures, each as columns of (heading, images in 0..1).

    "patch_features": The three principal components of the patch features of all images, as red, green and blue. The mean of
    each position over the images is subtracted: position is a large part of a ViT's features, and would be most of the picture.
    "attention": The attention of the class token in the last block, a column for each head (DINO, section 4.2.2), if the
    class token is the feature; each picture from its least to its greatest, as in the authors' code.

    Args:
        images: (N, C, H, W) normalized.
        originals: The same images on the scale 0..1.
    """
    stride = backbone.stride

    def patch_features(images: Tensor) -> Tensor:
        patches = backbone.encode(images)[:, backbone.num_prefix :]  # (N, L, D)
        return patches.transpose(1, 2).unflatten(2, backbone.grid)  # (N, D, rows, columns)

    features = (
        at_offsets(patch_features, images, stride).float().movedim(1, -1)
    )  # (N, rows, columns, D), finer than patches
    if len(features) > 1:
        features = features - features.mean(dim=0)
    colors = principal_components(features.flatten(0, 2), 3).view(*features.shape[:3], 3).movedim(-1, 1)
    pictures = {"patch_features": [("original", originals), ("patch features", enlarged(colors, images))]}
    if isinstance(backbone, ViT) and backbone.has_attention_maps:
        maps = at_offsets(backbone.attention_maps, images, stride)  # (N, heads, rows, columns)
        low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
        maps = enlarged((maps - low) / (high - low).clamp(min=1e-12), images)
        heads = [(f"head {number + 1}", heat(maps[:, number])) for number in range(maps.shape[1])]
        pictures["attention"] = [("original", originals), *heads]
    return pictures
