"""Which signals end a run, what they do outside of training, and requeueing by SLURM. Imports nothing slow."""

import os
import signal
import subprocess
import threading
import time
from types import FrameType

# Launchers forward signals to processes that have already received them. A signal after this many seconds is a new one.
SAME_REQUEST_S = 2.0
FIRST_PROCESS = "SSLVISION_FIRST_PROCESS"  # environment variable: process id of the one that started the others
NOT_REQUEUED = "The job is not requeued: its command has no resume=auto, which it needs to continue."
_job = {"requeued": False}


class Interrupted(BaseException):
    """A signal outside of training. Not an Exception, so that no handler of ordinary errors catches it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def handled_signals() -> list[signal.Signals]:
    """Return the signals that end a run: those that are not ignored, as by nohup."""
    names = ["SIGTERM", "SIGINT", "SIGHUP"] + ["SIGUSR1"] * ("SLURM_JOB_ID" in os.environ)
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [signum for signum in known if signal.getsignal(signum) is not signal.SIG_IGN]


def raise_interrupted() -> None:
    """Make signals raise Interrupted in the main thread; another one, seconds later, ends the process at once."""
    process, raised_at = os.getpid(), 0.0

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal raised_at
        if os.getpid() != process or of_requeueing(signum):  # forked with this handler
            return
        if not raised_at:
            raised_at = time.monotonic()
            raise Interrupted(signum)
        if time.monotonic() - raised_at > SAME_REQUEST_S:  # cleaning up takes too long
            os._exit(128 + signum)

    for signum in handled_signals():
        signal.signal(signum, receive)


def end_at_once() -> None:
    """Let signals end this process without a word: all is said, and what the interpreter does at its exit is not to be told."""
    for signum in handled_signals():
        signal.signal(signum, signal.SIG_DFL)


def started_by_lightning() -> bool:
    """Return whether another process of this run started this one."""
    return "LOCAL_RANK" in os.environ and os.environ.get(FIRST_PROCESS, "") not in ("", str(os.getpid()))


def end_with_launcher() -> None:
    """End this process of several when the one that started it is gone, instead of waiting for it.

    That is the first process if Lightning starts the others, or torchrun.
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


def of_requeueing(signum: int) -> bool:
    """Return whether a signal is the SIGTERM by which SLURM ends a job that has asked to be requeued, and ends anyway."""
    return _job["requeued"] and signum == signal.SIGTERM


def requeue() -> str:
    """Ask SLURM to requeue this job; return the outcome in words. SLURM then sends SIGTERM to all processes of the job."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    _job["requeued"] = True  # before it is done: the SIGTERM may come at once
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        if done.returncode != -signal.SIGTERM:  # scontrol is a process of the job, too
            done.check_returncode()
    except (OSError, subprocess.SubprocessError) as error:
        _job["requeued"] = False
        why = (getattr(error, "stderr", None) or str(error)).strip()
        return f"SLURM did not requeue job {job} ({why}); submit it again to continue."
    return f"SLURM has requeued job {job}, and will start it again when resources are available."
