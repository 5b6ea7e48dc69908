"""Memory that tensors no longer use, given back to the system: of the C library, where it is glibc; else nothing.

glibc keeps what is freed, up to 32 MiB a piece, for what is asked for next. That is fast, and of a model read block by
block it leaves more with the process than is in use, and growing: weights of one block lie scattered between those of
the next. Where one piece of work after the other ends, it is given back behind each (`return_free_pages`), so that the
system does not clear the same pages for every activation. Where something small stays of every step, as keys and values
do of every block, or where tensors of all sizes are made one after the other, as while a checkpoint is
written, what is large goes back as soon as it is free (`returned_when_freed`).
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names (malloc.h) for what may lie free at the end of the heap, and for the size from which an allocation is a
mapping of its own."""
_SMALL_BYTES, _LARGE_BYTES = 256 << 10, 32 << 20
"""From where on memory goes back at once; and what glibc comes to by itself, as it sees large pieces freed."""


def return_free_pages() -> None:
    """Return to the system what is free now."""
    with suppress(AttributeError, OSError, TypeError):  # a C library without it, or no way to call it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def returned_when_freed() -> Iterator[None]:
    """Have all but small tensors returned to the system as soon as they are freed, while the context is open."""
    _set(_MMAP_THRESHOLD, _SMALL_BYTES)
    try:
        yield
    finally:
        _set(_MMAP_THRESHOLD, _LARGE_BYTES)
        _set(_TRIM_THRESHOLD, 2 * _LARGE_BYTES)


def return_what_is_free() -> None:
    """Return to the system what is free now, objects in reference cycles included.

    A model that Transformers has read and that is gone leaves about its own size with the process otherwise.
    """
    gc.collect()
    return_free_pages()


def _set(option: int, value: int) -> None:
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)
