"""What --help prints."""

import dataclasses

from omegaconf import OmegaConf
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sslvision.config import recipes
from sslvision.schema import Pretrain

EXAMPLES = (
    ("recipe=mae", "MAE on the embedded images, to the end, in minutes on a CPU"),
    ("recipe=dino health=stop", "DINO; end the run if the teacher collapses"),
    (
        "recipe=mae data=folder data.root=photos data.channels=3 backbone.image_size=64",
        "on your own images, any folder",
    ),
    (
        "recipe=mae data=torchvision data.name=CIFAR10 data.root=sets data.download=true",
        "on a labelled torchvision set",
    ),
    ("recipe=mae mask_ratio=0.6 epochs=50 name=less-hidden", "other settings, a name for the run's folder"),
    ("-m recipe=mae mask_ratio=0.5,0.75,0.9", "a sweep: one run for each value"),
    ("recipe=mae trainer.devices=8 trainer.num_nodes=4 trainer.strategy=ddp", "any option of the Lightning trainer"),
    ("recipe=mae name=a resume=auto", "go on with run `a` where it stopped"),
    ("recipe=mae dry_run=true", "two steps of everything: is all in order?"),
    ("recipe=mae --cfg job", "print the composed settings and stop"),
    ("recipe=my/own.yaml", "your own recipe: copy one of recipes/pretrain/ and change it"),
)


def print_help(console: Console) -> None:
    """Print usage, recipes, examples and all settings."""
    console.print("Pretrain a vision backbone on unlabelled images.\n")
    console.print("[bold]usage:[/] python -m sslvision.pretrain recipe=NAME \\[key=value ...]\n")
    about = [
        (name, str(OmegaConf.select(OmegaConf.load(file), "about", default=""))) for name, file in recipes().items()
    ]
    console.print(_table("recipes", about))
    console.print(_table("examples (after python -m sslvision.pretrain)", list(EXAMPLES), stacked=True))
    settings = [
        (
            f.name,
            f.metadata["help"] + ("" if f.default in (dataclasses.MISSING, None, "") else f" (default: {f.default})"),
        )
        for f in dataclasses.fields(Pretrain)
    ]
    console.print(_table("settings", settings))
    console.print(
        "The settings of a method, a backbone, a data source or the trainer are those of the class or function they name;\n"
        "a recipe's file shows the ones that matter. A wrong key is refused, and the nearest right one named."
    )


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
