"""Memory that tensors no longer use, given back to the system: of the C library, where it is glibc; else nothing."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

_MMAP_THRESHOLD = -3
"""glibc's name (malloc.h) for the size from which an allocation is a mapping of its own."""

_LARGE_BYTES = 4 << 20


def return_when_freed() -> None:
    """Have large tensors returned to the system as soon as they are freed, from now on in this process.

    By default glibc learns to keep allocations of up to 32 MiB for itself, and weights of one block then lie scattered
    between those of the next: more than is in use, and growing.
    """
    with suppress(AttributeError, OSError, TypeError):  # a C library without it, or no way to call it
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)


def return_what_is_free() -> None:
    """Return to the system what is free now, objects in reference cycles included.

    A model that Transformers has read and that is gone leaves about its own size with the process otherwise.
    """
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
