"""Reports: one self-contained HTML file for a run, or for several beside one another. Imports nothing slow.

Every command writes one into its run folder, however the run ends; `sslvision report` writes it again, also while the run
goes on.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sslvision.errors import UsageError
from sslvision.figures.report_page import GENERATOR
from sslvision.runs.run_record import STOPPED, RunRecord, read_run, record_stop
from sslvision.system.files import written_whole
from sslvision.workflows.report_of_run import run_page
from sslvision.workflows.report_settings import Report

REPORT = "report.html"


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
        write(runs, file, refresh=settings.every if goes_on else 0)
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


def write(runs: Sequence[RunRecord], file: Path, *, refresh: int = 0) -> None:
    """Write the report of a run, or the comparison of several."""
    text = run_page(runs[0], refresh=refresh)
    with written_whole(file, "w", concurrent=True, encoding="utf-8") as opened:
        opened.write(text)


@contextmanager
def reported(folder: Path, console: Console, *, here: bool = True) -> Iterator[None]:
    """Write the report of a run however the block ends; an error in doing so is told, and costs nothing else.

    Args:
        folder: The run folder, claimed.
        console: Where to print.
        here: Whether this process writes it: only the first of a run.
    """
    try:
        yield
    except BaseException as error:
        if here:
            reason = str(error) or type(error).__name__
            _try(lambda: record_stop(folder, reason), console)
            _try(lambda: write([read_run(folder, own=True)], folder / REPORT), console)
        raise
    if here:
        _try(lambda: (folder / STOPPED).unlink(missing_ok=True), console)
        _try(lambda: write([read_run(folder, own=True)], folder / REPORT), console)


def _try(action: Callable[[], None], console: Console) -> None:
    try:
        action()
    except Exception as error:
        told = f"The report could not be written ({type(error).__name__}: {error}). The run is not affected."
        console.print(f"[yellow]{escape(told)}[/]")
