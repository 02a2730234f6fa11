"""A study that several processes work on: Optuna's storage, and who trains what.

A trial is created with its values and the state WAITING, and a process claims it by setting the state to RUNNING, which a
storage lets only one do. While it trains, it writes the time every BEAT_S seconds. A trial whose process has not done so for
LEASE_S, or whose process on this machine is gone, is dead: whoever sees it first sets it to FAIL and queues its values again.

Values that are trained already, or are being trained, are not trained again. Two processes may come to the same values at
the same time: the trial with the smaller number counts, which both know, as values are there from its creation.
"""

import contextlib
import os
import platform
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslvision.errors import UsageError
from sslvision.workflows.search_space import Range, Values, cells_of, draw, grid, key_of_values

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

BEAT_S, LEASE_S = 5.0, 60.0
ATTEMPTS = 200  # proposals before a space counts as exhausted
TPE_STARTUP = 8  # random trials before TPE learns from them
# Outcomes: a trial ends as one of these, or was lost; those of DONE are not trained again.
TRAINED, DIVERGED, PRUNED, IMPOSSIBLE, CUT, DUPLICATE = (
    *("trained", "diverged", "pruned", "impossible", "cut", "duplicate"),
)
DONE = (TRAINED, DIVERGED, PRUNED, IMPOSSIBLE)
Waiting = int  # how many trials of other processes are waited for


@dataclass(frozen=True)
class SearchPlan:
    """How values are proposed: see the settings of `tune`."""

    search: str
    space: Mapping[str, Range]
    trials: int | None
    points: int
    seed: int

    @property
    def wanted(self) -> int:
        """Return the number of trials."""
        if self.trials is None and self.search == "grid":
            return len(grid(self.space, points=self.points, seed=self.seed))
        return 20 if self.trials is None else self.trials


