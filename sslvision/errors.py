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
