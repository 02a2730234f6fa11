"""Pictures of a method's output for held-out images, drawn during training."""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source, Splits
from sslvision.evaluation.features import DEFAULT, Extraction, extract_features, sample_indices
from sslvision.figures.images import picture_figure
from sslvision.methods.base import Method
from sslvision.nn.compilation import force_eager
from sslvision.training.callbacks.every import Every

IMAGES = 16  # held-out images in a picture
QUERIES, NEIGHBORS, AMONG = 10, 5, 2000  # images, neighbors of each, training images they are looked for among


class Pictures(Callback):
    """Draw the method's output for held-out images every N epochs and N updates.

    Args:
        source: Held-out images.
        folder: figures/ of the run folder.
        every_epochs, every_steps: Epochs and optimizer updates between pictures; None for never.
    """

    def __init__(
        self, source: Source, folder: Path, *, every_epochs: int | None = None, every_steps: int | None = None
    ):
        self.source, self.folder, self.every = source, folder, Every(every_epochs, every_steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw the pictures in mid-epoch."""
        if self.every.after_batch(trainer, batch_idx):
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the pictures; those of the last epoch are drawn after training."""
        if self.every.after_epoch(trainer) and trainer.current_epoch + 1 != trainer.max_epochs:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Method)
        with pl_module.whole() as method:
            if trainer.is_global_zero:
                draw_pictures(method, self.source, self.folder, trainer.loggers, trainer.global_step)


def draw_pictures(method: Method, source: Source, folder: Path, loggers: list[Any], step: int) -> None:
    """Write the method's pictures of some held-out images, spread over the source, and send them to the loggers."""
    indices = _spread(len(source), IMAGES)
    _, images = next(iter(evaluation_loader(source, method.crops[0].shape, indices)))
    if not len(images):
        return
    was_training = method.training
    method.eval()
    with force_eager():
        pictures = method.pictures(images.to(method.device))
    method.train(was_training)
    for name, columns in pictures.items():
        file = folder / f"{name}.png"
        shown = [(heading, images.cpu()) for heading, images in columns]
        figure = picture_figure(shown, title=f"{name.capitalize().replace('_', ' ')} of held-out images, step {step:,}")
        figure.savefig(file)
        for logger in loggers:
            _log_picture(logger, name, file, step)


def draw_neighbors(
    method: Method,
    splits: Splits,
    folder: Path,
    loggers: list[Any],
    step: int,
    *,
    at_most: int = AMONG,
    how: Extraction = DEFAULT,
) -> None:
    """Write neighbors.png: some held-out images, and the training images whose features are nearest, by cosine.

    Args:
        method: The method, with the backbone of `pretrained`.
        splits: The images; without held-out ones, training images are compared with the others.
        folder: figures/ of the run folder.
        loggers: They get the picture, too.
        step: Optimizer updates done.
        at_most: Number of training images to look among, a random sample of at most AMONG.
        how: How features are computed.
    """
    backbone, size = method.pretrained(), method.crops[0].shape
    among = sample_indices(splits.train, min(at_most, AMONG), seed=0)
    asked = splits.train if splits.test is None else splits.test
    looked_up = (
        [among[i] for i in _spread(len(among), QUERIES)] if splits.test is None else _spread(len(asked), QUERIES)
    )
    where, features = extract_features(backbone, method.normalize, splits.train, among, how=how)  # (N,), (N, D)
    queries, of_queries = extract_features(backbone, method.normalize, asked, looked_up, how=how)  # (Q,), (Q, D)
    if len(where) <= NEIGHBORS or not len(queries):
        return
    similarity = F.normalize(of_queries, dim=1) @ F.normalize(features, dim=1).T  # (Q, N)
    if splits.test is None:  # not itself
        similarity.masked_fill_(queries[:, None] == where, -torch.inf)
    nearest = where[similarity.topk(NEIGHBORS, dim=1).indices]  # (Q, NEIGHBORS)
    columns = [("image", _pixels(asked, queries, size))]
    columns += [
        (f"{number}.", _pixels(splits.train, nearest[:, number - 1], size)) for number in range(1, NEIGHBORS + 1)
    ]
    file = folder / "neighbors.png"
    figure = picture_figure(
        columns, title=f"Nearest of {len(where):,} training images by their features, step {step:,}"
    )
    figure.savefig(file)
    for logger in loggers:
        _log_picture(logger, "neighbors", file, step)


def _spread(length: int, number: int) -> list[int]:
    """Return up to so many indices, from the first to the last."""
    return torch.linspace(0, length - 1, min(number, length)).long().tolist()


def _pixels(source: Source, indices: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (n, C, H, W) in 0..1, in the order of the indices."""
    images = dict[int, Tensor]()
    for where, pixels in evaluation_loader(source, size, sorted(set(indices.tolist()))):
        images |= dict(zip(where.tolist(), pixels, strict=True))
    return torch.stack([images[index] for index in indices.tolist()]).float() / 255


def _log_picture(logger: Any, name: str, file: Path, step: int) -> None:
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(name, [str(file)], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
        from matplotlib.image import imread

        logger.experiment.add_image(name, imread(file)[..., :3], step, dataformats="HWC")
