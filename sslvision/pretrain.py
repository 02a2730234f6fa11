"""The command line of stage one: `python -m sslvision.pretrain recipe=mae`. What it runs is in stage_one.py."""

from sslvision import commandline
from sslvision.config import PRETRAIN
from sslvision.settings import Pretrain


def main() -> None:
    """Pretrain a backbone on unlabelled images."""
    commandline.run(PRETRAIN, _work)


def _work(settings: Pretrain, recipe: str, number: str) -> None:
    from sslvision.stage_one import pretrain  # seconds of imports, after all that can be refused was

    pretrain(settings, commandline.run_folder(settings, recipe, number), words=commandline.typed)


if __name__ == "__main__":
    main()
