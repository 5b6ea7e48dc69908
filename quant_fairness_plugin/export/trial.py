"""An unknown architecture is exported once in small before the work: what would fail at the end fails at the start.

Known families are tested in every format. Of any other one, nobody has seen whether its blocks can be called from
outside, whether its tensors keep their names on disk, and whether the reader can replace its linear modules. So a model
of two layers with random weights goes the whole way: quantized, written, verified, read back.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quant_fairness_plugin.artifacts import CheckpointFormat, Grid, TextSet, temporary_folder
from quant_fairness_plugin.checkpoint.refusals import TWIN
from quant_fairness_plugin.errors import ConfigError, QuantFairnessError, ResourceError, UnsupportedModelError
from quant_fairness_plugin.export.writer import export
from quant_fairness_plugin.model.architectures import find_architecture
from quant_fairness_plugin.model.architectures.experts import find_mixture
from quant_fairness_plugin.model.experts import with_unfolded_experts
from quant_fairness_plugin.model.families import detect_family
from quant_fairness_plugin.model.load import LoadedModel, from_loaded
from quant_fairness_plugin.model.rehearsal import head_input, rehearse
from quant_fairness_plugin.model.small import DEPTHS, small_model
from quant_fairness_plugin.plans.costs import count_bytes
from quant_fairness_plugin.quantize.stream import quantize_model
from quant_fairness_plugin.recommend import explicit_plan


def is_known(model: PreTrainedModel) -> bool:
    """Return whether a family has a record of its own, and with it tests in every format."""
    kind = str(getattr(model.config, "model_type", ""))
    recorded = find_architecture(kind) is not None or find_mixture(kind) is not None
    return recorded and not detect_family(with_unfolded_experts(model)).generic


def try_architecture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    texts: TextSet,
    format: CheckpointFormat,
    reader: str,
    grid: Grid,
) -> None:
    """Take a small model of an unknown architecture all the way; of a known one, do nothing.

    Args:
        model: whose architecture it is, on any device, the meta device included; not changed.
        tokenizer: its tokenizer.
        texts: for the record of the export, which is thrown away.
        format: one of `checkpoint.formats.FORMATS`.
        reader: one of `checkpoint.readers.READERS`.
        grid: of every layer.

    Raises:
        UnsupportedModelError: a step or the reader fails on it; says which way is out.
        ConfigError: a grid that fits no module.
        ResourceError: no space for the small export.
    """
    if is_known(model):
        return
    kinds = detect_family(model).kinds
    small = small_model(model, least=max(DEPTHS[0], 1 + max((kinds.index(kind) for kind in set(kinds)), default=0)))
    if small is None:
        return
    kind = str(getattr(model.config, "model_type", "") or type(model).__name__)
    try:
        _export_small(small, tokenizer, texts, format, reader, grid)
    except (ConfigError, ResourceError):
        raise
    except Exception as err:
        reason = " ".join(str(err).split())[:200]
        said = reason if isinstance(err, QuantFairnessError) else f"{type(err).__name__}: {reason}"
        way_out = "another model" if format == "fp16-twin" else f"{TWIN}, or another model"
        raise UnsupportedModelError(
            f"{kind}: an architecture without a record, of which a small model does not survive the way through format "
            f"{format} ({said}); accepted are known families and what Transformers reads back right. Use {way_out}."
        ) from err


def _export_small(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: TextSet,
    format: CheckpointFormat,
    reader: str,
    grid: Grid,
) -> None:
    loaded = from_loaded(small, tokenizer)
    _run_blocks(loaded)
    layer_bytes, other_bytes = count_bytes(loaded, grid)
    plan = explicit_plan((), model=loaded.files.name, grid=grid, layer_bytes=layer_bytes, other_bytes=other_bytes)
    quantized = quantize_model(loaded, plan, method="rtn")
    with temporary_folder() as work:
        export(quantized, work / "trial", texts=texts, format=format, reader=reader)


def _run_blocks(loaded: LoadedModel) -> None:
    """Run the blocks one by one from outside, and compare with the model itself.

    Raises:
        UnsupportedModelError: the outcome is another one.
    """
    ids = torch.arange(2 * 4).reshape(2, 4)
    with torch.no_grad():
        rehearsal = rehearse(loaded, ids)
        hidden = rehearsal.hidden
        for layer, call in enumerate(rehearsal.calls):
            hidden = call.run(loaded.block(layer), hidden)
        computed = head_input(loaded, ids, None, hidden)
        given: list[torch.Tensor] = []
        head = loaded.model.get_submodule(loaded.family.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
        try:
            loaded.model(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
    if not torch.allclose(computed, given[0], rtol=1e-3, atol=1e-4):
        raise UnsupportedModelError("its blocks, run one by one, compute something else than the model")
