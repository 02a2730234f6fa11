"""The errors a person can cause or meet, each with the exit code of its kind.

A message says what was wrong, what was expected, and what to do.
"""


class SSLVisionError(Exception):
    """An error that is explained in words; entry points print it without a traceback and exit with its code."""

    exit_code = 1


class UsageError(SSLVisionError, ValueError):
    """A setting that cannot be: a wrong value, an unknown key, a run folder already in use."""

    exit_code = 2


class DataError(SSLVisionError):
    """Data that cannot be used: no images, too many unreadable ones, fewer than one batch."""

    exit_code = 3


class Diverged(SSLVisionError):
    """Training that cannot go on: the loss is not finite, or the method has collapsed and health=stop."""

    exit_code = 4


class StorageError(SSLVisionError):
    """A file that cannot be written: the disk is full or write-protected. Says which, and how many bytes were wanted."""

    exit_code = 5


class Stopped(SSLVisionError):
    """A signal ended training, and its state is saved. Exit codes as a shell has them: 130 SIGINT, 143 SIGTERM.

    Args:
        message: where to go on from.
        signum: the signal's number.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum
