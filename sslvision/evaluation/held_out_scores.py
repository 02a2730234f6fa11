"""The scores of a pretrained method on held-out images, with their standard errors over sets of as many images."""

import math

import torch

from sslvision.augment.randomness import ImageRandom
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source, Splits
from sslvision.errors import DataError
from sslvision.evaluation.confidence import standard_error
from sslvision.evaluation.features import Extraction, extract_features, sample_indices
from sslvision.evaluation.knn import knn_top
from sslvision.methods.base import Method
from sslvision.methods.mae import MAE

MASKS = 1  # seed of the masks of the held-out loss, the same for every method
DRAW = 50  # images whose mean loss counts as one draw for its standard error, which takes two draws


def knn_error(method: Method, splits: Splits, *, at_most: int, how: Extraction) -> tuple[float, float]:
    """Return the k-NN error (k = 20) on the test images in percent, and its standard error.

    Args:
        method: The method, whose frozen features are used.
        splits: Labeled images; the training images are the neighbors.
        at_most: Maximal number of images of each, a random sample if there are more.
        how: How features are computed.

    Raises:
        DataError: No image can be read, or features are not finite.
    """
    labeled = []
    for source in (splits.train, splits.test):
        assert source is not None
        assert source.labels is not None
        indices, features = extract_features(
            method.pretrained(), method.normalize, source, sample_indices(source, at_most, seed=0), how=how
        )
        if not len(indices):
            raise DataError(f"None of the images of {source.name} can be read.")
        labeled += [features, source.labels[indices]]
    top1, _ = knn_top(*labeled)
    return 100 - top1, standard_error(top1, len(labeled[2]))


@torch.no_grad()
def held_out_loss(method: MAE, source: Source, *, at_most: int, how: Extraction) -> tuple[float, float]:
    """Return MAE's loss on whole images that it was not trained on, with masks that depend on the image alone; and its error.

    Args:
        method: The method.
        source: The images.
        at_most: Maximal number of them, a random sample if there are more.
        how: How they are read and encoded.

    Raises:
        DataError: One draw of images can be read, or fewer.
    """
    backbone, device = method.backbone, method.mask_token.device
    rows, columns = backbone.grid
    indices = sample_indices(source, at_most, seed=0)
    loader = evaluation_loader(
        source, backbone.image_size, indices, batch_size=DRAW, workers=how.workers, crop_pct=backbone.crop_pct
    )
    was_training, losses, counts = method.training, [], []
    method.eval()
    for where, images in loader:
        if len(where):
            index = where.to(device)
            noise = ImageRandom(MASKS, torch.zeros_like(index), index).uniform("mask", rows * columns)
            with torch.autocast(device.type, dtype=how.precision, enabled=how.precision != torch.float32):
                loss = method.losses([method.normalize(images.to(device)), noise], None)["loss"]
            losses.append(float(loss))
            counts.append(len(where))
    method.train(was_training)
    if len(losses) < 2:
        raise DataError(
            f"{source.name} has too few held-out images that can be read for a loss: more than {DRAW} are needed."
        )
    values, weights = torch.tensor(losses).double(), torch.tensor(counts).double() / sum(counts)
    mean = float(values @ weights)
    return mean, math.sqrt(float(weights @ (values - mean) ** 2) / (len(losses) - 1))
