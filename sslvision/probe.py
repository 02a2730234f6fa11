"""The command line of the evaluation: `python -m sslvision.probe run=... data=...`. What it runs is in probing.py."""

from sslvision import commandline
from sslvision.config import PROBE
from sslvision.settings import Probe


def main() -> None:
    """Measure frozen features of a backbone on labelled images."""
    commandline.run(PROBE, _work)


def _work(settings: Probe, recipe: str, number: str) -> None:
    from sslvision.probing import probe

    what = f"probe-{commandline.run_and_data(settings)}-{settings.protocol}" + (
        "" if settings.pretrained else "-untrained"
    )
    probe(settings, commandline.run_folder(settings, what, number, dated=False), words=commandline.typed)


if __name__ == "__main__":
    main()
