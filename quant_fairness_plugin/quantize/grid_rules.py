"""Which grids exist and which weights they fit: what can be checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

from quant_fairness_plugin.artifacts import Clip, Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.schemes import FLOAT_CLIPS, find_scheme

BITS = tuple(range(2, 9))
"""Widths of an integer."""
GROUP_SIZES = (32, 64, 128, -1)
"""Input channels that share a scale; -1 for all of a row."""
AUTO_GROUP_SIZES = (128, 64, 32)
"""What a fusion group can take: the fewest scales first, and each divides the one before."""
CLIPS: tuple[Clip, ...] = get_args(Clip)
PACKED_MULTIPLE = 8
"""Packed checkpoints store eight 4-bit values a word, along either axis."""
MOST_BITS = 4
"""Wider modules get none: what 8 bits lose in a channel is not worth the bytes."""
INDEX_BYTES = 4


def check_grid(grid: Grid) -> None:
    """Refuse a grid that no part of this package can use.

    Raises:
        ConfigError: bits are not a whole number from 2 to 8, the group size is not 32, 64, 128 or -1, or the clipping
            rule is unknown; or another grid of a float scheme than its own.
    """
    if (scheme := find_scheme(grid)) is not None:
        if grid.clip not in FLOAT_CLIPS or grid != scheme.grid(grid.clip):
            raise ConfigError(
                f"scheme {grid.scheme!r} with bits {grid.bits}, group size {grid.group_size}, symmetric "
                f"{grid.symmetric} and clip {grid.clip!r} does not exist; accepted are {scheme.bits} bits, group size "
                f"{scheme.group_size}, a symmetric grid and clip {' or '.join(FLOAT_CLIPS)}. Leave these out"
            )
        return
    check_bits(grid.bits)
    check_group_size(grid.group_size)
    if not isinstance(grid.symmetric, bool):
        raise ConfigError(f"symmetric {grid.symmetric!r} cannot be used; use True or False")
    if grid.clip not in CLIPS:
        raise ConfigError(f"clip {grid.clip!r} cannot be used; use {', '.join(map(repr, CLIPS))}")


def check_bits(bits: object) -> None:
    """Refuse a bit width that no integer grid has.

    Raises:
        ConfigError: not an integer from 2 to 8 (3.5, "4", True).
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in BITS:
        raise ConfigError(f"bits {bits!r} is not an integer from 2 to 8; checkpoints are written with 4, use --bits 4")


def check_group_size(group_size: object) -> None:
    """Refuse a group size that no server reads.

    Raises:
        ConfigError: not one of 32, 64, 128, -1.
    """
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise ConfigError(
            f"group size {group_size!r} is read by no server; use 32, 64, 128, or -1 for one scale per output channel"
        )


def unit_grid(grid: Grid, columns: Iterable[int]) -> Grid:
    """Return the grid of one fusion group: with the largest group size, up to the grid's, that fits all its modules.

    Where none divides the input channels the size is the smallest, which `misfit` then gives as the reason.

    Args:
        grid: a checked grid; one scale for all of a row (-1) stays so, and the group size of a float scheme.
        columns: input channels of each of its modules.
    """
    if grid.group_size == -1 or find_scheme(grid) is not None:
        return grid
    counts = tuple(columns)
    sizes = [size for size in AUTO_GROUP_SIZES if size <= grid.group_size]
    return replace(grid, group_size=next((s for s in sizes if not any(n % s for n in counts)), sizes[-1]))


def group_count(grid: Grid, columns: int) -> int:
    """Return the scales per output channel of a weight with `columns` input channels.

    Raises:
        ConfigError: the group size does not divide the columns.
    """
    if grid.group_size == -1:
        return 1
    if columns % grid.group_size:
        raise ConfigError(
            f"group size {grid.group_size} does not divide {columns} input channels; use a group size that does, or -1"
        )
    return columns // grid.group_size


def misfit(grid: Grid, rows: int, columns: int) -> str | None:
    """Return the reason why a weight of this shape must stay in 16 bit, or None where the grid fits it.

    Args:
        grid: a checked grid.
        rows: output channels.
        columns: input channels.
    """
    if grid.group_size != -1 and columns % grid.group_size:
        return f"{columns} input channels are not a multiple of group size {grid.group_size}"
    for count, what in ((columns, "input"), (rows, "output")):
        if count % PACKED_MULTIPLE:
            return f"{count} {what} channels are not a multiple of {PACKED_MULTIPLE}, which packing needs"
    return None


def column_count(share: float, cols: int) -> int:
    """Return how many of `cols` input channels a share of them is: the nearest number, and at least 1; 0 of nothing."""
    return max(1, round(share * cols)) if share else 0


def has_columns(grid: Grid, share: float) -> bool:
    """Return whether a module on this grid has 16-bit channels."""
    return share > 0 and grid.bits <= MOST_BITS


def column_bytes(rows: int, cols: int, share: float) -> int:
    """Return the bytes that the 16-bit channels of a module take: 16 bit a weight, and an index a channel."""
    return column_count(share, cols) * (2 * rows + INDEX_BYTES)
