"""Which signals end a run, what they do outside of training, and SLURM's queue. (Imports nothing that takes time.)"""

import os
import signal
import subprocess
import threading
import time
from types import FrameType

# Launchers pass signals on to processes that have received them already. Who asks again later means it.
SAME_REQUEST_S = 2.0
FIRST_PROCESS = (
    "SSLVISION_FIRST_PROCESS"  # how a process that Lightning starts learns the id of the one that started it
)
NOT_REQUEUED = (
    "The job is not put back into the queue, since its command has no resume=auto, with which it would go on."
)


class Interrupted(BaseException):
    """A signal outside of training. No Exception: nothing on the way may take it for a failure that it can live with."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def handled_signals() -> list[signal.Signals]:
    """Return the signals that end a run: those that this process was not told to ignore, as nohup does."""
    names = ["SIGTERM", "SIGINT", "SIGHUP"] + ["SIGUSR1"] * ("SLURM_JOB_ID" in os.environ)
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [signum for signum in known if signal.getsignal(signum) is not signal.SIG_IGN]


def raise_interrupted() -> None:
    """Have signals raise Interrupted in the main thread; another one, seconds later, ends the process at once."""
    process, raised_at = os.getpid(), 0.0

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        if os.getpid() != process:  # forked with this handler
            return
        if not raised_at:
            raised_at = time.monotonic()
            raise Interrupted(signum)
        if time.monotonic() - raised_at > SAME_REQUEST_S:  # what is being put in order takes too long
            os._exit(128 + signum)

    for signum in handled_signals():
        signal.signal(signum, receive)


def started_by_lightning() -> bool:
    """Return whether another process of this run started this one."""
    return "LOCAL_RANK" in os.environ and os.environ.get(FIRST_PROCESS, "") not in ("", str(os.getpid()))


def end_with_launcher() -> None:
    """Have this process end when the one that started it for a run of several is gone, rather than wait or go on for it.

    That is the first process, if Lightning starts the others, or torchrun.
    """
    if started_by_lightning():
        launcher = int(os.environ[FIRST_PROCESS])
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
    else:
        os.environ[FIRST_PROCESS] = str(os.getpid())
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def requeue() -> str:
    """Ask SLURM to put this job back into its queue; return what became of it, in words."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        return f"SLURM did not put job {job} back into its queue ({why}); submit it again to go on."
    return f"SLURM has job {job} back in its queue and starts it again when there is room."
