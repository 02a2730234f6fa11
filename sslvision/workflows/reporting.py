"""Reports: one self-contained HTML file for a run, or for several beside one another. Imports nothing slow.

Every command writes one into its run folder, however the run ends; `sslvision report` writes it again, also while the run
goes on.
"""

import functools
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

from rich.console import Console
from rich.markup import escape

from sslvision.errors import UsageError
from sslvision.figures.report_page import GENERATOR
from sslvision.runs.run_record import STOPPED, RunRecord, read_run, record_stop
from sslvision.system.files import written_whole
from sslvision.system.signals import Interrupted
from sslvision.workflows.report_of_run import run_page
from sslvision.workflows.report_of_runs import runs_page
from sslvision.workflows.report_of_scaling import scaling_page
from sslvision.workflows.report_of_tuning import tuning_page
from sslvision.workflows.report_settings import Report

REPORT = "report.html"
Given = ParamSpec("Given")
Result = TypeVar("Result")


def report(settings: Report) -> Path:
    """Write the report of a run into its folder, or the comparison of several to `output`; return the path of the file.

    With `follow`, write it again until all runs have ended.

    Raises:
        UsageError: A folder is not of a run, or the file is not one that this command wrote.
    """
    console = Console(soft_wrap=True, highlight=False)
    folders = [Path(folder) for folder in settings.run]
    runs = [read_run(folder) for folder in folders]
    file = output_of(settings, folders)
    while True:
        goes_on = settings.follow and any(run.status == "running" for run in runs)
        write(runs, file, refresh=settings.every if goes_on else 0, layout=settings.map)
        console.print(f"{'Writing every ' + str(settings.every) + ' s' if goes_on else 'Written'}: {escape(str(file))}")
        if not goes_on:
            return file
        time.sleep(settings.every)
        runs = [read_run(folder) for folder in folders]


def output_of(settings: Report, folders: Sequence[Path]) -> Path:
    """Return where the report is written, after checking that it replaces nothing else."""
    default = folders[0] / REPORT if len(folders) == 1 else folders[0].absolute().parent / REPORT
    file = Path(settings.output) if settings.output is not None else default
    if file.is_dir():
        raise UsageError(f"output={file} is a folder: give the path of a file, such as output={file / REPORT}.")
    if not file.absolute().parent.is_dir():
        raise UsageError(f"output={file}: there is no folder {file.absolute().parent}.")
    if file.exists() and GENERATOR not in file.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise UsageError(
            f"output={file} exists, and is not a report of sslvision, so it is not replaced: give another path."
        )
    return file


def write(runs: Sequence[RunRecord], file: Path, *, refresh: int = 0, layout: Literal["tsne", "umap"] = "tsne") -> None:
    """Write the report of a run, or the comparison of several."""
    text = one_page(runs[0], refresh=refresh, layout=layout) if len(runs) == 1 else runs_page(runs, refresh=refresh)
    # Names of files need not be valid text.
    with written_whole(file, "w", concurrent=True, encoding="utf-8", errors="backslashreplace") as opened:
        opened.write(text)


def one_page(run: RunRecord, *, refresh: int = 0, layout: Literal["tsne", "umap"] = "tsne") -> str:
    """Return the report of one folder, by what kind of run it is."""
    if run.kind == "tune":
        return tuning_page(run, refresh=refresh)
    if run.kind == "scale":
        return scaling_page(run, refresh=refresh)
    return run_page(run, refresh=refresh, layout=layout)


def reports(
    workflow: Callable[Concatenate[Any, Path, Given], Result],
) -> Callable[Concatenate[Any, Path, Given], Result]:
    """Let a workflow (settings, folder, ...) write the report of its run, however it ends; an error in doing so costs nothing.

    A workflow that ends before it has written the folder's config.yaml, as when the folder is another run's, writes none.
    """

    @functools.wraps(workflow)
    def call(settings: Any, folder: Path, *arguments: Given.args, **options: Given.kwargs) -> Result:
        before, console = _written_at(folder), Console(soft_wrap=True, highlight=False)
        try:
            result = workflow(settings, folder, *arguments, **options)
        except BaseException as error:
            if _is_first() and _written_at(folder) != before:
                reason = _reason(error)
                without_cost(lambda: record_stop(folder, reason), STOPPED, console)
                without_cost(lambda: write([read_run(folder, own=True)], folder / REPORT), REPORT, console)
            raise
        if _is_first() and _written_at(folder) != before:
            without_cost(lambda: (folder / STOPPED).unlink(missing_ok=True), STOPPED, console)
            without_cost(lambda: write([read_run(folder, own=True)], folder / REPORT), REPORT, console)
        return result

    return call


def _written_at(folder: Path) -> int:
    """Return when config.yaml was written, in nanoseconds; 0 if there is none."""
    file = folder / "config.yaml"
    return file.stat().st_mtime_ns if file.is_file() else 0


def _is_first() -> bool:
    """Return whether this is the first process of a run, as its launcher tells it."""
    ranks = (os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ)
    return next(ranks, "0") == "0"


def _reason(error: BaseException) -> str:
    """Return why a run ended: the message, the name of a signal, or that of the error."""
    if isinstance(error, Interrupted):
        return f"{signal.Signals(error.signum).name} outside of training."
    return str(error) or type(error).__name__


def without_cost(action: Callable[[], object], what: str, console: Console) -> None:
    """Do what a run can do without; an error is told, and costs nothing else."""
    try:
        action()
    except Exception as error:
        told = f"{what} could not be written ({type(error).__name__}: {error}). The run is not affected."
        console.print(f"[yellow]{escape(told)}[/]")
