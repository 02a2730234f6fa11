"""Model cards of the exports that training writes, after the scores are known."""

from pathlib import Path

from sslvision.backbones.load import load_backbone
from sslvision.exports.model_card import write_card

EXPORTS = {"export": "", "export-best": "best_"}  # folder in a run: prefix of its scores in results.json


def write_cards_of_run(folder: Path) -> None:
    """Write README.md into the exports of a run, from the files of the run."""
    for name, prefix in EXPORTS.items():
        if (folder / name / "config.json").is_file():
            loaded = load_backbone(folder / name)
            write_card(
                folder / name,
                loaded,
                name=folder.name + name.removeprefix("export"),
                format="timm",
                run=folder,
                scores=prefix,
            )
