"""Worker processes of the loader: they leave signals and error messages to the training process."""

import os
import signal
import sys
import threading
from types import TracebackType

from sslvision.system.allocator import keep_freed_memory


def begin_worker(worker: int) -> None:
    """Set a worker process up; for torch's `worker_init_fn`."""
    leave_signals_to_trainer()
    keep_freed_memory()


def leave_signals_to_trainer() -> None:
    """Ignore signals sent to all processes of a run: Ctrl-C, or SIGTERM from a scheduler or service manager.

    The training process needs images until it has saved a checkpoint. A worker ends when the training process tells it to,
    through its queue or by SIGTERM, or is gone.
    """
    sys.excepthook = _leave_words_to_trainer
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # reports the sender; macOS lacks it, and Windows lacks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _leave_words_to_trainer(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print uncaught errors, except that the training process ended while a batch was being sent to it."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
