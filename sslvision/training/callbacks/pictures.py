"""Pictures of a method's output for held-out images, drawn during training."""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed
from pytorch_lightning.callbacks import Callback

from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source
from sslvision.figures.images import picture_figure
from sslvision.methods.base import Method
from sslvision.nn.compilation import force_eager

IMAGES = 16  # held-out images in a picture


class Pictures(Callback):
    """Draw the method's output for held-out images every N epochs.

    Args:
        source: Held-out images.
        folder: figures/ of the run folder.
        every_epochs: Epochs between pictures.
    """

    def __init__(self, source: Source, folder: Path, *, every_epochs: int):
        self.source, self.folder, self.every_epochs = source, folder, every_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the pictures; those of the last epoch are drawn after training."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_epochs == 0 and epoch != trainer.max_epochs and trainer.is_global_zero:
            assert isinstance(pl_module, Method)
            draw_pictures(pl_module, self.source, self.folder, trainer.loggers, trainer.global_step)


def draw_pictures(method: Method, source: Source, folder: Path, loggers: list[Any], step: int) -> None:
    """Write the method's pictures of some held-out images, spread over the source, and send them to the loggers."""
    indices = torch.linspace(0, len(source) - 1, min(IMAGES, len(source))).long().tolist()
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


def _log_picture(logger: Any, name: str, file: Path, step: int) -> None:
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(name, [str(file)], step=step)
    elif hasattr(getattr(logger, "experiment", None), "add_image"):  # TensorBoard
        from matplotlib.image import imread

        logger.experiment.add_image(name, imread(file)[..., :3], step, dataformats="HWC")
