"""Trainings that end before their time: at a deadline, or because a judge says so."""

import time
from types import SimpleNamespace
from unittest import mock

from sslvision.methods.base import Method
from sslvision.training.callbacks.stop_at import Prune, StopAt


def trainer_at(step, of=8):
    return SimpleNamespace(global_step=step, max_steps=of, should_stop=False)


def test_training_ends_at_the_first_update_after_the_deadline_and_a_complete_one_is_not_cut():
    for deadline, step, stopped in ((None, 3, None), (time.perf_counter() + 60, 3, None), (0.0, 3, 3), (0.0, 8, None)):
        stop, trainer = StopAt(deadline), trainer_at(step)
        stop.on_train_batch_end(trainer, None, None, None, 0)
        assert (stop.stopped_at, trainer.should_stop) == (stopped, stopped is not None)


def test_a_training_is_scored_once_at_its_updates_and_ended_by_the_judge():
    judge, method = mock.Mock(side_effect=[False, True]), mock.Mock(spec=Method, training=True)
    prune = Prune([2, 4], lambda trained: 50.0, judge)
    stops = []
    for step in (1, 2, 2, 3, 4):
        trainer = trainer_at(step)
        prune.on_train_batch_end(trainer, method, None, None, 0)
        stops.append(trainer.should_stop)
    assert stops == [False, False, False, False, True]
    assert judge.call_args_list == [mock.call(25, 50.0), mock.call(50, 50.0)]
    assert prune.stopped
    method.train.assert_called_with(True)  # evaluation had put it into eval mode
