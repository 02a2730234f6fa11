"""Memory of freed tensors and images, kept for the next ones."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have the C library keep what this process frees, if it is glibc. Processes forked from it inherit that.

    It gives large pieces back to the system, which has to find, clear and map them again: in every step of training on a
    CPU, about a tenth of its time, and for every image that a loader decodes. What is needed at most stays the same.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # none
        libc.mallopt(M_TOP_PAD, 64 << 20)  # bytes asked for beyond what is needed
