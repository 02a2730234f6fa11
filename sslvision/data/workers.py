"""The loader's processes leave signals to the process that trains: it needs their images until it has saved."""

import os
import signal
import threading


def leave_signals_to_trainer(worker: int) -> None:
    """Go on when a signal goes to all processes of a run: a Ctrl-C, a scheduler's or a service manager's SIGTERM.

    A loader's process ends when the one that trains says so, by its queue or by a SIGTERM, or is gone. For torch's
    `worker_init_fn`.

    Args:
        worker: its number, not used.
    """
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
