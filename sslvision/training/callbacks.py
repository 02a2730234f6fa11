"""What happens beside training: the count of unreadable images, a look at the features on the way, pictures."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sslvision.data.base import Source, Splits
from sslvision.data.batch import Batch
from sslvision.data.loading import evaluation_loader
from sslvision.downstream.features import chosen_places, extract_features
from sslvision.downstream.knn import SIMILARITIES_AT_ONCE, knn_top
from sslvision.downstream.place import place_for
from sslvision.downstream.rankme import rankme
from sslvision.errors import DataError
from sslvision.methods.base import Method
from sslvision.nn.compiled import eagerly
from sslvision.training.pictures import picture_figure
from sslvision.training.trainer import compute_dtype

PICTURED = 16  # held-out images in a picture


class UnreadableImages(Callback):
    """Count, name and bound the images that cannot be read.

    Each process watches its own share; the first one gathers and writes the names after every epoch, and at the end.

    Args:
        source: the training images.
        file: unreadable.csv of the run folder.
        max_unreadable: the share of the training images that may be unreadable.
    """

    def __init__(self, source: Source, file: Path, max_unreadable: float):
        self.source, self.file, self.max_unreadable = source, file, max_unreadable
        self.found: dict[int, str] = {}  # place: reason

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Take note of what the loader could not read for this batch.

        Raises:
            DataError: too many, or none that could stand in.
        """
        self.found.update(batch.unreadable)
        if batch.unreadable and (not batch.crops or len(self.found) > self.max_unreadable * len(self.source)):
            self._write()
            raise DataError(
                f"{self.summary()} That is more than data.max_unreadable={self.max_unreadable:g} of them: mend or remove "
                "them, or raise data.max_unreadable."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather and write the names."""
        if trainer.world_size > 1:
            shares: list[dict[int, str]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.found)
            self.found = {place: reason for share in shares for place, reason in share.items()}
        if self.found and trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run is to know."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.found = dict(state_dict["found"])

    def summary(self) -> str:
        """Return in words how many could not be read, the first of them by name, and where all are named."""
        examples = [f"{self.source.describe(place)} ({reason})" for place, reason in sorted(self.found.items())[:3]]
        return (
            f"{len(self.found)} of {len(self.source)} images cannot be read and others stood in for them: "
            f"{', '.join(examples)}{', ...' if len(self.found) > 3 else ''}; all are named in {self.file}."
        )

    def _write(self) -> None:
        with open(self.file, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "reason"])
            rows.writerows([self.source.describe(place), reason] for place, reason in sorted(self.found.items()))


class OnlineEvaluation(Callback):
    """RankMe and, with labels, k-NN accuracy (k = 20) of frozen features every so many epochs, on all processes together.

    Args:
        splits: the neighbours, whose features' RankMe it is, and the held-out images.
        labelled: whether there is k-NN accuracy; the last epoch is then left to the evaluation after training.
        every_epochs: how often.
        at_most: training images used, drawn if there are more; a look on the way need not be exact.
        workers: loader processes.
    """

    def __init__(self, splits: Splits, *, labelled: bool, every_epochs: int, at_most: int = 10_000, workers: int = 0):
        self.labelled, self.every_epochs, self.workers = labelled, every_epochs, workers
        sources = [splits.train, splits.test] if labelled else [splits.train]
        self.looked_at = [(source, chosen_places(source, at_most, seed=0)) for source in sources if source is not None]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate, log, and show it in the progress bar."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        if not (last or epoch % self.every_epochs == 0) or (last and self.labelled):
            return
        assert isinstance(pl_module, Method)
        found: list[Tensor] = []
        # By now the data module knows how many processes share the cores.
        workers = getattr(getattr(trainer, "datamodule", None), "workers", self.workers)
        for source, places in self.looked_at:
            where, features = extract_features(
                pl_module.pretrained(),
                pl_module.normalize,
                source,
                places,
                workers=workers,
                precision=compute_dtype(trainer),
                rank=trainer.global_rank,
                world=trainer.world_size,
            )
            found += [features] if source.labels is None else [features, source.labels[where]]
        if not all(tensor.isfinite().all() for tensor in found):
            return  # updates are being left out, see skipped.py; it is not for a look on the way to end the run
        place = place_for(pl_module.device, 4 * found[0].nbytes + 16 * SIMILARITIES_AT_ONCE)  # training may need it all
        found[0] = found[0].to(place)
        metrics = {"rankme": rankme(found[0])}
        if self.labelled and all(len(part) for part in found):  # whether none can be read is told at the end
            metrics["knn_top1"], _ = knn_top(*found)
        for name, value in metrics.items():
            trainer.callback_metrics[name] = torch.tensor(value)
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": epoch}, step=trainer.global_step)


class Pictures(Callback):
    """What the method makes of held-out images, drawn every so many epochs while training.

    Args:
        source: held-out images.
        folder: figures/ of the run folder.
        every_epochs: how often.
    """

    def __init__(self, source: Source, folder: Path, *, every_epochs: int):
        self.source, self.folder, self.every_epochs = source, folder, every_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw on the way; the last pictures are drawn when training is over."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every_epochs == 0 and epoch != trainer.max_epochs and trainer.is_global_zero:
            assert isinstance(pl_module, Method)
            draw_pictures(pl_module, self.source, self.folder, trainer.loggers, trainer.global_step)


def draw_pictures(method: Method, source: Source, folder: Path, loggers: list[Any], step: int) -> None:
    """Write the method's pictures of some held-out images, spread over the source, and hand them to the loggers."""
    places = torch.linspace(0, len(source) - 1, min(PICTURED, len(source))).long().tolist()
    _, images = next(iter(evaluation_loader(source, method.crops[0].size, places)))
    if not len(images):
        return
    was_training = method.training
    method.eval()
    with eagerly():
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
