"""A search for good settings: trials of one length, by as many processes as there are, each recorded when it is done.

open    images, objective, study; the length of a trial, such that all trials fit the budget
train   the next values that nobody trains and nobody has trained, until there are enough trials or the time is over
report  trials.csv and best.yaml after every trial; the importance of each setting, and a picture, at the end
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sslvision.errors import UsageError
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.training.trainer import silence_lightning
from sslvision.workflows.console import print_configuration, print_findings
from sslvision.workflows.reporting import reports
from sslvision.workflows.search_space import flat_ranges, parse_space, with_setting, with_values
from sslvision.workflows.studies import DONE, SearchPlan, SharedStudy, open_study
from sslvision.workflows.trial_training import Bench, open_bench
from sslvision.workflows.tuning_report import CONTENTS, report, tell, write_done
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

MAY_CHANGE = (
    *("name", "output_dir", "resume", "overwrite", "about", "reference", "logger", "dry_run"),
    *("budget", "trials", "storage", "study", "trainer"),
)
SHARE, LONGEST_S = 0.03, 10.0  # of the budget, for measuring updates; at most so long
SHORTEST = 20  # updates of a trial
POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Length:
    """The length of trials: a share of the recipe's, and the seconds of a trial besides updates, 0 where not measured."""

    share: float
    rest: float = 0.0


