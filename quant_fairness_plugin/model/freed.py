"""Memory that tensors no longer use, given back to the system: of the C library, where it is glibc; else nothing.

glibc keeps what is freed, up to 32 MiB a piece, for what is asked for next. That is fast, and of a model read block by
block it leaves more with the process than is in use, and growing: weights of one block lie scattered between those of
the next. So it is given back behind every block, and not at every free, which would have the system clear the same
pages for every activation.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress


def return_free_pages() -> None:
    """Return to the system what is free now."""
    with suppress(AttributeError, OSError, TypeError):  # a C library without it, or no way to call it
        ctypes.CDLL(None).malloc_trim(0)


def return_what_is_free() -> None:
    """Return to the system what is free now, objects in reference cycles included.

    A model that Transformers has read and that is gone leaves about its own size with the process otherwise.
    """
    gc.collect()
    return_free_pages()
