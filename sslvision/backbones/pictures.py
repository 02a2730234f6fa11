"""What a backbone makes of images, for people to look at."""

import torch
from torch import Tensor

from sslvision.backbones.base import Backbone
from sslvision.backbones.vit import ViT
from sslvision.nn.maps import enlarged, heat, principal_components


@torch.no_grad()
def look_inside(backbone: Backbone, images: Tensor, originals: Tensor) -> dict[str, list[tuple[str, Tensor]]]:
    """Return pictures, each as columns of (heading, images in 0..1).

    "patch_features": the three principal components of all the images' patch features, as red, green and blue.
    "attention": where the class token looks in the last block, a column for each head (DINO, section 4.2.2); of
    backbones with a class token.

    Args:
        images: (N, C, S, S), normalised.
        originals: the same from 0 to 1.
    """
    patches = backbone.encode(images)[:, backbone.num_prefix :].float()  # (N, L, D)
    colours = principal_components(patches.flatten(0, 1), 3).view(len(images), *backbone.grid, 3).permute(0, 3, 1, 2)
    pictures = {"patch_features": [("original", originals), ("patch features", enlarged(colours, images))]}
    if isinstance(backbone, ViT) and (maps := backbone.attention_maps(images)) is not None:
        maps = enlarged(maps / maps.amax(dim=(2, 3), keepdim=True), images)  # (N, heads, S, S)
        heads = [(f"head {number + 1}", heat(maps[:, number])) for number in range(maps.shape[1])]
        pictures["attention"] = [("original", originals), *heads]
    return pictures
