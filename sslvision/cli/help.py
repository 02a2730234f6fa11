"""What --help prints."""

import dataclasses
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sslvision.cli.recipes import Command
from sslvision.cli.slurm_array import runs_under_slurm
from sslvision.cli.slurm_settings import SlurmJobs

ABOUT = {
    "pretrain": "Pretrain a vision backbone on unlabeled images.",
    "probe": "Measure how good the frozen features of a backbone are, on labeled images: k-NN and linear probe.",
    "segment": "Measure how good the features of patches are, on images with masks: k-NN and linear segmentation.",
    "finetune": "Fine-tune a backbone on labeled images, and compare with training from scratch.",
    "predict": "Label new images with a fine-tuned run.",
    "export": "Export a run to timm, transformers, ONNX or torch.export, compared with the original, with a model card.",
    "inspect": "Measure what networks cost and what they see: FLOPs, memory, receptive fields, speed, filters.",
    "scale": "Train a ladder of sizes and fit scaling laws: what ten times the images, parameters or updates would bring.",
    "report": "Write the report of a run as one HTML file, or compare several runs.",
    "tune": "Tune pretraining, or with run=... fine-tuning, by seven steps or a search, in a given time.",
    "embed": "Write the embeddings of images to files, with their paths, labels and predicted classes.",
    "search": "Find the images that are nearest to an image, by their embeddings.",
    "duplicates": "Find images that are copies of one another: resized, recompressed or changed a little.",
    "outliers": "Find the images that are least like any others.",
    "select": "Choose a diverse subset of the images, to label first.",
    "cluster": "Group images that are alike.",
    "pack": "Write images as tar or Parquet shards with an index, for fast reading and for buckets.",
}
EXAMPLES = {
    "pretrain": (
        ("recipe=mae", "MAE on the included images (10,000 of Fashion-MNIST), minutes on a CPU"),
        ("recipe=dino health=stop", "DINO; stop the run if training collapses"),
        (
            "recipe=mae data=photos data.channels=3 backbone.image_size=64",
            "train on your own images, in any folder; the same as data=folder data.root=photos",
        ),
        (
            'recipe=mae data=photos data.channels=3 "backbone.image_size=[64,128]"',
            "images of 64 pixels in height and 128 in width, instead of squares",
        ),
        (
            "recipe=mae data=torchvision data.name=CIFAR10 data.root=sets data.download=true",
            "train on a torchvision data set",
        ),
        (
            "recipe=mae mask_ratio=0.6 epochs=50 name=less-hidden",
            "other settings, and a name for the run folder, outputs/less-hidden",
        ),
        ("-m recipe=mae mask_ratio=0.5,0.75,0.9", "a sweep: one run for each value, one after another"),
        (
            "-m recipe=mae name=masks mask_ratio=0.5,0.75,0.9 slurm.time=2h slurm.gpus=1",
            "the same as a job array of SLURM; runs that reach the time limit go on by themselves",
        ),
        (
            "recipe=mae trainer.devices=8 trainer.num_nodes=4 trainer.strategy=ddp",
            "32 GPUs; any option of the Lightning Trainer can be given",
        ),
        ("resume=auto name=a", "resume run `a` where it stopped, with its settings"),
        ("recipe=mae dry_run=true", "run two steps of everything, to see whether it works"),
        (
            "recipe=mae_vitl16_in1k data.root=imagenet trainer.devices=8 trainer.num_nodes=8 dry_run=plan plan_gb=80",
            "memory and traffic of each of 64 GPUs, which need not be here, and the largest batch",
        ),
        ("recipe=mae --cfg job", "print all settings and stop"),
        ("recipe=my/own.yaml", "your own recipe: the output of --cfg job, or a copy from recipes/pretrain/, changed"),
        ("recipe=outputs/a/config.yaml data=photos", "the settings of run `a` on other images"),
    ),
    "probe": (
        ("run=outputs/a", "the backbone of a pretraining run, on the labels of its own data"),
        ("run=outputs/a data=digits", "the same backbone on other images"),
        ("run=outputs/a data=folder data.root=photos", "on your own images, in one folder per class"),
        ("run=outputs/a protocol=mae views=90", "with the linear probe of the MAE paper (protocol=dino: that of DINO)"),
        ("run=outputs/a pretrained=false", "the same network with random weights"),
        ("run=vit_small_patch16_224.dino data=folder data.root=photos", "a pretrained timm model, downloaded"),
    ),
    "finetune": (
        (
            "run=outputs/a data=folder data.root=photos",
            "the head first, then all layers; and the same network from scratch",
        ),
        ("run=outputs/a data=digits freeze=0.5", "the lower half of the blocks is frozen"),
        (
            "run=outputs/a labels_per_class=10 mixup=0.8 label_smoothing=0.1",
            "ten labeled images per class, with regularization",
        ),
        ("run=outputs/a patience=5 optimizer=sgd optimizer_options.momentum=0.9", "early stopping; any timm optimizer"),
        ("run=outputs/a compare=true 'labels_per_class=[1,10,all]' seeds=3", "label efficiency of four ways to train"),
        (
            "recipe=mae_vitb16_in1k run=mae_pretrain_vit_base.pth data=folder data.root=imagenet",
            "the MAE authors' weights, with the settings of their paper",
        ),
    ),
    "predict": (
        ("run=outputs/a images=photos", "a CSV file of classes and probabilities for a folder of images"),
        ("run=outputs/a images=photo.jpg output=photo.csv", "one image"),
    ),
    "export": (
        (
            "run=outputs/a format=onnx",
            "model.onnx of any batch size, from uint8 pixels to features (of a classifier: logits)",
        ),
        ("run=outputs/a format=transformers output_dir=hub/a", "a folder that AutoModel and AutoImageProcessor load"),
        ("run=outputs/a format=onnx outputs=features,tokens,attention", "patch tokens and attention maps too"),
        ("run=outputs/a format=onnx normalize=beside", "the caller normalizes the pixels"),
        ("run=outputs/a format=program", "a program of torch.export, which needs torch alone"),
        ("run=outputs/a push=user/name license=mit", "timm's folder with its model card, to the Hugging Face hub"),
    ),
    "inspect": (
        ("backbone.name=resnet50", "one network, layer by layer, at its own image size"),
        (
            "backbone.name=resnet50,vgg16,vit_small_patch16_224 backbone.image_size=224",
            "several in one table, all at 224 pixels",
        ),
        ("run=outputs/a", "the backbone of a run; its first filters beside those before pretraining"),
        ("run=outputs/a backbone.name=resnet18", "a run beside another network"),
        ("backbone.name=vgg16 measure=cost,field", "only what is named: cost, memory, field, speed, filters"),
    ),
    "scale": (
        ("recipe=mae budget=30m", "parameters, images and updates, on the included images, in half an hour"),
        ("recipe=mae budget=30m dry_run=true", "the plan only: which trainings, and how many minutes each takes"),
        ("recipe=mae_photos data.root=photos budget=2h 'axes=[images]' seeds=3", "would more images of yours help?"),
        (
            "recipe=mae budget=30m score=loss",
            "the laws of MAE's held-out loss; what is trained already is not trained again",
        ),
    ),
    "report": (
        ("outputs/a", "outputs/a/report.html: scores, curves, pictures; every run writes it at its end"),
        ("outputs/a follow=true", "while the run goes on; the page loads itself again"),
        (
            "outputs/a outputs/b output=both.html",
            "curves over one another, settings that differ, scores with intervals",
        ),
    ),
    "tune": (
        ("recipe=mae budget=15m", "the seven steps, from the initial loss to a recipe that is ready to run"),
        ("run=outputs/a data=photos 'steps=[1,2,3]'", "fine-tuning: initial loss, a handful of images, and the rate"),
        (
            "recipe=mae search=random 'ranges.base_lr=log(1e-3,1e-1)' trials=20 budget=30m",
            "twenty learning rates, drawn by their logarithms, in half an hour",
        ),
        (
            "recipe=mae search=grid 'ranges.base_lr=log(1e-3,1e-1)' 'ranges.weight_decay=choice(0,0.05)' points=4",
            "a grid of 4 x 2; the same command in a second terminal takes half of its cells",
        ),
        (
            "run=outputs/a search=tpe 'ranges.lr_ratio=log(0.01,1)' 'ranges.mixup=uniform(0,0.8)' 'ranges.freeze=int(0,3)'",
            "fine-tuning of a run, by its validation accuracy; ranges: log, uniform, int, choice",
        ),
        (
            "recipe=dino search=tpe 'ranges.lr=log(1e-4,1e-2)' pruner=median storage=journal:///shared/study.log",
            "bad trials are stopped early, and machines with the same storage= work together",
        ),
    ),
    "segment": (
        ("run=outputs/a masks=scenes", "scenes/images/ and scenes/masks/, with train/ and val/ in them or around them"),
        (
            "run=vit_small_patch14_dinov2 masks=scenes backbone.image_size=448",
            "a pretrained timm model, on larger images",
        ),
        ("run=outputs/a masks=scenes ignore=[0,255]", "two values of masks are no class"),
    ),
    "embed": (
        ("run=outputs/a", "the images of a run by its backbone, in outputs/embed-a-...; the same command goes on"),
        ("run=outputs/a data=photos dtype=float16", "a folder of images; half the size"),
        ("backbone=vit_small_patch16_224.dino data=photos", "a pretrained timm model, downloaded"),
        ("run=outputs/a data=photos format=npz", "files that numpy reads, where pyarrow is not installed"),
    ),
    "search": (
        ("embeddings=outputs/embed-a-photos image=photo.jpg", "the ten nearest images, as a CSV file and a picture"),
        ("embeddings=outputs/embed-a-photos image=a.jpg,b.jpg k=20", "of two images, a row of the picture for each"),
    ),
    "duplicates": (
        ("embeddings=outputs/embed-a-photos", "groups of copies, as a CSV file and a picture"),
        ("embeddings=outputs/embed-a-photos threshold=0.9", "images that are less alike, too"),
    ),
    "outliers": (("embeddings=outputs/embed-a-photos n=50", "the fifty images farthest from their neighbors"),),
    "select": (
        (
            "embeddings=outputs/embed-a-photos n=100",
            "the most typical image of each of a hundred clusters, to label first",
        ),
        ("embeddings=outputs/embed-a-photos n=100 by=cover", "a hundred images that cover all others, rare ones too"),
        (
            "embeddings=outputs/embed-a-photos n=100 labeled=labels.csv",
            "a hundred more, from other clusters",
        ),
    ),
    "pack": (
        ("data=photos output_dir=shards", "a folder of images, as train/ and val/ of shards; the same command goes on"),
        ("data=photos output_dir=shards image_size=256", "photographs shrunk to a short side of 256 pixels"),
        ("data=list data.file=images.csv output_dir=shards shard_size=1000", "of a list, 1,000 images to a shard"),
        ("data=hf data.path=flowers.parquet output_dir=shards", "of a Hugging Face data set"),
        ("data=photos output_dir=table shards=parquet", "a Hugging Face data set, for data=hf data.path=table"),
    ),
    "cluster": (("embeddings=outputs/embed-a-photos k=20", "twenty groups, as a CSV file and a picture"),),
}