def import_optuna() -> Any:
    """Return the module optuna.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError('tune needs Optuna: pip install "sslvision[tune]", or pip install "optuna>=4".') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def open_study(url: str, name: str, *, pruner: str) -> "Study":
    """Open a study, or create it.

    Args:
        url: URL of a storage.
        name: Name of the study in it.
        pruner: none, median or hyperband.

    Raises:
        UsageError: The storage cannot be opened.
    """
    optuna = import_optuna()
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4),
        "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=25, max_resource=100, reduction_factor=3),
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental features, which are Optuna's to tell
            if url.startswith("journal://"):
                backend = optuna.storages.journal.JournalFileBackend(url.removeprefix("journal://"))
                storage = optuna.storages.JournalStorage(backend)
            else:
                waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
                storage = optuna.storages.RDBStorage(url, engine_kwargs=waits)
            return optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),
                pruner=pruners[pruner](),
            )
    except Exception as error:
        shown = url.split("@")[-1]  # without a password
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(
            f"storage={shown} cannot be opened ({type(error).__name__}: {told}). Give a URL such as "
            "sqlite:////shared/study.db, postgresql://user:password@host/database or "
            "journal:///shared/study.log, and install its driver."
        ) from error


class SharedStudy:
    """A study, and this process as one of those that work on it."""

    def __init__(self, study: "Study", plan: SearchPlan):
        self.optuna = import_optuna()
        self.study, self.plan = study, plan
        self._lock = threading.Lock()

    def trials(self) -> list["FrozenTrial"]:
        """Return all trials, as they are in the storage."""
        with self._lock:
            return self.study.get_trials(deepcopy=False)

    def ended(self) -> list["FrozenTrial"]:
        """Return the trials that are done and are not trained again, in their order."""
        return [trial for trial in self.trials() if trial.user_attrs.get("outcome") in DONE]

    def next(self) -> "Trial | Waiting | None":
        """Claim the next trial; a number if there is none now, but others train that many; None if there is nothing to do."""
        while True:
            self.requeue_dead()
            if self._count(self.trials())[0] >= self.plan.wanted:
                return None
            if (claimed := self._claim_waiting()) is not None:
                return claimed
            trials = self.trials()
            ended, running = self._count(trials)
            values = self._propose(trials) if ended + running < self.plan.wanted else None
            if values is None:
                return running or None
            self.enqueue(values)

    def _count(self, trials: Sequence["FrozenTrial"]) -> tuple[int, int]:
        """Return how many trials have ended, and how many are running."""
        running = sum(trial.state == self.optuna.trial.TrialState.RUNNING for trial in trials)
        return sum(trial.user_attrs.get("outcome") in DONE for trial in trials), running

    def enqueue(self, values: Values) -> None:
        """Queue values."""
        space = {key: distribution(self.optuna, one) for key, one in self.plan.space.items()}
        waiting = self.optuna.trial.TrialState.WAITING
        with self._lock:
            self.study.add_trial(
                self.optuna.trial.create_trial(state=waiting, params=dict(values), distributions=space)
            )

    def _claim_waiting(self) -> "Trial | None":
        states = self.optuna.trial.TrialState
        for found in self.trials():
            if found.state != states.WAITING:
                continue
            with self._lock, contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):
                storage = self.study._storage
                if not storage.set_trial_state_values(found._trial_id, state=states.RUNNING):
                    continue
                trial: Trial = self.optuna.trial.Trial(self.study, found._trial_id)
                trial.set_user_attr("worker", this_process())
                trial.set_user_attr("alive", time.time())
                if not self._is_duplicate(found):
                    return trial
                trial.set_user_attr("outcome", DUPLICATE)
                self.study.tell(trial, state=states.FAIL)
        return None

    def _is_duplicate(self, trial: "FrozenTrial") -> bool:
        """Return whether an earlier trial with the same values is done, running or waiting."""
        key, states = key_of_values(trial.params), self.optuna.trial.TrialState
        return any(
            key_of_values(other.params) == key
            and other.number < trial.number
            and (other.user_attrs.get("outcome") in DONE or other.state in (states.RUNNING, states.WAITING))
            for other in self.study.get_trials(deepcopy=False)
        )

    def requeue_dead(self) -> int:
        """Queue the trials of processes that are gone again, and return how many."""
        states, requeued = self.optuna.trial.TrialState, 0
        for trial in self.trials():
            if trial.state == states.RUNNING and is_dead(trial.user_attrs, trial.datetime_start):
                requeued += self._fail(trial)
        return requeued

    def release(self, trial: "Trial") -> None:
        """Give back a trial that was interrupted."""
        self._fail(trial)

    def _fail(self, trial: "Trial | FrozenTrial") -> bool:
        """Set a running trial to FAIL, and queue its values again, unless another process has done so."""
        with self._lock:
            try:
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            except (ValueError, self.optuna.exceptions.UpdateFinishedTrialError):
                return False
        self.enqueue(dict(trial.params))
        return True

    def finish(self, trial: "Trial", outcome: str, value: float | None = None, **facts: Any) -> bool:
        """Write what a trial gave. Return False if another process had taken it for dead: its own result counts then."""
        states = self.optuna.trial.TrialState
        state = {TRAINED: states.COMPLETE, DIVERGED: states.COMPLETE, PRUNED: states.PRUNED}.get(outcome, states.FAIL)
        with self._lock:
            try:
                for name, fact in {**facts, "outcome": outcome}.items():
                    trial.set_user_attr(name, fact)
                self.study.tell(trial, value if state == states.COMPLETE else None, state=state)
            except (ValueError, self.optuna.exceptions.UpdateFinishedTrialError):
                return False
        return True

    @contextlib.contextmanager
    def kept_alive(self, trial: "Trial") -> Iterator[None]:
        """Write every BEAT_S seconds that a trial is being trained."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT_S):
                with self._lock, contextlib.suppress(Exception):  # the storage may be busy: there is a next time
                    trial.set_user_attr("alive", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    # Proposals.

    def _propose(self, trials: Sequence["FrozenTrial"]) -> Values | None:
        """Return values that no trial has; None if there are none left."""
        states, plan = self.optuna.trial.TrialState, self.plan
        taken = {
            key_of_values(trial.params)
            for trial in trials
            if trial.user_attrs.get("outcome") in DONE or trial.state in (states.RUNNING, states.WAITING)
        }
        if plan.search == "grid":
            cells = grid(plan.space, points=plan.points, seed=plan.seed)
            return next((cell for cell in cells if key_of_values(cell) not in taken), None)
        cells_left = cells_of(plan.space)
        if cells_left is not None and len(taken) >= cells_left:
            return None
        drawn = draw(plan.space, seed=plan.seed, number=len(trials))
        if plan.search == "tpe" and (learned := self._learned(trials)) is not None:
            drawn = (value for value in (learned, *(next(drawn) for _ in range(ATTEMPTS))))
        for _, values in zip(range(ATTEMPTS), drawn, strict=False):
            if key_of_values(values) not in taken:
                return values
        return None

    def _learned(self, trials: Sequence["FrozenTrial"]) -> Values | None:
        """Return what TPE proposes; None before it has trials to learn from.

        It is asked on a copy in memory, so that a trial has its values from its creation. Trials that others train
        now count as bad ones there, so that processes do not all try the same.
        """
        optuna, states = self.optuna, self.optuna.trial.TrialState
        known = [trial for trial in trials if trial.state == states.COMPLETE]
        if len(known) < TPE_STARTUP:
            return None
        running = [trial for trial in trials if trial.state == states.RUNNING]
        worst = min(trial.value for trial in known if trial.value is not None)
        copy = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=self.plan.seed + len(trials), n_startup_trials=TPE_STARTUP),
        )
        for trial in [*known, *running]:
            value = worst if trial.value is None else trial.value
            copy.add_trial(
                optuna.trial.create_trial(value=value, params=trial.params, distributions=trial.distributions)
            )
        space = {key: distribution(optuna, one) for key, one in self.plan.space.items()}
        asked = copy.ask(fixed_distributions=space).params
        tidy = {
            key: min(max(float(f"{value:.4g}"), self.plan.space[key].low), self.plan.space[key].high)
            for key, value in asked.items()
            if self.plan.space[key].kind in ("log", "uniform")
        }
        return {key: tidy.get(key, asked[key]) for key in self.plan.space}


def distribution(optuna: Any, one: Range) -> "BaseDistribution":
    """Return a range as Optuna has it."""
    if one.kind == "choice":
        return optuna.distributions.CategoricalDistribution(one.choices)
    if one.kind == "int":
        return optuna.distributions.IntDistribution(int(one.low), int(one.high))
    return optuna.distributions.FloatDistribution(one.low, one.high, log=one.kind == "log")


def this_process() -> dict[str, Any]:
    """Return what tells this process from others: where it runs, and its number there."""
    return {"host": host(), "pid": os.getpid()}


def host() -> str:
    """Return what tells a machine, or a container that has process numbers of its own, from others."""
    namespace = Path("/proc/self/ns/pid")
    return f"{platform.node()} {namespace.stat().st_ino if namespace.exists() else ''}".strip()


def is_dead(facts: Mapping[str, Any], started: Any) -> bool:
    """Return whether the process that trains a trial is gone: not on this machine any more, or silent for LEASE_S.

    Args:
        facts: The trial's user attributes.
        started: Its time of start, for a process that ended before it could write any.
    """
    worker = facts.get("worker")
    if worker is not None and worker["host"] == host() and not _is_running(worker["pid"]):
        return True
    last = facts.get("alive", started.timestamp() if started is not None else 0.0)
    return time.time() - float(last) > LEASE_S


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True
