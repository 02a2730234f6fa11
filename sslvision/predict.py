"""The command line of use: `python -m sslvision.predict run=... images=...` labels new images with a fine-tuned run."""

import time
from pathlib import Path

from rich.console import Console

from sslvision import commandline
from sslvision.config import PREDICT
from sslvision.settings import Predict


def main() -> None:
    """Label new images with a fine-tuned run."""
    commandline.run(PREDICT, _work)


def _work(settings: Predict, recipe: str, number: str) -> None:
    from sslvision.backbones.load import load_backbone  # seconds of imports, after all that can be refused was
    from sslvision.data.module import available_workers
    from sslvision.downstream.predict import open_images, predict, write_csv
    from sslvision.errors import UsageError
    from sslvision.nn.normalize import Normalize
    from sslvision.training.trainer import choose_kernels, device_of

    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    device = device_of(settings.device)
    choose_kernels(device.type)
    loaded = load_backbone(settings.run or "")
    if not loaded.classes or loaded.mean is None or loaded.std is None:
        raise UsageError(
            f"run={settings.run} has no head and no class names, so it cannot label images: fine-tune it first, "
            f"python -m sslvision.finetune run={settings.run} data=..."
        )
    source = open_images(settings.images or "", channels=loaded.backbone.channels)
    output = Path(settings.output or _beside(settings.run or ""))
    rows = predict(
        loaded.backbone.to(device),
        Normalize(loaded.mean, loaded.std).to(device),
        loaded.classes,
        source,
        batch_size=settings.batch_size,
        workers=available_workers() if settings.workers is None else settings.workers,
        top=settings.top,
    )
    images, problems = write_csv(rows, output, top=min(settings.top, len(loaded.classes)))
    console.print(
        f"{images:,} images in {time.perf_counter() - started:.1f} s, {problems:,} of them unreadable (see the column "
        f"`problem`): {output.absolute()}"
    )


def _beside(run: str) -> Path:
    folder = Path(run)
    return (folder.parent if folder.name == "export" else folder) / "predictions.csv"


if __name__ == "__main__":
    main()
