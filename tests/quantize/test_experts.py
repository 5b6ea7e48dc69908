from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quant_fairness_plugin.artifacts import Grid
from quant_fairness_plugin.errors import ConfigError
from quant_fairness_plugin.model.experts import Experts
from quant_fairness_plugin.model.linear import linear_weight, set_linear_weight
from quant_fairness_plugin.model.load import LoadedModel
from quant_fairness_plugin.quantize.calibration import CalibrationSet
from quant_fairness_plugin.quantize.experts import filled_moment, weighted_moment
from quant_fairness_plugin.quantize.gptq import refine_result, solve_gptq
from quant_fairness_plugin.quantize.methods.gptq import Gptq
from tests.planning import quantize_layers

Load = Callable[..., LoadedModel]
GRID = Grid(bits=4, group_size=32)


class Seen:
    """What the experts of a layer are given in whole forward passes, one row at a time."""

    def __init__(self, loaded: LoadedModel, experts: Experts, rows: CalibrationSet) -> None:
        self.tokens: list[tuple[str, Tensor, list[int], list[float]]] = []
        self.energy: dict[str, float] = {}
        for language, some in rows.rows.items():
            outputs: list[Tensor] = []
            for row in some:
                found: list[tuple[Tensor, ...]] = []
                handles = [
                    experts.register_forward_pre_hook(lambda _, x, found=found: found.append(x)),
                    experts.register_forward_hook(lambda _, __, y, outputs=outputs: outputs.append(y)),
                ]
                with torch.no_grad():
                    loaded.model(torch.tensor([row]))
                for handle in handles:
                    handle.remove()
                [(hidden, chosen, weights)] = found
                self.tokens += [
                    (language, x.double(), list(map(int, c)), list(map(float, g)))
                    for x, c, g in zip(hidden, chosen, weights, strict=True)
                ]
            self.energy[language] = float(torch.cat(outputs).double().square().sum(1).mean())

    def count(self, rows: CalibrationSet, language: str) -> float:
        return rows.shares[language] / rows.coverage[language] / self.energy[language]