OPTIONS = (
    ("-h, --help", "print this help"),
    ("--cfg job", "print all settings and stop"),
    ("-m, --multirun", "one run for each combination of values, key=a,b or key=range(3)"),
)
SECTIONS = (
    "Settings with a dot (data.root=photos) are parameters of the class or function behind that section: the method, timm's\n"
    "model, the data source, Lightning's Trainer. --cfg job shows those that a recipe sets.\n"
)


def print_help(console: Console, command: Command[Any]) -> None:
    """Print usage, options, recipes, examples and all settings."""
    console.print(f"{ABOUT[command.name]}\n")
    recipe = "" if not command.recipes else "\\[recipe=NAME] " if command.recipe else "recipe=NAME "
    needed = {
        "predict": "run=... images=... ",
        "inspect": "backbone.name=... ",
        "report": "RUN_FOLDER ... ",
        "search": "embeddings=... image=... ",
        "pack": "data=... output_dir=... ",
    }
    of_others = "" if command.pretrains else "run=... " if hasattr(command.kind, "run") else "embeddings=... "
    console.print(
        f"[bold]usage:[/] python -m sslvision.{command.name} {recipe}{needed.get(command.name, of_others)}\\[key=value ...]\n"
    )
    console.print(_table("options", list(OPTIONS)))
    about = [
        (name, str(OmegaConf.select(OmegaConf.load(file), "about", default="")))
        for name, file in command.recipes.items()
    ]
    if about:
        console.print(_table("recipes" + (f" (if none is named: {command.recipe})" if command.recipe else ""), about))
    console.print(
        _table(f"examples (after python -m sslvision.{command.name})", list(EXAMPLES[command.name]), stacked=True)
    )
    console.print(_table("settings", [(f.name, _told(f)) for f in dataclasses.fields(command.kind)]))
    if command.with_run is not None:
        known = {f.name for f in dataclasses.fields(command.kind)}
        rest = [f for f in dataclasses.fields(command.with_run.kind) if f.name not in known or f.name == "method"]
        console.print(_table("settings with run=..., besides those of the search", [(f.name, _told(f)) for f in rest]))
    if runs_under_slurm(command.kind):
        about_slurm = "settings of SLURM: slurm.time=2h submits the run, or those of a sweep as a job array"
        console.print(_table(about_slurm, [(f"slurm.{f.name}", _told(f)) for f in dataclasses.fields(SlurmJobs)]))
    console.print(
        f"{SECTIONS if command.kind.sections else ''}"
        "Strings are taken literally (data.root=photos, name=2024_01); quote what the shell would change: 'photos (1)'.\n"
        "Lists are written \\[1,2], no value: null. Wrong keys are refused, with the nearest known one.\n"
        "Exit codes: 0 done, 1 failed, 2 wrong setting, 3 data, 4 diverged, 5 file not written, 130 Ctrl-C, 143 SIGTERM."
    )


def _told(setting: "dataclasses.Field[Any]") -> str:
    """Return the help of a setting, with its default if it has one."""
    default = setting.default_factory() if callable(setting.default_factory) else setting.default
    shown = str(default).lower() if isinstance(default, bool) else default
    return setting.metadata["help"] + ("" if default in (None, "", {}) else f" (default: {shown})")


def _table(title: str, rows: list[tuple[str, str]], *, stacked: bool = False) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False, padding=(0, 1)
    )
    for name, text in rows:
        if stacked:
            table.add_row(f"[cyan]{escape(name)}[/]\n    {escape(text)}")
        else:
            table.add_row(f"[cyan]{escape(name)}[/]", escape(text))
    return table
