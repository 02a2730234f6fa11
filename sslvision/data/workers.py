"""The loader's processes: they leave signals, and words, to the process that trains."""

import os
import signal
import sys
import threading
from types import TracebackType

from sslvision.system.allocator import keep_freed_memory


def begin_worker(worker: int) -> None:
    """Prepare a process of the loader, whatever its number; for torch's `worker_init_fn`."""
    leave_signals_to_trainer()
    keep_freed_memory()


def leave_signals_to_trainer() -> None:
    """Go on when a signal goes to all processes of a run: a Ctrl-C, a scheduler's or a service manager's SIGTERM.

    The process that trains needs images until it has saved. One of the loader ends when that one says so, by its queue
    or by a SIGTERM, or is gone. For torch's `worker_init_fn`.

    Args:
        worker: its number, not used.
    """
    sys.excepthook = _leave_words_to_trainer
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent it; macOS has none, and Windows no SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _leave_words_to_trainer(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Print what nobody caught, but for this: the process that trains ended while it was being handed a batch."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
