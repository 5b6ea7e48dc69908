from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from quant_fairness_plugin.artifacts import Clip, Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.quantize.grid_rules import CLIPS, check_grid, group_count, misfit, unit_grid
from quant_fairness_plugin.quantize.methods import check_method


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_allowed_grids_pass(bits: int, group_size: int) -> None:
    check_grid(Grid(bits=bits, group_size=group_size, symmetric=False, clip="mse"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bits", 3.5, r"bits 3\.5 is not an integer from 2 to 8"),
        ("bits", 4.0, r"bits 4\.0 is not an integer"),
        ("bits", True, r"bits True is not an integer"),
        ("bits", "4", r"bits '4' is not an integer"),
        ("bits", 1, r"bits 1 is not an integer from 2 to 8"),
        ("bits", 9, r"bits 9 is not an integer from 2 to 8"),
        ("group_size", 100, r"group size 100 .* 32, 64, 128, or -1"),
        ("group_size", 0, r"group size 0 is read by no server"),
        ("group_size", 128.0, r"group size 128\.0 is read by no server"),
        ("symmetric", 1, r"symmetric 1 cannot be used; use True or False"),
        ("clip", "l2", r"clip 'l2' cannot be used; use 'absmax', 'mse', .*'minimax'"),
    ],
)
def test_other_grids_are_errors(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_grid(Grid(**{field: value}))


@pytest.mark.parametrize("clip", CLIPS)
def test_every_clipping_rule_is_allowed(clip: Clip) -> None:
    check_grid(Grid(clip=clip))
    check_method("gptq", Grid(clip=clip), sweeps=False)


@pytest.mark.parametrize(
    ("method", "sweeps", "message"),
    [
        ("rtn", False, "clip 'minimax' cannot be used with method 'rtn'.* or method 'gptq'$"),
        ("awq", False, "clip 'minimax' cannot be used with method 'awq'.* or method 'gptq'$"),
        ("gptq", True, "clip 'minimax' cannot be swept.*--protect-layers"),
    ],
)
def test_the_language_aware_clip_needs_calibration(method: str, sweeps: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_method(method, Grid(clip="minimax"), sweeps=sweeps)
    check_method(method, Grid(clip="mse"), sweeps=sweeps)


def test_groups_are_counted() -> None:
    assert group_count(Grid(group_size=32), 96) == 3
    assert group_count(Grid(group_size=-1), 97) == 1
    with pytest.raises(ConfigError, match="group size 64 does not divide 96 input channels"):
        group_count(Grid(group_size=64), 96)


@pytest.mark.parametrize(
    ("columns", "stated", "size"),
    [
        ((576, 576, 576), 128, 64),
        ((1536,), 128, 128),
        ((1536,), 64, 64),
        ((1536, 96), 128, 32),
        ((40,), 128, 32),
        ((40,), -1, -1),
    ],
)
def test_a_unit_takes_the_largest_size_that_fits_all_its_modules(
    columns: tuple[int, ...], stated: int, size: int
) -> None:
    assert unit_grid(Grid(bits=8, group_size=stated), columns) == Grid(bits=8, group_size=size)


@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "reason"),
    [
        (8, 64, 64, None),
        (8, 40, -1, None),
        (8, 96, 64, "96 input channels are not a multiple of group size 64"),
        (8, 33, -1, "33 input channels are not a multiple of 8"),
        (17, 64, 64, "17 output channels are not a multiple of 8"),
    ],
)
def test_a_misfit_has_a_reason(rows: int, columns: int, group_size: int, reason: str | None) -> None:
    found = misfit(Grid(group_size=group_size), rows, columns)
    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and found.startswith(reason))


def test_rules_and_calibration_do_not_import_torch() -> None:
    modules = ("grid_rules", "calibration")
    imports = "; ".join(f"import quant_fairness_plugin.quantize.{module}" for module in modules)
    check = f"import sys; {imports}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
