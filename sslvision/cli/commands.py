"""What each command does with its checked settings: it chooses the run's folder and calls a workflow.

Workflows are imported late: importing torch takes seconds, and wrong settings are refused before.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sslvision.cli.compose import Run
from sslvision.runs.run_folder import choose_run_folder
from sslvision.settings import Finetune, Predict, Pretrain, Probe
from sslvision.workflows.embedding_settings import Cluster, Duplicates, Embed, Outliers, Search, Select
from sslvision.workflows.exporting_settings import Export
from sslvision.workflows.inspecting_settings import Inspect
from sslvision.workflows.packing_settings import Pack
from sslvision.workflows.report_settings import Report
from sslvision.workflows.scaling_settings import Scale
from sslvision.workflows.segmenting_settings import Segment
from sslvision.workflows.tuning_settings import Tune, TuneFinetune


def has_trainings(settings: Any) -> bool:
    """Return whether a command does several trainings, of which it keeps those that have ended."""
    return getattr(settings, "compare", False) or hasattr(settings, "rungs") or hasattr(settings, "ranges")


def folder_of(run: Run[Any]) -> Path | None:
    """Return the folder that a run would have now; None for a command that has none.

    Raises:
        UsageError: As `work`.
    """
    arguments = work(run, run.words).args
    return arguments[1] if len(arguments) > 1 else None


def work(run: Run[Any], words: Sequence[str]) -> functools.partial[Any]:
    """Return the call that does a run: a workflow with its settings, its folder, and the words for its record.

    Raises:
        UsageError: Its options of the Trainer, or the name of its folder, cannot be.
    """
    settings = run.settings
    if isinstance(settings, Predict):
        from sslvision.workflows.predicting import predict_to_csv

        return functools.partial(predict_to_csv, settings)
    if isinstance(settings, Report):
        from sslvision.workflows.reporting import report

        return functools.partial(report, settings)
    if isinstance(settings, Pack):
        from sslvision.workflows.packing import pack

        return functools.partial(pack, settings)
    if isinstance(settings, Search | Duplicates | Outliers | Select | Cluster):
        return functools.partial(_on_embeddings(settings), settings)
    if not isinstance(settings, Probe | Segment | Inspect | Export | Embed):
        from sslvision.training.trainer import check_options

        check_options(settings.trainer, pretrains=isinstance(settings, Pretrain))
    if isinstance(settings, Pretrain) and settings.dry_run == "plan":  # leaves nothing on the disk
        from sslvision.workflows.planning import plan

        return functools.partial(plan, settings)
    workflow, name, dated = _workflow(settings, run.recipe)
    return functools.partial(workflow, settings, choose_run_folder(settings, name, run.suffix, dated=dated), words)


def _on_embeddings(settings: Search | Duplicates | Outliers | Select | Cluster) -> Callable[..., Path]:
    """Return the workflow of a command that works with embeddings."""
    if isinstance(settings, Search):
        from sslvision.workflows.searching import search

        return search
    if isinstance(settings, Duplicates):
        from sslvision.workflows.finding_duplicates import find_duplicates

        return find_duplicates
    if isinstance(settings, Outliers):
        from sslvision.workflows.finding_outliers import find_outliers

        return find_outliers
    if isinstance(settings, Select):
        from sslvision.workflows.selecting import select

        return select
    from sslvision.workflows.clustering import cluster

    return cluster


def _workflow(
    settings: Pretrain | Probe | Segment | Finetune | Inspect | Export | Embed, recipe: str
) -> tuple[Callable[..., Any], str, bool]:
    """Return a workflow, the default name of its run folder, and whether that name gets a date.

    Without a date the same command finds the same folder, and continues or overwrites it.
    """
    if isinstance(settings, Scale):
        from sslvision.workflows.scaling import scale

        return scale, f"scale-{recipe}-{_data(settings)}", False
    if isinstance(settings, Tune | TuneFinetune):
        name = _run_and_data(settings) if isinstance(settings, TuneFinetune) else f"{recipe}-{_data(settings)}"
        if settings.search is None:
            from sslvision.workflows.seven_steps import tune_by_steps

            return tune_by_steps, f"tune-{name}-steps", False
        from sslvision.workflows.tuning import tune

        return tune, f"tune-{name}", False
    if isinstance(settings, Pretrain):
        from sslvision.workflows.pretraining import pretrain

        return pretrain, recipe, True
    if isinstance(settings, Inspect):
        from sslvision.workflows.inspecting import inspect_networks

        return inspect_networks, f"inspect-{_networks(settings)}", False
    if isinstance(settings, Export):
        from sslvision.workflows.exporting import export_network

        return export_network, f"export-{_run(settings)}-{settings.format}", False
    if isinstance(settings, Segment):
        from sslvision.workflows.segmenting import segment

        untrained = "" if settings.pretrained else "-untrained"
        return segment, f"segment-{_run(settings)}-{Path(settings.masks or '').resolve().name}{untrained}", False
    name = _run_and_data(settings)
    if isinstance(settings, Embed):
        from sslvision.workflows.embedding import embed

        return embed, f"embed-{name}{'' if settings.pretrained else '-untrained'}", False
    if isinstance(settings, Probe):
        from sslvision.workflows.probing import probe

        untrained = "" if settings.pretrained else "-untrained"
        return probe, f"probe-{name}-{settings.protocol}{untrained}", False
    if settings.compare:
        from sslvision.workflows.comparison import compare

        return compare, f"compare-{name}", False
    from sslvision.workflows.finetuning import finetune

    return finetune, f"finetune-{name}", True


def _run_and_data(settings: Probe | Finetune | Embed) -> str:
    """Return the names of a run and its data as one word for folders: mae-digits."""
    return f"{_run(settings)}-{_data(settings)}"


def _run(settings: Probe | Segment | Finetune | Export | Embed) -> str:
    """Return the name of a run as one word for folders."""
    run = Path(str(settings.run))
    return re.sub(r"[^\w.-]", "_", (run.parent if run.name == "export" else run).name)


def _data(settings: Pretrain | Probe | Finetune | Embed) -> str:
    """Return the name of the data as one word for folders."""
    target = str(settings.data["_target_"]).rsplit(".", 1)[-1].removeprefix("open_")
    return re.sub(r"[^\w.-]", "_", settings.data.get("name") or Path(settings.data.get("root") or target).name)


def _networks(settings: Inspect) -> str:
    """Return the names of networks as one word for folders: of three or fewer all of them."""
    names = [Path(run).parent.name if Path(run).name == "export" else Path(run).name for run in settings.run]
    names += settings.backbone.get("name", [])
    shown = names if len(names) <= 3 else [names[0], f"and-{len(names) - 1}-more"]
    return re.sub(r"[^\w.-]", "_", "-".join(shown))
