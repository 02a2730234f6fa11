"""The settings of every command: names, defaults, and their lines in --help. cli/check_settings.py checks keys and types."""

import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from sslvision.errors import UsageError

Sections = Mapping[str, str | None]  # the callable whose parameters a section holds; None: the one its `_target_` names


def option(default: Any, text: str) -> Any:
    """Declare a setting and its line in --help."""
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


def at_least(settings: Any, **least: int) -> None:
    """Raise UsageError if one of the settings is smaller than it may be."""
    for key, smallest in least.items():
        if getattr(settings, key) < smallest:
            raise UsageError(f"{key}={getattr(settings, key)} is too small: it must be {smallest} or more.")


def _positive(settings: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"{key}={value} must be a number above 0.")


def check_folder_name(name: str | None) -> None:
    """Raise UsageError if a run folder cannot have this name."""
    if name is not None and (name in ("", ".", "..") or set(name) & set('/\\:*?"<>|\0')):
        raise UsageError(f"name={name} is not a plain folder name; output_dir=... sets a whole path.")


_BACKBONE = "sslvision.backbones.build.build_backbone"
_TRAINER = "pytorch_lightning.Trainer"
RUN = "a run folder, an export/, an official MAE or DINO checkpoint, or a timm model (weights are downloaded)"
_COMPILE = "compile blocks and loss with torch.compile (default: only on CUDA); evaluation is never compiled"
_GRAPHS = "launch a step's kernels as CUDA graphs (default: with ViT and Swin on one CUDA device)"
_CHECKPOINTING = "recompute activations in the backward pass instead of storing them: same results, less memory, slower"
_TIMEOUT = "seconds that a process waits for the others before the run ends: more than writing a checkpoint takes"
_OPTIONS = "any option of pytorch_lightning.Trainer: devices, strategy, num_nodes, precision, ..."


