"""A study that several processes share: each trial is claimed once, the dead are found, and nothing is repeated."""

import os
import subprocess
import sys
import time

import pytest

optuna = pytest.importorskip("optuna")

from sslvision.errors import UsageError  # noqa: E402
from sslvision.workflows import studies  # noqa: E402
from sslvision.workflows.search_space import Range  # noqa: E402
from sslvision.workflows.studies import IMPOSSIBLE, TRAINED, SearchPlan, SharedStudy, open_study  # noqa: E402

SPACE = {"x": Range("uniform", 0.0, 1.0), "y": Range("choice", choices=("a", "b"))}


@pytest.fixture
def opened(tmp_path):
    """Open the same study as one more process would: opened(search, ...)."""

    def another(search="random", trials=None, space=SPACE, points=2):
        study = open_study(f"sqlite:///{tmp_path / 'study.db'}", "one", pruner="none")
        return SharedStudy(study, SearchPlan(search, space, trials, points, seed=0))

    return another


def test_two_processes_share_a_grid_and_no_cell_is_trained_twice(opened):
    one, other = opened("grid"), opened("grid")
    trained = []
    for shared in (one, other, other, one):
        trial = shared.next()
        trained.append(tuple(trial.params.values()))
        assert shared.finish(trial, TRAINED, 1.0)
    assert sorted(trained) == [(0.0, "a"), (0.0, "b"), (1.0, "a"), (1.0, "b")]
    assert one.next() is None
    assert other.next() is None


def test_while_others_train_the_last_trials_a_process_waits_and_takes_over_those_of_the_dead(opened, monkeypatch):
    one, other = opened("random", trials=2), opened("random", trials=2)
    first, second = one.next(), one.next()
    assert other.next() == 2
    one.finish(first, TRAINED, 1.0)
    assert other.next() == 1
    monkeypatch.setattr(studies, "LEASE_S", -1.0)  # silent for longer than that
    taken = other.next()
    assert taken.params == second.params
    monkeypatch.undo()
    assert other.finish(taken, TRAINED, 2.0)
    assert not one.finish(second, TRAINED, 3.0)  # it was taken for dead
    assert [trial.user_attrs["outcome"] for trial in one.ended()] == [TRAINED, TRAINED]
    assert one.next() is None


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    facts = {"alive": time.time(), "worker": {"host": studies.host(), "pid": gone.pid}}
    assert studies.is_dead(facts, None)
    assert not studies.is_dead({**facts, "worker": {"host": "elsewhere", "pid": gone.pid}}, None)
    assert not studies.is_dead({**facts, "worker": {"host": studies.host(), "pid": os.getpid()}}, None)
    assert studies.is_dead({**facts, "worker": {"host": "elsewhere", "pid": 1}, "alive": time.time() - 100}, None)


def test_the_same_values_queued_by_two_processes_are_trained_by_the_first(opened):
    one, other = opened("random", trials=3), opened("random", trials=3)
    for shared in (one, other):
        shared.enqueue({"x": 0.5, "y": "a"})
    trial = one.next()
    assert trial.params == {"x": 0.5, "y": "a"}
    assert other.next().params != trial.params
    outcomes = [found.user_attrs.get("outcome") for found in one.trials()]
    assert outcomes.count(studies.DUPLICATE) == 1


def test_what_is_impossible_is_not_tried_again_and_a_space_of_few_values_ends(opened):
    shared = opened("random", trials=10, space={"y": SPACE["y"]})
    for _ in range(2):
        shared.finish(shared.next(), IMPOSSIBLE, None, error="no")
    assert shared.next() is None
    assert len(shared.ended()) == 2


def test_an_interrupted_trial_is_the_next_one(opened):
    shared = opened("random", trials=3)
    trial = shared.next()
    shared.release(trial)
    assert shared.next().params == trial.params


def test_tpe_learns_from_the_trials_before(opened):
    shared = opened("tpe", trials=40)
    found = []
    while (trial := shared.next()) is not None:
        found.append(trial.params["x"])
        shared.finish(trial, TRAINED, -((trial.params["x"] - 0.3) ** 2))
    late = [abs(x - 0.3) for x in found[-15:]]
    assert sum(late) / len(late) < 0.15  # of random values 0.29


def test_a_storage_that_cannot_be_opened_is_told_without_its_password():
    with pytest.raises(UsageError, match=r"storage=host/none cannot be opened") as error:
        open_study("nosuch://me:hidden-word@host/none", "one", pruner="none")
    assert "hidden-word" not in str(error.value)
