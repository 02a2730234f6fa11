"""What --help prints."""

import dataclasses
from typing import Any

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sslvision.cli.recipes import Command

ABOUT = {
    "pretrain": "Pretrain a vision backbone on unlabeled images.",
    "probe": "Measure frozen features of a backbone on labeled images: k-NN and a linear probe.",
    "finetune": "Fine-tune a backbone on a small labeled set, and show what pretraining was worth.",
    "predict": "Label new images with a fine-tuned run.",
}
EXAMPLES = {
    "pretrain": (
        ("recipe=mae", "MAE on the embedded images, to the end, in minutes on a CPU"),
        ("recipe=dino health=stop", "DINO; end the run if the teacher collapses"),
        (
            "recipe=mae data=folder data.root=photos data.channels=3 backbone.image_size=64",
            "on your own images, any folder",
        ),
        (
            "recipe=mae data=torchvision data.name=CIFAR10 data.root=sets data.download=true",
            "on a labeled torchvision set",
        ),
        ("recipe=mae mask_ratio=0.6 epochs=50 name=less-hidden", "other settings, a name for the run's folder"),
        ("-m recipe=mae mask_ratio=0.5,0.75,0.9", "a sweep: one run for each value"),
        (
            "recipe=mae trainer.devices=8 trainer.num_nodes=4 trainer.strategy=ddp",
            "any option of the Lightning trainer",
        ),
        ("recipe=mae name=a resume=auto", "go on with run `a` where it stopped"),
        ("recipe=mae dry_run=true", "two steps of everything: is all in order?"),
        ("recipe=mae --cfg job", "print the composed settings and stop"),
        ("recipe=my/own.yaml", "your own recipe: copy one of recipes/pretrain/ and change it"),
    ),
    "probe": (
        ("run=outputs/a", "a pretraining run, on the labels of its own data"),
        ("run=outputs/a data=digits", "the same features on other images"),
        ("run=outputs/a data=folder data.root=photos", "your own, in a folder for each class"),
        ("run=outputs/a protocol=mae views=90", "the linear probe of the MAE paper; protocol=dino is DINO's"),
        ("run=outputs/a pretrained=false", "the same network with random weights"),
        ("run=vit_small_patch16_224.dino data=folder data.root=photos", "weights that timm downloads"),
    ),
    "finetune": (
        ("run=outputs/a data=folder data.root=photos", "the head first, then all of it, and the same from scratch"),
        ("run=outputs/a data=digits freeze=0.5", "the lower half of the blocks stays as it is"),
        ("run=outputs/a labels_per_class=10 mixup=0.8 label_smoothing=0.1", "ten labeled images of each class"),
        ("run=outputs/a patience=5 optimizer=sgd optimizer_options.momentum=0.9", "stop early; any timm optimizer"),
        ("run=outputs/a compare=true 'labels_per_class=[1,10,all]' seeds=3", "is it worth it? four arms, tuned alike"),
        (
            "recipe=mae_vitb16_in1k run=mae_pretrain_vit_base.pth data=folder data.root=imagenet",
            "the authors' weights and settings",
        ),
    ),
    "predict": (
        ("run=outputs/a images=photos", "a CSV of labels and probabilities"),
        ("run=outputs/a images=photo.jpg output=photo.csv", "one image"),
    ),
}


def print_help(console: Console, command: Command[Any]) -> None:
    """Print usage, recipes, examples and all settings."""
    console.print(f"{ABOUT[command.name]}\n")
    recipe = "" if not command.recipes else "\\[recipe=NAME] " if command.recipe else "recipe=NAME "
    needed = "run=... images=... " if command.name == "predict" else "" if command.name == "pretrain" else "run=... "
    console.print(f"[bold]usage:[/] python -m sslvision.{command.name} {recipe}{needed}\\[key=value ...]\n")
    about = [
        (name, str(OmegaConf.select(OmegaConf.load(file), "about", default="")))
        for name, file in command.recipes.items()
    ]
    if about:
        console.print(_table("recipes" + (f" (default: {command.recipe})" if command.recipe else ""), about))
    console.print(
        _table(f"examples (after python -m sslvision.{command.name})", list(EXAMPLES[command.name]), stacked=True)
    )
    console.print(_table("settings", [(f.name, _told(f)) for f in dataclasses.fields(command.kind)]))
    console.print(
        "The settings of a method, a backbone, a data source or the trainer are those of the class or function they name;\n"
        "a recipe's file shows the ones that matter. A wrong key is refused, and the nearest right one named.\n"
        "Exit codes: 0 done, 1 failed, 2 a wrong setting, 3 data, 4 diverged, 5 disk, 130 Ctrl-C, 143 SIGTERM."
    )


def _told(setting: "dataclasses.Field[Any]") -> str:
    """Return a setting's line, with its default if it has one worth telling."""
    default = setting.default_factory() if callable(setting.default_factory) else setting.default
    return setting.metadata["help"] + ("" if default in (None, "", {}) else f" (default: {default})")


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