@dataclass
class Pretrain:
    """All settings of a pretraining run."""

    sections: ClassVar[Sections] = {"method": None, "backbone": _BACKBONE, "data": None, "trainer": _TRAINER}
    # Parameters that other settings give.
    elsewhere: ClassVar[tuple[str, ...]] = ("backbone", "lr", "mean", "std", "seed")

    method: dict[str, Any] = option({}, "settings of the method; mask_ratio=0.6 is short for method.mask_ratio=0.6")
    backbone: dict[str, Any] = option(
        {},
        "name (any timm model; for MAE a ViT or Swin), image_size (side, or [height,width]), pool, and any timm option: "
        "patch_size, depth, ...",
    )
    data: dict[str, Any] = option(
        {}, "embedded | digits | folder | torchvision; data.root, data.channels, data.workers, data.cache=disk|ram, ..."
    )
    epochs: int = option(100, "passes over the training images")
    budget: str | None = option(
        None,
        "time for training, such as 90s, 30m, 2h or 3d, instead of epochs: the updates that fill it are measured first",
    )
    max_steps: int | None = option(
        None,
        "optimizer updates of the run, instead of epochs; what the recipe counts in epochs keeps its share of the run",
    )
    batch_size: int = option(256, "images per optimizer update, over all devices and accumulated batches together")
    base_lr: float = option(
        1.5e-4, "learning rate per 256 images: the peak learning rate is base_lr x batch_size / 256"
    )
    lr: float | None = option(None, "peak learning rate, instead of base_lr")
    seed: int = option(0, "random seed for weights, data order, crops and masks")
    name: str | None = option(None, "name of the run folder in outputs/ (default: recipe and time)")
    output_dir: str | None = option(None, "path of the run folder, instead of outputs/<name>")
    overwrite: bool = option(False, "delete what is in the run folder first")
    resume: str | None = option(
        None,
        "auto: resume from the last good checkpoint in the run folder, if there is one; or the path of a checkpoint",
    )
    init_from: str | None = option(
        None,
        "start from the weights of a run, an export, a checkpoint of MAE, DINO, DINOv2, SwAV or MoCo, or a timm name",
    )
    dry_run: bool | Literal["plan"] = option(
        False,
        "true: run two steps of everything, then stop: training, evaluation, export, figures; plan: print what each device "
        "would hold and send, and the largest batch that fits, for any devices, and stop",
    )
    plan_gb: float = option(80.0, "dry_run=plan: memory of a device, in GB")
    logger: Literal["csv", "wandb", "tensorboard"] = option(
        "csv", "csv | wandb | tensorboard; metrics.csv is always written"
    )
    knn_every_epochs: int = option(
        10,
        "epochs between measurements of k-NN accuracy and RankMe, with figures, during training; in a shorter run, one after "
        "half of it (0: none)",
    )
    knn_every_steps: int | None = option(
        None, "optimizer updates between such measurements, in addition: for epochs that take hours"
    )
    probe_data: str | None = option(
        None, "folder of labeled images that the features are evaluated on, if the training images have no labels"
    )
    health: Literal["warn", "stop"] = option("warn", "warn | stop: what to do when training has collapsed")
    max_skipped: int = option(
        5, "consecutive updates that may be skipped because of non-finite gradients, before the run stops"
    )
    checkpoint_every_epochs: int = option(10, "epochs between checkpoints (checkpoints/last.ckpt)")
    checkpoint_every_steps: int | None = option(
        2000, "optimizer updates between checkpoints, in addition (null: none in addition)"
    )
    keep_checkpoints: int = option(
        3, "number of checkpoints kept: last.ckpt, last-1.ckpt, ...; with 2 or more, a damaged one does no harm"
    )
    evaluate_images: int = option(50_000, "maximum number of training images for k-NN and linear probe")
    activation_checkpointing: bool = option(False, _CHECKPOINTING)
    compile: bool | None = option(None, _COMPILE)
    cuda_graphs: bool | None = option(None, _GRAPHS)
    timeout: int = option(1800, _TIMEOUT)
    trainer: dict[str, Any] = option({}, _OPTIONS)
    about: str = option("", "description of the recipe, in one line")
    reference: str = option("", "scores reported by others for this recipe")

    def __post_init__(self) -> None:
        at_least(self, epochs=1, batch_size=1, knn_every_epochs=0, evaluate_images=1, seed=0)
        at_least(self, checkpoint_every_epochs=1, keep_checkpoints=1, max_skipped=0, timeout=1)
        _positive(self, "base_lr", "lr", "checkpoint_every_steps", "knn_every_steps", "max_steps", "plan_gb")
        check_folder_name(self.name)
        if self.dry_run not in (True, False, "plan"):
            raise UsageError(f"dry_run={self.dry_run} is unknown: it is true, false or plan.")
        for section in ("method", "data"):
            if "_target_" not in getattr(self, section):
                raise UsageError(f"The recipe names no {section}: give {section}._target_, as the included recipes do.")
        if "name" not in self.backbone and self.init_from is None:
            raise UsageError(
                "The recipe names no backbone: give backbone.name, any timm model such as vit_small_patch16_224, or init_from, "
                "weights whose backbone is used."
            )
        if self.budget is not None and not self.budget_seconds:
            raise UsageError(f"budget={self.budget} must be a time above 0, such as 90s, 30m, 2h or 3d.")

    @property
    def peak_lr(self) -> float:
        """Return the peak learning rate of the global batch."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256

    @property
    def budget_seconds(self) -> float | None:
        """Return the budget in seconds; None without one, or for what is no time."""
        return seconds_of(self.budget)


@dataclass
class Probe:
    """All settings of a probe of frozen features."""

    sections: ClassVar[Sections] = {"backbone": _BACKBONE, "data": None}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: str | None = option(None, f"the backbone to measure: {RUN}")
    data: dict[str, Any] = option(
        {}, "embedded | digits | folder | torchvision; data.root, ... (default: those of the run)"
    )
    backbone: dict[str, Any] = option(
        {}, "image_size, pool (token | avg), and any timm option that shall differ from the run's"
    )
    pretrained: bool = option(True, "false: the same network with random weights")
    protocol: Literal["fast", "mae", "dino"] = option(
        "fast", "linear probe: fast (L-BFGS, seconds), or as in the papers: mae (LARS), dino (SGD)"
    )
    k: list[int] = option([10, 20, 100, 200], "numbers of neighbors for k-NN")
    views: int = option(
        1,
        "protocols mae and dino: random crops of each image; 1: the whole image; the papers': one crop for each epoch",
    )
    last_blocks: int | None = option(
        None, "protocol dino: number of last blocks whose class tokens are used (default: 4; for ViT-B and larger 1)"
    )
    pixels: bool = option(
        True,
        "also measure raw pixels (32x32, or as many in the shape of the images), on at most 10,000 images: the score to beat",
    )
    train_images: int = option(0, "maximum number of training images, drawn at random (0: all)")
    seed: int = option(0, "random seed for drawing images, order and crops")
    batch_size: int = option(256, "images per forward pass; does not change the scores")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device that computes the features")
    name: str | None = option(None, "name of the results folder in outputs/ (default: run, data and protocol)")
    output_dir: str | None = option(None, "path of the results folder, instead of outputs/<name>")
    features_dir: str = option("outputs/features", "cache of features; may be deleted at any time")

    def __post_init__(self) -> None:
        at_least(self, views=1, train_images=0, seed=0, batch_size=1)
        check_folder_name(self.name)
        _needs_run_and_data(self)
        if not self.k or min(self.k) < 1:
            raise UsageError(f"k={self.k} must be one or more whole numbers above 0, such as k=[10,20].")


@dataclass
class Finetune:
    """All settings of a fine-tuning run, or of a comparison."""

    sections: ClassVar[Sections] = {
        "method": "sslvision.methods.supervised.Supervised",
        "backbone": _BACKBONE,
        "data": None,
        "trainer": _TRAINER,
    }
    elsewhere: ClassVar[tuple[str, ...]] = (
        *("backbone", "classes", "labels", "validation_labels", "lr", "mean", "std", "seed"),
    )

    run: str | None = option(None, f"the backbone to start from: {RUN}")
    method: dict[str, Any] = option(
        {},
        "settings of the method: freeze, layer_decay, mixup, optimizer, ...; freeze=0.5 is short for method.freeze=0.5",
    )
    backbone: dict[str, Any] = option(
        {},
        "image_size, pool (token | avg), drop_path_rate, drop_rate, and any timm option that shall differ from the run's",
    )
    data: dict[str, Any] = option(
        {}, "embedded | digits | folder | torchvision; data.root, ... (default: those of the run)"
    )
    epochs: int = option(20, "passes over the training images")
    min_updates: int = option(300, "minimum number of optimizer updates, for small data sets")
    batch_size: int = option(
        64, "images per optimizer update, over all devices together (fewer if the data set is smaller)"
    )
    lr_ratio: float = option(0.1, "learning rate as a fraction of the pretraining learning rate, both per 256 images")
    base_lr: float | None = option(None, "learning rate per 256 images, instead of lr_ratio")
    lr: float | None = option(None, "peak learning rate, instead of lr_ratio and base_lr")
    head_first: bool = option(True, "train the head on frozen features first, then all layers (LP-FT)")
    scratch: bool = option(True, "also train the same network from random weights, for comparison")
    scratch_lr_ratio: float = option(1.0, "scratch: its learning rate as a fraction of the pretraining learning rate")
    scratch_warmup: float = option(
        0.1, "scratch: fraction of its updates in which the learning rate rises; warmup_epochs, if that is more"
    )
    scratch_longer: int = option(3, "scratch: its number of updates as a multiple, since it starts from random weights")
    labels_per_class: Any = option(
        None,
        "number of labeled images per class, including those held out (default: all); with compare=true a list",
    )
    randaugment: int = option(0, "magnitude of RandAugment, 0 to 30 (0: none)")
    holdout: float = option(
        0.1, "fraction of the training images held out for validation, if the data have no validation images"
    )
    evaluations: int = option(20, "number of validations during the run")
    patience: int = option(
        0, "stop after this many validations without improvement (0: never); the best weights, up to noise, are kept"
    )
    compare: bool = option(
        False,
        "measure label efficiency: from scratch, frozen, partial and full fine-tuning, at several numbers of labels",
    )
    seeds: int = option(3, "compare: number of repetitions, each with different labeled images, order and weights")
    lr_ratios: list[float] = option([0.03, 0.1, 0.3, 1.0], "compare: learning rate ratios that every arm is tried with")
    seed: int = option(0, "random seed for the head's weights, data order, crops and held-out images")
    name: str | None = option(None, "name of the run folder in outputs/ (default: run, data and time)")
    output_dir: str | None = option(None, "path of the run folder, instead of outputs/<name>")
    overwrite: bool = option(False, "delete what is in the run folder first")
    resume: str | None = option(None, "auto: resume from the last good checkpoint in the run folder, if there is one")
    dry_run: bool = option(False, "run two steps of everything, then stop")
    max_skipped: int = option(
        5, "consecutive updates that may be skipped because of non-finite gradients, before the run stops"
    )
    keep_checkpoints: int = option(
        2, "number of checkpoints kept: last.ckpt, last-1.ckpt, ...; with 2 or more, a damaged one does no harm"
    )
    logger: Literal["csv", "wandb", "tensorboard"] = option(
        "csv", "csv | wandb | tensorboard; metrics.csv is always written"
    )
    activation_checkpointing: bool = option(False, _CHECKPOINTING)
    compile: bool | None = option(None, _COMPILE)
    trainer: dict[str, Any] = option({}, _OPTIONS)
    about: str = option("", "description of the recipe, in one line")
    reference: str = option("", "scores reported by others for this recipe")

    def __post_init__(self) -> None:
        at_least(
            self, epochs=0, min_updates=0, batch_size=1, randaugment=0, evaluations=1, patience=0, scratch_longer=1
        )
        at_least(self, keep_checkpoints=1, max_skipped=0, seeds=1, seed=0)
        _positive(self, "lr_ratio", "base_lr", "lr", "scratch_lr_ratio")
        check_folder_name(self.name)
        _needs_run_and_data(self)
        if not 0 <= self.holdout <= 0.5:
            raise UsageError(f"holdout={self.holdout} must be a fraction of the training images, from 0 to 0.5.")
        if not 0 <= self.scratch_warmup < 1:
            raise UsageError(
                f"scratch_warmup={self.scratch_warmup} must be a fraction of the updates, from 0 to below 1."
            )
        if self.epochs == 0 and self.min_updates == 0:
            raise UsageError("epochs=0 and min_updates=0 leave nothing to do: give one of them.")
        if self.randaugment > 30:
            raise UsageError(f"randaugment={self.randaugment} must be a magnitude from 1 to 30, or 0 for none.")
        if not self.lr_ratios or min(self.lr_ratios) <= 0:
            raise UsageError(f"lr_ratios={self.lr_ratios} must be one or more numbers above 0.")
        if self.resume not in (None, "auto"):
            raise UsageError(
                f"resume={self.resume}: a fine-tuning run can only be resumed in its own folder: resume=auto."
            )
        self.labels_per_class = _labels(self.labels_per_class, several=self.compare)


@dataclass
class Predict:
    """All settings of labeling new images."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: str | None = option(None, "folder of a fine-tuned run, or its export/")
    images: str | None = option(
        None, "a folder of images, with any subfolders, a .zip, .tar or list (.csv, ...) of images, or one image"
    )
    output: str | None = option(
        None,
        "path of the CSV file (default: predictions.csv in the run folder; predictions-2.csv if there is one, ...)",
    )
    overwrite: bool = option(False, "replace the CSV file if it exists")
    top: int = option(5, "number of most likely classes to list for each image")
    batch_size: int = option(256, "images per forward pass")
    workers: int | None = option(None, "data loader processes (default: number of cores, minus one)")
    max_pixels: int = option(100_000_000, "images with more pixels are not read; the row says so")
    value_range: Any = option("auto", "beyond 8 bits, what becomes black and white: [low,high] (default: of the run)")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device to run on")

    def __post_init__(self) -> None:
        at_least(self, top=1, batch_size=1, max_pixels=1)
        for key, example in (("run", "run=outputs/<name>"), ("images", "images=photos")):
            if getattr(self, key) is None:
                raise UsageError(f"{key} is not given: say {example}.")


