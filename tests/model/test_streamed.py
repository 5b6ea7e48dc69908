"""A model read block by block against the same model loaded as a whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.initialization import TORCH_INIT_FUNCTIONS

from quant_fairness_plugin.errors import (
    ArtifactError,
    ConfigError,
    InvalidLayerError,
    QuantFairnessError,
    UnsupportedModelError,
)
from quant_fairness_plugin.model import streamed as module
from quant_fairness_plugin.model import tables
from quant_fairness_plugin.model.load import LoadedModel, load_model
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from quant_fairness_plugin.model.streamed import StreamedModel, open_streamed
from tests.model.checkpoints import edit, shard
from tests.tiny import FAMILIES

Build = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
LAYERS, WIDTH = 3, 40


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nothing was written to holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace (or, with None, drop) tensors of the checkpoint."""
    content = load_file(folder / "model.safetensors") | tensors
    save_file({k: v for k, v in content.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})


def blocks(model: LoadedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for n, p in model.model.named_parameters() if n.startswith(f"{model.family.blocks}.")]


def at_rest(model: StreamedModel) -> bool:
    """Whether no block takes memory: on the meta device, or (the first one) without a stride."""
    return all(p.is_meta or not any(p.stride()) for _, p in blocks(model))


def assert_same_values(ours: StreamedModel, whole: LoadedModel) -> None:
    outside = dict(whole.model.named_parameters()).keys() - dict(blocks(whole)).keys() - ours.tables.keys()
    for name in outside:
        assert torch.equal(ours.model.get_parameter(name), whole.model.get_parameter(name)), name
    for layer in range(whole.layers):
        with ours.resident(layer):
            pairs = zip(ours.block(layer).named_parameters(), whole.block(layer).named_parameters(), strict=True)
            for (name, value), (_, expected) in pairs:
                assert value.dtype == expected.dtype
                assert torch.equal(value, expected), name
    for name, table in ours.tables.items():
        expected = whole.model.get_parameter(name)
        assert torch.equal(table.part(slice(0, len(expected))), expected)
        assert torch.equal(table.rows(torch.tensor([263, 0, 7])), expected[[263, 0, 7]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_value_is_that_of_the_loaded_model(tiny_model: Build, family: str) -> None:
    folder = tiny_model(family, layers=LAYERS, width=WIDTH)
    whole, ours = load_model(str(folder)), open_streamed(str(folder))
    assert (ours.family, ours.layers, ours.storage_dtype) == (whole.family, whole.layers, whole.storage_dtype)
    assert_same_values(ours, whole)
    buffers, expected = dict(ours.model.named_buffers()), dict(whole.model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, value in buffers.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name
    assert not ours.model.training
    assert not any(p.requires_grad for p in ours.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_goes_through_it_as_through_the_loaded_model(tiny_model: Build, family: str) -> None:
    folder = tiny_model(family, layers=LAYERS, width=WIDTH)
    whole, ours = load_model(str(folder)), open_streamed(str(folder))
    ids = torch.tensor([[0, 5, 9, 77, 130], [0, 200, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found, expected = rehearse(ours, ids, mask), rehearse(whole, ids, mask)
    assert at_rest(ours)
    hidden = found.hidden
    assert torch.equal(hidden, expected.hidden)
    with torch.no_grad():
        for layer in range(LAYERS):
            with ours.resident(layer):
                hidden = found.calls[layer].run(ours.block(layer), hidden)
        given = head_input(ours, ids, mask, hidden)
        [name] = {name for name in ours.tables if name.startswith(ours.family.head)}
        bias = getattr(whole.model.get_output_embeddings(), "bias", None)
        logits = torch.nn.functional.linear(given, ours.tables[name].part(slice(0, 264)), bias)
        torch.testing.assert_close(logits, whole.model(ids, attention_mask=mask).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_checkpoints_of_other_types_are_rounded_as_when_loaded(
    tiny_model: Build, dtype: str, compute: torch.dtype
) -> None:
    folder = tiny_model("llama", dtype=dtype)
    whole, ours = load_model(str(folder), dtype=compute), open_streamed(str(folder), dtype=compute)
    assert ours.storage_dtype == whole.storage_dtype
    assert {p.dtype for p in ours.model.parameters()} == {compute}
    assert_same_values(ours, whole)


def test_float64_is_rounded_twice_as_when_loaded(folder: Path) -> None:
    just_above_half = 1 + 2**-11 + 2**-30  # to float32 first, it is a tie, which float16 rounds down
    change(folder, **{UP: torch.full((64, 32), just_above_half, dtype=torch.float64)})
    assert_same_values(open_streamed(str(folder)), load_model(str(folder)))


def test_shards_and_names_without_the_prefix_are_read(tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gpt2"), tmp_path / "gpt2"))
    whole = load_model(str(folder))
    stored = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(2)}  # buffers of old versions
    save_file(stored | masks, folder / "model.safetensors", {"format": "pt"})
    shard(folder)
    assert_same_values(open_streamed(str(folder)), whole)


# Residence


def test_blocks_are_in_memory_only_while_they_are_needed(folder: Path) -> None:
    ours = open_streamed(str(folder))
    assert at_rest(ours)
    with ours.resident(1):
        assert not any(p.is_meta for p in ours.block(1).parameters())
        with ours.resident(1):
            pass
        assert not any(p.is_meta for p in ours.block(1).parameters())
    assert at_rest(ours)
    for layer in range(2):
        with pytest.raises(KeyError, match="stop"), ours.resident(layer):
            raise KeyError("stop")
        assert at_rest(ours)
    with pytest.raises(InvalidLayerError, match="layer 2 does not exist"), ours.resident(2):
        pass


def test_what_is_not_in_memory_never_passes_for_a_number(folder: Path) -> None:
    ours = open_streamed(str(folder))
    first = rehearse(ours, torch.tensor([[0, 5, 9]]))
    with torch.no_grad():
        assert first.calls[0].run(ours.block(0), first.hidden).isnan().all()
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            first.calls[1].run(ours.block(1), first.hidden)
    assert ours.model.get_parameter(HEAD).isnan().all()


def test_a_fetched_block_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = open_streamed(str(folder))
    fetched = ours.fetch(1)
    assert {value.dtype for value in fetched.values()} == {torch.float16}
    monkeypatch.setattr(module, "read_tensor", None)
    with ours.resident(1, fetched):
        assert torch.equal(ours.model.get_parameter(UP), load_file(folder / "model.safetensors")[UP].float())
    assert fetched == {}


def test_nothing_is_drawn_for_parameters_that_files_hold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TORCH_INIT_FUNCTIONS, "normal_", lambda *_, **__: pytest.fail("numbers were drawn"))
    assert_same_values(open_streamed(str(folder)), load_model(str(folder)))


def test_an_embedding_is_read_by_the_rows_that_a_text_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = open_streamed(str(folder))
    read: list[list[int]] = []
    plain = tables.read_rows

    def watched(place: Any, rows: Any) -> torch.Tensor:
        read.append(list(rows))
        return plain(place, rows)

    monkeypatch.setattr(tables, "read_rows", watched)
    rehearse(ours, torch.tensor([[9, 5, 9, 77]]))
    assert read[-1] == [5, 9, 77]
    assert ours.model.get_parameter(EMBEDDING).isnan().all()


def test_tables_can_be_held_whole_for_a_while(folder: Path) -> None:
    ours, whole = open_streamed(str(folder)), load_model(str(folder))
    with ours.widened([EMBEDDING, NORM]):
        assert torch.equal(ours.model.get_parameter(EMBEDDING), whole.model.get_parameter(EMBEDDING))
        assert ours.model.get_parameter(HEAD).isnan().all()
        ours.model.get_parameter(EMBEDDING).data *= 2
        doubled = rehearse(ours, torch.tensor([[0, 5]])).hidden
    assert ours.model.get_parameter(EMBEDDING).isnan().all()
    assert torch.equal(doubled, 2 * rehearse(ours, torch.tensor([[0, 5]])).hidden)


def test_tables_are_held_in_16_bit_where_they_are_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, which this machine need not have."""
    whole, plain = load_model(str(folder)), tables._check_table
    monkeypatch.setattr(tables, "_check_table", lambda *args, keep: plain(*args, keep=True))
    ours = open_streamed(str(folder))
    assert {table.held.dtype for table in ours.tables.values() if table.held is not None} == {torch.float16}
    assert all(table.held is not None for table in ours.tables.values())
    assert_same_values(ours, whole)


# Tied heads


def test_a_tied_head_is_one_table(tiny_model: Build) -> None:
    ours = open_streamed(str(tiny_model("gpt2")))
    assert ours.family.tied_head
    assert ours.tables[HEAD] is ours.tables["transformer.wte.weight"]
    assert ours.model.get_parameter(HEAD) is ours.model.get_parameter("transformer.wte.weight")


@pytest.fixture
def both(tiny_model: Build, tmp_path: Path) -> Path:
    """A config that ties the head, and files that hold both."""
    folder = Path(shutil.copytree(tiny_model("gemma"), tmp_path / "both"))
    change(folder, **{HEAD: load_file(folder / "model.safetensors")[EMBEDDING].clone()})
    return folder


def test_two_equal_tensors_of_a_tied_head_stay_tied(both: Path) -> None:
    ours = open_streamed(str(both))
    assert ours.family.tied_head
    assert_same_values(ours, load_model(str(both)))


def test_two_different_tensors_of_a_tied_head_are_untied_as_when_loaded(both: Path) -> None:
    head = load_file(both / "model.safetensors")[HEAD]
    head[263, 3] += 1
    change(both, **{HEAD: head})
    ours, whole = open_streamed(str(both)), load_model(str(both))
    assert (ours.family.tied_head, whole.family.tied_head) == (False, False)
    assert_same_values(ours, whole)


def test_a_tied_embedding_under_the_heads_name_is_found(both: Path) -> None:
    change(both, **{EMBEDDING: None})
    assert_same_values(open_streamed(str(both)), load_model(str(both)))


# Refusals


def refused(folder: Path, kind: type[QuantFairnessError], match: str, **options: Any) -> None:
    """The loaded and the streamed model are refused with the same words."""
    for load in (load_model, open_streamed):
        with pytest.raises(kind, match=match) as caught:
            load(str(folder), **options)
        assert "\n" not in str(caught.value)


def test_missing_surplus_and_misshapen_tensors_are_refused(folder: Path) -> None:
    change(folder, **{UP: None, "model.extra": torch.ones(2), NORM: torch.ones(31)})
    words = rf"1 missing: {UP}; 1 unexpected: model\.extra; 1 of another shape: {NORM}"
    refused(folder, ArtifactError, words)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, NORM])
def test_values_that_are_not_finite_are_refused_when_the_model_is_opened(folder: Path, name: str) -> None:
    value = load_file(folder / "model.safetensors")[name]
    value.view(-1)[-1] = torch.inf
    change(folder, **{name: value})
    refused(folder, ArtifactError, f"{name} holds NaN or infinite values")


def test_values_of_a_block_are_checked_when_it_is_read(folder: Path) -> None:
    value = load_file(folder / "model.safetensors")[UP]
    change(folder, **{UP: value.index_fill(0, torch.tensor([3]), torch.nan)})
    ours = open_streamed(str(folder))
    with ours.resident(0):
        pass
    with pytest.raises(ArtifactError, match=f"{UP} holds NaN or infinite values"), ours.resident(1):
        pass
    assert at_rest(ours)


def test_a_value_too_large_for_float16_is_refused(tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama", dtype="float32"), tmp_path / "large"))
    change(folder, **{NORM: torch.full((32,), 7e4)})
    refused(folder, UnsupportedModelError, rf"{NORM} holds 7e\+04, and torch.float16 ends at 6\.55e\+04")
    change(folder, **{NORM: torch.ones(32), UP: torch.full((64, 32), -70_000.0)})
    with pytest.raises(UnsupportedModelError, match=rf"{UP} holds 7e\+04"):
        open_streamed(str(folder)).fetch(1)


def test_a_wrong_layer_count_is_refused(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1)
    refused(folder, ArtifactError, r"unexpected: model\.layers\.1\.")


def test_arguments_are_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="torch.int8 cannot be computed in"):
        open_streamed("no/such/model", dtype=torch.int8)
    with pytest.raises(ConfigError, match="device 'gpu' cannot be used"):
        open_streamed("no/such/model", device="gpu")


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_what_no_code_computes_is_not_taken_from_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plain = LlamaForCausalLM.__init__

    def with_more(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        if kind == "buffer":
            self.model.register_buffer("scale", torch.ones(3), persistent=False)
        else:
            self.model.scale = torch.ones(3)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", with_more)
    with pytest.raises(UnsupportedModelError, match=r"nothing says what model\.scale.* should hold"):
        open_streamed(str(folder))


def test_the_largest_activation_is_that_of_the_whole_model(tiny_model: Build) -> None:
    from quant_fairness_plugin.model.activations import largest_activation
    from quant_fairness_plugin.model.streamed import largest_in_blocks

    for family in ("llama", "gpt2"):
        folder, rows = str(tiny_model(family)), [[0, 5, 9, 200], [7]]
        expected = largest_activation(load_model(folder).model, rows)
        # float32 products in another order differ by about 1e-6.
        assert largest_in_blocks(open_streamed(folder), rows) == pytest.approx(expected, rel=1e-5)


def test_activations_beyond_float16_are_stored_in_bfloat16_as_in_memory(tiny_model: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "large"))
    change(folder, **{NORM: torch.full((32,), 6e4).half()})
    assert load_model(str(folder), sentences=["a"]).storage_dtype == torch.bfloat16
    assert open_streamed(str(folder), sentences=["a"]).storage_dtype == torch.bfloat16
    assert open_streamed(str(folder)).storage_dtype == torch.float16


def test_a_padding_token_beyond_the_rows_that_are_looked_up_is_no_error(tiny_model: Build) -> None:
    ours = open_streamed(str(tiny_model("llama")))
    embedding = ours.model.get_input_embeddings()
    expected = rehearse(ours, torch.tensor([[3]])).hidden
    embedding.padding_idx = 200
    assert torch.equal(rehearse(ours, torch.tensor([[3]])).hidden, expected)
    assert embedding.padding_idx == 200