@reports
def tune(settings: Tune | TuneFinetune, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Search, or go on with a search.

    Args:
        settings: All settings.
        folder: The folder of the search.
        words: The command line, for the record.

    Returns:
        The content of results.json.

    Raises:
        UsageError: A setting cannot be, the budget is too small, or the folder or study belongs to another search.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    deadline = started + settings.budget_seconds if settings.budget_seconds else None
    silence_lightning()
    plan = SearchPlan(
        str(settings.search),
        parse_space(settings.ranges),
        2 if settings.dry_run else settings.trials,
        settings.points,
        settings.seed,
    )
    bench = open_bench(settings)
    settings = bench.settings  # with the backbone of init_from
    check_extremes(settings, plan, bench)
    with set_up(folder, settings):
        shared = claim(settings, plan, folder, words)
        length = _length(settings, plan, bench, shared, deadline)
    print_configuration(
        console, configuration(settings, plan, bench, shared, length, folder), title=settings.about or folder.name
    )
    print_findings(console, bench.remarks)
    ended = work(settings, bench, shared, length, folder, console, deadline)
    return report(settings, bench, shared, length.share, folder, console, ended=ended, started=started)


def check_extremes(settings: Tune | TuneFinetune, plan: SearchPlan, bench: Bench) -> None:
    """Build what the ends of every range describe, so that an impossible range is refused before anything is trained.

    Raises:
        UsageError: One cannot be.
    """
    for key, one in plan.space.items():
        for value in one.extremes():
            try:
                bench.check(with_setting(settings, key, one.setting(value)))
            except UsageError as error:
                raise UsageError(f"ranges.{key}, at {value}: {error}") from error


@contextlib.contextmanager
def set_up(folder: Path, settings: Tune | TuneFinetune) -> Iterator[None]:
    """Let one process at a time set up the search in a folder, and keep other commands out of it, not other processes.

    Raises:
        UsageError: The folder is of another command.
    """
    overwrite, turn = settings.overwrite or settings.dry_run, folder / ".set-up"
    if folder.is_dir() and any(folder.iterdir()) and not (turn.exists() or (folder / "study.json").is_file()):
        run_files.claim(folder, overwrite=overwrite, resume=False, shared=True)
    folder.mkdir(parents=True, exist_ok=True)
    with run_files.exclusive(turn):
        overwrite = overwrite and (folder / "config.yaml").is_file()
        run_files.claim(folder, overwrite=overwrite, resume=not overwrite, shared=True)
        yield


def claim(settings: Tune | TuneFinetune, plan: SearchPlan, folder: Path, words: Sequence[str]) -> SharedStudy:
    """Open the study, and describe the search in its folder.

    Raises:
        UsageError: The study is of a search with other settings.
    """
    url, name = settings.storage or f"sqlite:///{folder / 'study.db'}", settings.study or folder.name
    shared = SharedStudy(open_study(url, name, pruner=settings.pruner), plan)
    plain = json.loads(json.dumps(redact(dataclasses.asdict(settings))))
    before: dict[str, Any] = shared.study.user_attrs.get("settings") or {}
    if shared.trials():
        if settings.storage and (settings.overwrite or settings.dry_run):
            raise UsageError(
                f"The study {name} in storage= holds trials, which overwrite=true and dry_run=true do not delete: give another "
                "study=."
            )
        changed = [key for key in plain if before and key not in MAY_CHANGE and plain[key] != before.get(key)]
        if changed:
            differing = ", ".join(f"{key}={plain[key]} (it was {before.get(key)})" for key in changed)
            raise UsageError(
                f"The study {name} is of a search with other settings: {differing}. Use another name= or overwrite=true."
            )
    shared.study.set_user_attr("settings", plain)
    run_files.describe(folder, dataclasses.asdict(settings), words, command="tune", contents=CONTENTS)
    run_files.write_json(folder / "study.json", {"storage": url, "study": name})
    return shared


def _length(
    settings: Tune | TuneFinetune, plan: SearchPlan, bench: Bench, shared: SharedStudy, deadline: float | None
) -> Length:
    """Return the length of trials: that of the study, or one that is chosen now, and kept in it.

    Raises:
        UsageError: The budget is too small.
    """
    if (kept := shared.study.user_attrs.get("length")) is not None:
        return Length(**kept)
    full = bench.full_updates(settings)
    if settings.dry_run:
        length = Length(2 / full)
    elif settings.trial_epochs is not None:
        length = Length(settings.trial_epochs / bench.epochs(settings))
    elif deadline is None:
        length = Length(1.0)
    else:
        seconds = settings.budget_seconds or 0.0
        times = bench.measure(settings, seconds=min(LONGEST_S, SHARE * seconds))
        each = (deadline - time.perf_counter()) / plan.wanted - times.rest
        updates = int(each / times.update)
        if updates < min(SHORTEST, full):
            needed = seconds - (deadline - time.perf_counter()) + plan.wanted * (times.rest + SHORTEST * times.update)
            raise UsageError(
                f"budget={settings.budget} is too small for {plan.wanted} trials: a trial has {times.rest:.1f} s for starting "
                f"and scoring, an update takes {times.update:.3g} s, and a trial would have {max(0, updates)} updates, of "
                f"{min(SHORTEST, full)} or more. Give budget={needed / 60 + 1:.0f}m or more, or fewer trials."
            )
        length = Length(min(1.0, updates / full), times.rest)
    shared.study.set_user_attr("length", dataclasses.asdict(length))
    return length


def configuration(
    settings: Tune | TuneFinetune, plan: SearchPlan, bench: Bench, shared: SharedStudy, length: Length, folder: Path
) -> dict[str, str]:
    """Return what is searched, and how, to check before it begins."""
    full, epochs = bench.full_updates(settings), bench.epochs(settings)
    done = len(shared.ended())
    return {
        **bench.rows(),
        "search": f"{plan.search}, {plan.wanted} trials" + (f", {done} of them done" if done else ""),
        **{f"  {key}": str(text) for key, text in flat_ranges(settings.ranges).items()},
        "length": f"{max(1, round(length.share * full)):,} updates = {length.share * epochs:.3g} epochs a trial, "
        f"{100 * length.share:.3g} % of the recipe",
        **({"pruning": f"{settings.pruner}, at 25, 50 and 75 % of a trial"} if settings.pruner != "none" else {}),
        **({"budget": f"{settings.budget} for this call"} if settings.budget else {}),
        "study": f"{shared.study.study_name} in {'study.db' if settings.storage is None else redact(settings.storage)}",
        "folder": str(folder),
    }


def work(
    settings: Tune | TuneFinetune,
    bench: Bench,
    shared: SharedStudy,
    length: Length,
    folder: Path,
    console: Console,
    deadline: float | None,
) -> str:
    """Train until there is nothing left to do, or the time is over. Return why it ended, in words; empty for the former."""
    waited = False
    while True:
        seconds = [trial.user_attrs["seconds"] for trial in shared.ended() if "seconds" in trial.user_attrs]
        usual = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
        left = None if deadline is None else deadline - time.perf_counter()
        if left is not None and left < usual:
            return f"The budget of {settings.budget} is over: {max(0.0, left):.0f} s are left, and a trial takes {usual:.0f} s."
        trial = shared.next()
        if trial is None:
            return ""
        if isinstance(trial, int):
            if not waited:
                console.print(f"Waiting for {trial} trial(s) of other processes, to train them if these end.")
            waited = True
            time.sleep(POLL_S)
            continue
        number, values = trial.number, dict(trial.params)
        judge = _judge(trial) if settings.pruner != "none" else None
        began = time.perf_counter()
        try:
            with shared.kept_alive(trial):
                found = bench.train(
                    with_values(settings, shared.plan.space, values),
                    share=length.share,
                    folder=folder / "trials" / f"{number:04}",
                    deadline=deadline,
                    rest=length.rest,
                    judge=judge,
                )
        except BaseException:
            shared.release(trial)
            raise
        facts = {**found.facts, "seconds": round(time.perf_counter() - began, 1), "score": found.score}
        if not shared.finish(trial, found.outcome, found.score, **facts):
            console.print(f"Trial {number} was taken for dead, and another process trains it: this result is left out.")
        write_done(settings, bench, shared, length.share, folder)
        tell(console, shared, bench, number, values, found, facts["seconds"])
        if found.outcome not in DONE:
            shared.enqueue(values)  # for a later call
            stopped = f"trial {number} was stopped at update {found.facts['stopped_at']:,}"
            return f"The budget of {settings.budget} is over: {stopped}."


def _judge(trial: Any) -> Callable[[int, float], bool]:
    """Return whether Optuna's pruner would stop a trial, given the percentage that is done and the score."""

    def judge(percent: int, score: float) -> bool:
        trial.report(score, percent)
        return bool(trial.should_prune())

    return judge
