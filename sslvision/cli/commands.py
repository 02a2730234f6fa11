"""What each command does with its checked settings: it names the run's folder and calls the workflow.

Workflows are imported late: importing torch takes seconds, and what can be refused is refused before.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslvision.cli.run_folders import choose_run_folder
from sslvision.settings import Finetune, Predict, Pretrain, Probe


def pretrain(settings: Pretrain, recipe: str, number: str, words: Sequence[str]) -> dict[str, Any]:
    """Pretrain a backbone on unlabeled images."""
    from sslvision.workflows.pretraining import pretrain

    return pretrain(settings, choose_run_folder(settings, recipe, number), words)


def probe(settings: Probe, recipe: str, number: str, words: Sequence[str]) -> dict[str, Any]:
    """Measure frozen features of a backbone on labeled images."""
    from sslvision.workflows.probing import probe

    name = f"probe-{_run_and_data(settings)}-{settings.protocol}" + ("" if settings.pretrained else "-untrained")
    return probe(settings, choose_run_folder(settings, name, number, dated=False), words)


def finetune(settings: Finetune, recipe: str, number: str, words: Sequence[str]) -> Any:
    """Fine-tune a backbone on a small labeled set, and show what pretraining was worth."""
    name = _run_and_data(settings)
    if settings.compare:  # no date in the name: the same command continues where it was stopped
        from sslvision.workflows.comparison import compare

        return compare(settings, choose_run_folder(settings, f"compare-{name}", number, dated=False), words)
    from sslvision.workflows.finetuning import finetune

    return finetune(settings, choose_run_folder(settings, f"finetune-{name}", number), words)


def predict(settings: Predict, recipe: str, number: str, words: Sequence[str]) -> Path:
    """Label new images with a fine-tuned run."""
    from sslvision.workflows.predicting import predict_to_csv

    return predict_to_csv(settings)


def _run_and_data(settings: Probe | Finetune) -> str:
    """Return the names of a run and its data as one word for folders: mae-digits."""
    run = Path(str(settings.run))
    run = run.parent if run.name == "export" else run
    target = str(settings.data["_target_"]).rsplit(".", 1)[-1].removeprefix("open_")
    data = settings.data.get("name") or Path(settings.data.get("root") or target).name
    return re.sub(r"[^\w.-]", "_", f"{run.name}-{data}")


WORK: dict[str, Callable[..., Any]] = {work.__name__: work for work in (pretrain, probe, finetune, predict)}
