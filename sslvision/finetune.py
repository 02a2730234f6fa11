"""The command line of stage two: `python -m sslvision.finetune run=... data=...`. What it runs is in stage_two.py."""

from sslvision import commandline
from sslvision.config import FINETUNE
from sslvision.settings import Finetune


def main() -> None:
    """Fine-tune a backbone on a small labelled set, and show what pretraining was worth."""
    commandline.run(FINETUNE, _work)


def _work(settings: Finetune, recipe: str, number: str) -> None:
    what = commandline.run_and_data(settings)
    if settings.compare:  # without a date: the same command goes on where it was stopped
        from sslvision.comparison import compare

        compare(
            settings, commandline.run_folder(settings, f"compare-{what}", number, dated=False), words=commandline.typed
        )
    else:
        from sslvision.stage_two import finetune

        finetune(settings, commandline.run_folder(settings, f"finetune-{what}", number), words=commandline.typed)


if __name__ == "__main__":
    main()