def seconds_of(budget: str | None) -> float | None:
    """Return a time such as 30m in seconds; None without one, or for what is no time."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", budget or "")
    return None if found is None else float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def _needs_run_and_data(settings: Probe | Finetune) -> None:
    if settings.run is None:
        raise UsageError(f"run is not given: say run=..., {RUN}.")
    if "_target_" not in settings.data:
        raise UsageError(
            f"No labeled images: {settings.run} has no data of its own. Give data=embedded, data=digits, data=folder "
            "data.root=..., data=list data.file=..., data=hf data.path=..., data=webdataset data.urls=... or data=torchvision"
        )
    if "name" in settings.backbone:
        raise UsageError(f"backbone.name cannot be given: run={settings.run} determines the backbone.")


def _labels(value: Any, *, several: bool) -> Any:
    """Return labels_per_class as a number or None, or, if several may be, as a list of numbers and "all"."""
    values = value if isinstance(value, list) else [1, 2, 5, 10, 50, "all"] if value is None and several else [value]
    fine = all(one == "all" or one is None or (type(one) is int and one > 0) for one in values)
    if not values or not fine or (len(values) > 1 and not several):
        wanted = "a list of whole numbers above 0, and all" if several else "a whole number above 0"
        hint = "" if several else "; several are for compare=true"
        raise UsageError(f"labels_per_class={value} must be {wanted}{hint}.")
    values = ["all" if one is None else one for one in values]
    return values if several else None if values[0] == "all" else values[0]


def locate(section: str, target: Any) -> Callable[..., Any]:
    """Return the class or function that a `_target_` names.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        found = pkgutil.resolve_name(str(target))
    except Exception as error:
        where = "Is its name MODULE.NAME, and its file in the current folder or on PYTHONPATH?"
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{section}._target_={target} cannot be imported: {told}. {where}") from error
    return cast(Callable[..., Any], found)
