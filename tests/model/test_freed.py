"""Memory that is given back: what the C library is asked for, and that none is needed for it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from quant_fairness_plugin.model import freed

SMALL, LARGE = 256 << 10, 32 << 20


class Library:
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def mallopt(self, option: int, value: int) -> None:
        self.asked.append((option, value))

    def malloc_trim(self, spare: int) -> None:
        self.asked.append((spare,))


def test_large_pieces_go_back_at_once_while_it_is_wanted_and_after_an_error_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)

    def fail() -> None:
        with freed.returned_when_freed():
            assert library.asked == [(freed._MMAP_THRESHOLD, SMALL)]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert library.asked[1:] == [(freed._MMAP_THRESHOLD, LARGE), (freed._TRIM_THRESHOLD, 2 * LARGE)]
    freed.return_free_pages()
    assert library.asked[3:] == [(0,)]


def test_another_c_library_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    with freed.returned_when_freed():
        freed.return_what_is_free()
