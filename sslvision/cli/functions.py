"""The commands as functions, for scripts and notebooks.

    import sslvision

    results = sslvision.pretrain("mae", epochs=2, data="folder", **{"data.root": "photos"}, method={"mask_ratio": 0.6})
    sslvision.probe("outputs/mae-20260101-120000", data="digits")

Settings are those of the command line, as Python values: nothing is parsed. The settings of a section are written with a dot
or as a dictionary. They are checked as the command line's are; what goes wrong is raised as an exception of sslvision.errors.
Signals are left alone, and environment variables and warning filters are restored.
"""

import os
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslvision.cli.commands import work
from sslvision.cli.compose import compose_values
from sslvision.cli.recipes import (
    COMMANDS,
    EXPORT,
    FINETUNE,
    INSPECT,
    PREDICT,
    PRETRAIN,
    PROBE,
    REPORT,
    SCALE,
    TUNE,
    Command,
)
from sslvision.cli.surroundings import surroundings_restored
from sslvision.runs.run_folder import RUN_FOLDER
from sslvision.system.failures import explained


def pretrain(recipe: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Pretrain a backbone on unlabeled images.

    Args:
        recipe: Name of an included recipe, such as "mae" or "dino", or the path of a .yaml file, also the config.yaml of a
            run. Not needed to resume a run: pretrain(resume="auto", name="first").
        settings: Any settings of `python -m sslvision.pretrain --help`.

    Returns:
        The content of the run's results.json.

    Raises:
        UsageError, DataError, Diverged, StorageError: See sslvision.errors.
    """
    return dict(_call(PRETRAIN, _with(settings, recipe=recipe)))


def probe(run: str | Path, **settings: Any) -> dict[str, Any]:
    """Measure frozen features of a backbone on labeled images, by k-NN and a linear probe.

    Args:
        run: Folder of a run, or any other weights that `python -m sslvision.probe run=...` takes.
        settings: Any settings of `python -m sslvision.probe --help`.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return dict(_call(PROBE, {"run": run, **settings}))


def finetune(run: str | Path | None = None, **settings: Any) -> Any:
    """Fine-tune a backbone on labeled images.

    Args:
        run: Folder of a run, or any other weights that `python -m sslvision.finetune run=...` takes. Not needed to resume a
            run: finetune(resume="auto", name="first").
        settings: Any settings of `python -m sslvision.finetune --help`.

    Returns:
        The content of results.json; with compare=True a list with a cell for each arm and number of labels.

    Raises:
        UsageError, DataError, Diverged, StorageError: See sslvision.errors.
    """
    return _call(FINETUNE, _with(settings, run=run))


def predict(run: str | Path, images: str | Path, **settings: Any) -> Path:
    """Label images with a fine-tuned run.

    Args:
        run: Folder of a fine-tuned run.
        images: A folder of images, or one image.
        settings: Any settings of `python -m sslvision.predict --help`.

    Returns:
        The path of the CSV file with the predictions.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return Path(_call(PREDICT, {"run": run, "images": images, **settings}))


def scale(recipe: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Train a ladder of sizes, shares of the images and lengths, and fit the power laws that they follow.

    Args:
        recipe: Name of an included recipe of pretraining, or the path of a .yaml file.
        settings: Any settings of `python -m sslvision.scale --help`.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError, Diverged, StorageError: See sslvision.errors.
    """
    return dict(_call(SCALE, _with(settings, recipe=recipe)))


def report(run: str | Path | Sequence[str | Path], **settings: Any) -> Path:
    """Write the report of a run as one HTML file, or compare several runs.

    Args:
        run: Folder of a run, or several.
        settings: Any settings of `python -m sslvision.report --help`.

    Returns:
        The path of the file.

    Raises:
        UsageError, StorageError: See sslvision.errors.
    """
    return Path(_call(REPORT, {"run": _several(run), **settings}))


def tune(recipe: str | Path | None = None, *, run: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Search for good settings of pretraining, or, with run, of fine-tuning.

    Args:
        recipe: Name of an included recipe, or the path of a .yaml file.
        run: Folder of a run, or any other weights, to fine-tune.
        settings: Any settings of `python -m sslvision.tune --help`; ranges={"base_lr": "log(1e-4,1e-2)"}.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return dict(_call(TUNE, _with(settings, recipe=recipe, run=run)))


def segment(run: str | Path, masks: str | Path, **settings: Any) -> dict[str, Any]:
    """Measure the features of patches on images with masks.

    Args:
        run: Folder of a run, or any other weights that `python -m sslvision.segment run=...` takes.
        masks: Folder of images and masks.
        settings: Any settings of `python -m sslvision.segment --help`.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return dict(_call(COMMANDS["segment"], {"run": run, "masks": masks, **settings}))


def embed(run: str | Path | None = None, **settings: Any) -> dict[str, Any]:
    """Write the embeddings of images to files.

    Args:
        run: Folder of a run, or any other weights that `python -m sslvision.embed run=...` takes.
        settings: Any settings of `python -m sslvision.embed --help`.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return dict(_call(COMMANDS["embed"], _with(settings, run=run)))


def search(embeddings: str | Path, image: str | Path | Sequence[str | Path], **settings: Any) -> Path:
    """Find the images that are nearest to an image.

    Args:
        embeddings: A folder that `embed` wrote.
        image: Path of an image, or several.
        settings: Any settings of `python -m sslvision.search --help`.

    Returns:
        The path of the CSV file.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return Path(_call(COMMANDS["search"], {"embeddings": embeddings, "image": _several(image), **settings}))


def duplicates(embeddings: str | Path, **settings: Any) -> Path:
    """Find images that are copies of one another; arguments, result and errors as of `search`, without `image`."""
    return Path(_call(COMMANDS["duplicates"], {"embeddings": embeddings, **settings}))


def outliers(embeddings: str | Path, **settings: Any) -> Path:
    """Find the images that are least like any others; arguments, result and errors as of `search`, without `image`."""
    return Path(_call(COMMANDS["outliers"], {"embeddings": embeddings, **settings}))


def select(embeddings: str | Path, n: int = 100, **settings: Any) -> Path:
    """Choose n images to label first; other arguments, result and errors as of `search`, without `image`."""
    return Path(_call(COMMANDS["select"], {"embeddings": embeddings, "n": n, **settings}))


def cluster(embeddings: str | Path, k: int = 10, **settings: Any) -> Path:
    """Group images that are alike into k clusters; other arguments, result and errors as of `search`, without `image`."""
    return Path(_call(COMMANDS["cluster"], {"embeddings": embeddings, "k": k, **settings}))


def pack(output_dir: str | Path, **settings: Any) -> dict[str, Any]:
    """Write images as tar shards with an index.

    Args:
        output_dir: Folder of the shards.
        settings: Any settings of `python -m sslvision.pack --help`, such as data="photos".

    Returns:
        Counts of images, shards and bytes, and the path of the index.

    Raises:
        UsageError, DataError, StorageError: See sslvision.errors.
    """
    return dict(_call(COMMANDS["pack"], {"output_dir": str(output_dir), **settings}))


def inspect(
    name: str | Sequence[str] | None = None, *, run: str | Path | Sequence[str | Path] | None = None, **settings: Any
) -> dict[str, Any]:
    """Measure what networks cost and what they see: parameters, FLOPs, memory, receptive fields, images per second.

    Args:
        name: Name of a timm model, or several; they have random weights.
        run: Folder of a run, or any other weights that `python -m sslvision.inspect run=...` takes, or several.
        settings: Any settings of `python -m sslvision.inspect --help`, except the name of the results folder, which
            output_dir gives.

    Returns:
        The content of inspect.json.

    Raises:
        UsageError, StorageError: See sslvision.errors.
    """
    return dict(_call(INSPECT, _with(settings, **{"backbone.name": _several(name), "run": _several(run)})))


def export(run: str | Path, **settings: Any) -> dict[str, Any]:
    """Export a network to a folder that timm or transformers loads, to ONNX, or to a program of torch.export.

    Args:
        run: Folder of a run, or any other weights that `python -m sslvision.export run=...` takes.
        settings: Any settings of `python -m sslvision.export --help`.

    Returns:
        The content of export.json: the deviation from the original, and how it was measured.

    Raises:
        UsageError, StorageError, SSLVisionError: See sslvision.errors.
    """
    return dict(_call(EXPORT, {"run": run, **settings}))


def _several(value: str | Path | Sequence[str | Path] | None) -> list[str] | None:
    """Return one or several names or paths as a list."""
    values = [value] if isinstance(value, str | Path) else value
    return None if values is None else [str(one) for one in values]


class CallableModule(types.ModuleType):
    """A command's module that can be called: `import sslvision.pretrain` replaces the function of that name by it."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Call the function of the same name."""
        return globals()[self.__name__.rpartition(".")[2]](*arguments, **settings)


def _with(settings: Mapping[str, Any], **first: Any) -> dict[str, Any]:
    """Return settings with those given by position, except None."""
    return {**{key: value for key, value in first.items() if value is not None}, **settings}


def _call(command: Command[Any], settings: Mapping[str, Any]) -> Any:
    with surroundings_restored(), warnings.catch_warnings():
        try:
            run = compose_values(settings, command)
            return work(run, run.words)()
        except Exception as error:
            told = explained(error, os.environ.get(RUN_FOLDER))
            if told is None or told is error:
                raise
            raise told from error