def naive_hessian(seen: Seen, rows: CalibrationSet, expert: int, inner: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ a xxᵀ token by token, and what is missing to full rank from an even sample of the layer's tokens."""
    total: Tensor | float = 0.0
    reached = 0
    width = len(inner(seen.tokens[0][1]))
    for language, x, chosen, gates in seen.tokens:
        if expert in chosen:
            reached += 1
            y = inner(x)
            total = total + seen.count(rows, language) * gates[chosen.index(expert)] ** 2 * torch.outer(y, y)
    if reached < width:
        sample = seen.tokens[:: max(1, len(seen.tokens) // width)]
        for language, x, _, gates in sample:
            y = inner(x)
            mean = sum(gate**2 for gate in gates) / len(gates)
            total = total + (width - reached) / len(sample) * seen.count(rows, language) * mean * torch.outer(y, y)
    assert isinstance(total, Tensor)
    return total


def solve(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    usual = Gptq()
    once = solve_gptq(weight, hessian, GRID, scale_dtype=torch.float16, damp=0.05)
    solved = refine_result(once, weight, hessian, damp=0.05, rounds=usual.refinements).tensor
    return solved.integers, solved.dequantize()


def solve_naively(loaded: LoadedModel, layer: int, rows: CalibrationSet) -> dict[str, Tensor]:
    """Expert after expert, with whole forward passes. The units before the experts must be quantized already."""
    prefix = f"model.layers.{layer}.mlp.experts"
    experts = loaded.model.get_submodule(prefix)
    assert isinstance(experts, Experts)
    seen = Seen(loaded, experts, rows)
    integers: dict[str, Tensor] = {}
    for number in range(len(experts)):
        gate, up, down = experts.expert(number).values()
        hessian = naive_hessian(seen, rows, number, lambda x: x)
        for name, module in zip(experts.names[:2], (gate, up), strict=True):
            integers[f"{prefix}.{number}.{name}"], dense = solve(linear_weight(module), hessian)
            set_linear_weight(module, dense)
        wide_gate, wide_up = gate.weight.double(), up.weight.double()

        def inner(x: Tensor, g: Tensor = wide_gate, u: Tensor = wide_up) -> Tensor:
            return torch.nn.functional.silu(g @ x) * (u @ x)

        hessian = naive_hessian(seen, rows, number, inner)
        integers[f"{prefix}.{number}.{experts.names[2]}"], dense = solve(linear_weight(down), hessian)
        set_linear_weight(down, dense)
    return integers


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_integers_of_experts_equal_those_of_a_loop_over_tokens(load: Load, rows: CalibrationSet, family: str) -> None:
    loaded = load(family)
    rows = replace(rows, weights={"en": 0.5, "he": 0.3, "zh": 0.2})
    quantized = quantize_layers(loaded, [0], method="gptq", grid=GRID, calibration=rows)
    for name in loaded.family.full_names(1):
        if ".self_attn." in name:
            set_linear_weight(loaded.linears(1)[name], quantized.dense_weight(name))
    naive = solve_naively(loaded, 1, rows)
    assert naive.keys() == {name for name in quantized.tensors if ".experts." in name}
    for name, integers in naive.items():
        # Sums in another order may move a weight that lies between two integers.
        assert (quantized.tensors[name].integers == integers).float().mean() > 0.995, name
    assert all(0 < loss < 0.2 for loss in quantized.losses.values())


def test_experts_are_left_as_they_were(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen2_moe")
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    quantized = quantize_layers(loaded, [0], method="gptq", grid=GRID, calibration=rows)
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())
    assert set(quantized.tensors) == set(loaded.family.full_names(1))
    assert not any("shared_expert_gate" in name or name.endswith("mlp.gate") for name in quantized.tensors)


def test_an_expert_that_no_token_reaches_is_solved_on_those_of_the_layer(load: Load, rows: CalibrationSet) -> None:
    loaded = load("qwen3_moe")
    router = loaded.model.get_parameter("model.layers.1.mlp.gate.weight")
    router.data[1:3] = 10 * router.data[1:3]
    router.data[0] = 0  # a logit of 0: never among the two largest of four where two others are above it
    hidden: list[Tensor] = []
    experts = loaded.model.get_submodule("model.layers.1.mlp.experts")
    handle = experts.register_forward_pre_hook(lambda _, x: hidden.append(x[1]))
    router.data[3] = -router.data[1:3].sum(0)  # of three that sum to 0, one is above 0 at least
    quantized = quantize_layers(loaded, [0], method="gptq", grid=GRID, calibration=rows)
    handle.remove()
    tensor = quantized.tensors["model.layers.1.mlp.experts.0.gate_proj"]
    rounded = quantize_layers(loaded, [0], method="rtn", grid=GRID).tensors["model.layers.1.mlp.experts.0.gate_proj"]
    assert not torch.equal(tensor.integers, rounded.integers)


def test_enough_tokens_are_not_filled_up_and_missing_ones_are() -> None:
    rows, counts = torch.randn(9, 5), torch.rand(9)
    others, theirs = torch.randn(4, 5), torch.rand(4)
    full = sum(c * torch.outer(x, x) for x, c in zip(rows.double(), counts.double(), strict=True))
    assert torch.allclose(weighted_moment(rows, counts), full)
    assert torch.allclose(filled_moment(rows, counts, others, theirs), full)
    shared = sum(c * torch.outer(x, x) for x, c in zip(others.double(), theirs.double(), strict=True)) / 4
    assert torch.allclose(
        filled_moment(rows[:2], counts[:2], others, theirs), weighted_moment(rows[:2], counts[:2]) + 3 * shared
    )


REFUSED: Mapping[str, tuple[dict[str, object], str]] = {
    "awq": ({"method": "awq", "grid": replace(GRID, symmetric=False)}, "one norm stands in front of the router"),
    "minimax": ({"method": "gptq", "grid": replace(GRID, clip="minimax")}, "most experts see too few tokens"),
    "columns": ({"method": "gptq", "grid": GRID, "columns": 0.1}, "16-bit channels to routed experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_experts_cannot_be_quantized_with_is_refused(load: Load, rows: CalibrationSet, case: str) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(ConfigError, match=reason):
        quantize_layers(load("qwen3_moe"), [0], calibration=rows, **options)  # type: ignore[arg-type]
