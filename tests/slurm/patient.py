"""MAE that waits at an update of a job for what a test does to that job."""

import os
import time
from pathlib import Path

from sslvision.methods.mae import MAE
from sslvision.training.callbacks.stop_on_signal import StopOnSignal

UPDATE = 5  # counted from 1


class PatientMAE(MAE):
    """In a job of SLURM, it leaves a file `waiting` after an update, and waits there for a signal.

    It takes no notice of signals if there is a file `stubborn`, and does not wait if there is a file `go`. A run that is
    resumed behind that update does not wait.
    """

    def after_update(self, clock):
        super().after_update(clock)
        if (
            clock.step != UPDATE - 1
            or os.environ.get("SLURM_ARRAY_TASK_ID", "0") != "0"
            or "SLURM_JOB_ID" not in os.environ
        ):
            return
        signals = next(one for one in self.trainer.callbacks if isinstance(one, StopOnSignal))
        Path("waiting").touch()
        while not Path("go").exists() and (Path("stubborn").exists() or not signals._received):
            time.sleep(0.1)
