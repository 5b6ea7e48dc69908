"""Machine code for an A100 and an H200, compiled here without a GPU: what would make the kernels slow is not in it."""

from __future__ import annotations

from pathlib import Path

import pytest
from quant_fairness_kernels.sass import SassCase, cases, inspect, main_loop, most_instructions

pytest.importorskip("triton", reason='triton is not installed: pip install "quant-fairness[triton]"')


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def check(case: SassCase) -> None:
    report = inspect(case)
    assert report.instructions_per_weight <= most_instructions(case)
    # Dequantizing alone takes 0.87: a smaller count would mean that another loop was read.
    assert report.instructions_per_weight >= 1.5
    assert report.spilled_bytes == 0
    assert report.registers <= 255
    assert report.tensor_core > 0
    assert report.int_to_float == 0
    assert report.wide_copies > 0
    assert report.waited_loads == 0
    assert report.shared_bytes <= (163 if case.architecture == 80 else 227) * 1024


@pytest.mark.parametrize("case", cases("small"), ids=lambda case: case.name)
def test_machine_code_of_the_default_configurations(case: SassCase) -> None:
    check(case)


@pytest.mark.kernels
@pytest.mark.parametrize("case", cases("full"), ids=lambda case: case.name)
def test_machine_code_of_all_groups_and_types(case: SassCase) -> None:
    check(case)


def test_the_bounds_are_those_that_were_asked_for() -> None:
    for case in cases("full"):
        tokens = case.config.block_m
        if case.dtype == "float16" and tokens == 16:
            assert most_instructions(case) == (3.4 if case.group in (32, 64) else 2.6)
        elif case.dtype == "float16" and case.architecture == 90 and case.group in (0, 128):
            assert most_instructions(case) == 3.2
        assert most_instructions(case) >= 2.6


def test_the_loop_is_the_backward_branch_around_the_bit_operations() -> None:
    lines = ["LOP3 R0", "MOV R1", "LOP3 R1", "HMMA R2", "BRA 0x10", "MOV R3", "BRA 0x50", "BRA 0x90", "LOP3 R5"]
    listing = "\n".join(f"        /*{16 * place:04x}*/   {line} ;" for place, line in enumerate(lines))
    assert main_loop(listing) == ["MOV", "LOP3", "HMMA", "BRA"]
    assert main_loop("") == []
