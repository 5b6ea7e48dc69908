"""Which causal architectures of the installed Transformers are quantized here, and what becomes of the others.

    make coverage                                         # all of them, some minutes; rows and docs/architectures.md
    python benchmarks/architectures.py --only phi3 lfm2   # these rows anew, beside the stored ones

Of every architecture a tiny model with random weights is made, written as a checkpoint, and taken through the code that
a user's model goes through: opened, swept with every unit protected once, quantized with GPTQ and layer 1 in 16 bit,
exported in every format, and read back by Transformers, whose logits must be those of our own dequantizer. A row says
how far it came, or the reason of the refusal. That something is quantized and read right is what a row shows; how much
quality a trained model of the architecture keeps, it does not.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rows import conditions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from quant_fairness_plugin.artifacts import TextSet
    from quant_fairness_plugin.model.load import LoadedModel

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architectures.md"
ROWS = ROOT / "benchmarks" / "results" / "cpu" / "architectures.jsonl"
SEED = 0
VOCABULARY, GROUP, MOST_VALUES = 264, 32, 30_000_000
FORMATS = ("compressed-tensors", "gptq", "awq", "fp16-twin")
READ_HERE = ("compressed-tensors", "fp16-twin")
"""Formats that Transformers reads without gptqmodel."""
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_PLAIN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_inner": 96, "n_positions": 128, "n_ctx": 128, "rotary_dim": 8}
_MPT = {"d_model": 64, "n_layers": 4, "n_heads": 4, "ffn_dim": 96, "attention_heads": 4, "num_layers": 4, "dff": 96}
_ALL = _IDS | _PLAIN | _GPT | _MPT
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_ROUTED = {
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_TEXT = _IDS | _PLAIN
_GEMMA3_EYE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_EYE = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [],
}  # fmt: skip
_QWEN_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 16}, "vision_config": _GEMMA3_EYE, "mm_tokens_per_image": 4,
        "image_token_index": 263, "boi_token_index": 262, "eoi_token_index": 261,
    },
    "qwen3_5": {
        "text_config": _TEXT | _LINEAR | {"rope_parameters": _QWEN_ROTARY | {"partial_rotary_factor": 1.0}},
        "vision_config": _QWEN_EYE, "image_token_id": 263, "video_token_id": 262, "vision_start_token_id": 261,
        "vision_end_token_id": 260,
    },
    "falcon": {"num_kv_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32, "global_head_dim": 32,
        "num_hidden_layers": 6, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"] * 2},
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "doge": {"num_key_value_heads": 4},
    "xglm": {"pad_token_id": 1},
    "biogpt": {"pad_token_id": 1},
    "nemotron_h": {
        "hybrid_override_pattern": "M-*-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
        "n_groups": 1,
    },
}  # fmt: skip
"""What some architectures need beside the sizes that all are given."""
_WITHOUT: Mapping[str, tuple[str, ...]] = {
    "falcon": ("head_dim", "num_key_value_heads"),
    "lfm2": ("head_dim",),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one architecture came to."""

    model_type: str
    units: str = ""
    swept: bool = False
    quantized: bool = False
    formats: tuple[str, ...] = ()
    """Written and checked tensor by tensor."""
    read: tuple[str, ...] = ()
    """Read back by Transformers, with equal logits."""
    folds: str = ""
    reason: str = ""
    """Why it is refused, or where it stops; empty where it came all the way."""

    @property
    def member(self) -> bool:
        """Whether it came all the way in the default format."""
        return self.quantized and "compressed-tensors" in self.read


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="these model types; the other rows stay as they are stored")
    options = parser.parse_args()
    rows = stored_rows() if options.only else {}
    command = f"python benchmarks/architectures.py --only {' '.join(options.only)}" if options.only else "make coverage"
    for model_type in options.only or model_types():
        row = cover(model_type)
        sys.stderr.write(f"{row_text(row)}\n")
        rows[model_type] = asdict(row) | conditions(command=command, seed=SEED)
    store(rows)


def stored_rows() -> dict[str, dict[str, Any]]:
    """The rows that there are, by architecture."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return {row["model_type"]: row for row in rows}


def store(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the rows, and the page that shows them."""
    from quant_fairness_plugin.artifacts import write_atomically

    lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in sorted(rows)]
    write_atomically(ROWS, "".join(lines).encode())
    render()


def render() -> None:
    """Write the page from the rows."""
    from quant_fairness_plugin.artifacts import write_atomically

    write_atomically(PAGE, page(stored_rows()).encode())


def model_types() -> list[str]:
    """Every causal architecture of the installed Transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def cover(model_type: str) -> Row:
    """Take a tiny model of an architecture as far as it goes."""
    from quant_fairness_plugin.errors import QuantFairnessError

    with tempfile.TemporaryDirectory(prefix="coverage-") as work, _quiet():
        folder = Path(work) / "model"
        refused = _refusal(model_type)
        if refused:
            return Row(model_type, reason=refused)
        problem = write_tiny(model_type, folder)
        if problem:
            return Row(model_type, reason=problem)
        try:
            return _walk(model_type, folder, Path(work))
        except QuantFairnessError as err:
            return Row(model_type, reason=_one_line(err, folder))
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here
            return Row(model_type, reason=f"fails: {type(err).__name__}: {_one_line(err, folder)}")


def _refusal(model_type: str) -> str:
    """The reason of a refusal by the config alone, before a model is made of it."""
    from transformers import AutoConfig

    from quant_fairness_plugin.model.architectures.refused import refusal_of

    try:
        config = AutoConfig.for_model(model_type).to_dict()
    except Exception:  # noqa: BLE001 - some configs have no defaults
        config = {}
    return (refusal_of(model_type, config) or "").split("; expected")[0]


def _one_line(err: BaseException, folder: Path) -> str:
    return " ".join(str(err).split()).replace(f"{folder}/", "").replace(str(folder), "it")[:220].strip()


def tiny_config(model_type: str) -> Iterator[PretrainedConfig]:
    """Yield small configs of an architecture: of sizes that fit most, and its own sizes made narrow."""
    from transformers import AutoConfig

    from quant_fairness_plugin.model.small import narrowed, shortened

    try:
        empty = AutoConfig.for_model(model_type)
        known = {*empty.to_dict(), *empty.attribute_map} - {key for key in _ROUTED if getattr(empty, key, None) is None}
    except Exception:  # noqa: BLE001 - some configs have no defaults
        known = {*_ALL, *_ROUTED}
    left_out = _WITHOUT.get(model_type, ())
    sizes = {key: value for key, value in (_ALL | _LINEAR | _ROUTED).items() if key in known and key not in left_out}
    own = _OWN.get(model_type, {})
    latent = {key: value for key, value in _LATENT.items() if key in known}
    deeper = {key: 6 for key in ("num_hidden_layers",) if key in sizes}  # a pattern of six kinds of layers
    for given in (sizes | dict(own), sizes | latent | dict(own), sizes | deeper | dict(own)):
        try:
            yield AutoConfig.for_model(model_type, **given)
        except Exception:  # noqa: BLE001 - configs check themselves in ways of their own
            continue
    try:
        default = AutoConfig.for_model(model_type)
        yield type(default).from_dict(narrowed(shortened(default.to_dict(), 4)) | _IDS)
    except Exception:  # noqa: BLE001 - as above
        return


def write_tiny(model_type: str, folder: Path) -> str:
    """Write a random model as a checkpoint folder; return why none could be made, or nothing."""
    import torch
    from transformers import AutoModelForCausalLM

    from quant_fairness_plugin.model.small import randomize

    problem = "no tiny config of it builds"
    for config in tiny_config(model_type):
        try:
            with torch.device("meta"):
                values = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if values > MOST_VALUES:
                problem = f"not tried: the smallest config of it that is made here holds {values:,} values"
                continue
            torch.manual_seed(SEED)
            model = AutoModelForCausalLM.from_config(config).float().eval()
            randomize(model)
            ids = torch.arange(2, 12)[None]
            with torch.no_grad():
                if not torch.isfinite(model(input_ids=ids, use_cache=False).logits).all():
                    raise ValueError("its logits are not finite")
            model.half().save_pretrained(folder)
        except Exception as err:  # noqa: BLE001 - code of any architecture runs here
            problem = f"no tiny model of it runs ({type(err).__name__}: {' '.join(str(err).split())[:100]})"
            continue
        byte_tokenizer().save_pretrained(folder)
        return ""
    return problem


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one that begins and ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({end: 0} | {symbol: i + 1 for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end)


def _texts() -> TextSet:
    from quant_fairness_plugin.artifacts import TextSet

    return TextSet(
        name="three words",
        sentences={"en": ("one", "two", "three"), "he": ("אחת", "שתיים", "שלוש")},
        ids=("a", "b", "c"),
        parts=("all",) * 3,
        registers=("everyday",) * 3,
        parallel=True,
        sha256="0" * 64,
    )


def _walk(model_type: str, folder: Path, work: Path) -> Row:
    from quant_fairness_plugin.model.load import load_model
    from quant_fairness_plugin.model.outline import outline_model
    from quant_fairness_plugin.model.resolve import resolve_model

    files = resolve_model(str(folder))
    loaded = load_model(files)
    if outline_model(files).family != loaded.family:
        return Row(model_type, units=_units(loaded), reason="fails: plan and quantize see different units")
    row: dict[str, Any] = {"units": _units(loaded), "folds": _folds(loaded)}
    stops = ""
    try:
        _sweep(loaded)
        row["swept"] = True
    except Exception as err:  # noqa: BLE001 - a plan can be given without a sweep
        stops = f"sweep: {_one_line(err, folder)}"
    try:
        quantized = _quantize(loaded)
        row["quantized"] = True
    except Exception as err:  # noqa: BLE001 - the row says where it stops
        return Row(model_type, **row, reason=f"{stops} quantize: {_one_line(err, folder)}".strip())
    formats, read, reason = _export(quantized, folder, work)
    return Row(model_type, **row, formats=formats, read=read, reason=stops or reason)


def _units(loaded: LoadedModel) -> str:
    """The units of every kind of layer, in forward order."""
    family = loaded.family
    kinds = dict.fromkeys(
        ", ".join(unit.name for unit in family.units_of(layer)) + ("; 16 bit: " if family.kept(layer) else "")
        + ", ".join(name.split(".")[-1] for name in family.kept(layer))
        for layer in range(loaded.layers)
    )  # fmt: skip
    return " / ".join(kinds) + (" (not traced)" if family.generic else "")


def _folds(loaded: LoadedModel) -> str:
    from quant_fairness_plugin.errors import UnsupportedModelError
    from quant_fairness_plugin.quantize.folding import model_folds

    try:
        kinds = dict.fromkeys(", ".join(model_folds(loaded, layer)) for layer in range(loaded.layers))
    except UnsupportedModelError:
        return ""
    return " / ".join(kind or "none" for kind in kinds)


def _sweep(loaded: LoadedModel) -> None:
    from quant_fairness_plugin.artifacts import Grid, Precision
    from quant_fairness_plugin.plans.units import map_units
    from quant_fairness_plugin.sweep.bank import RtnBank
    from quant_fairness_plugin.sweep.walk import score_plans

    units = map_units(loaded)
    everything: dict[str, Precision] = dict.fromkeys(units.group_names(), "int4")
    plans = {name: {k: v for k, v in everything.items() if k != name} for name in everything}
    scores = score_plans(loaded, plans, _texts(), units=units, bank=RtnBank(loaded, units, Grid(group_size=GROUP)))
    if set(scores) < set(plans):
        raise ValueError("plans without scores")


def _quantize(loaded: LoadedModel) -> Any:
    from quant_fairness_plugin.artifacts import Grid
    from quant_fairness_plugin.plans.costs import count_bytes
    from quant_fairness_plugin.quantize.calibration import build_calibration
    from quant_fairness_plugin.quantize.stream import quantize_model
    from quant_fairness_plugin.recommend import explicit_plan

    grid = Grid(group_size=GROUP)
    layer_bytes, other = count_bytes(loaded, grid)
    plan = explicit_plan((1,), model=loaded.files.name, grid=grid, layer_bytes=layer_bytes, other_bytes=other)
    calibration = build_calibration(loaded.tokenizer, _texts(), row_tokens=8)
    return quantize_model(loaded, plan, method="gptq", calibration=calibration)


def _export(quantized: Any, folder: Path, work: Path) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Return the formats that are written, those that Transformers reads here, and what is wrong with the default."""
    from quant_fairness_plugin.export.writer import export

    written, read, reason = [], [], ""
    for form in FORMATS:
        try:
            export(quantized, work / form, texts=_texts(), format=form)  # type: ignore[arg-type] # one of the formats
        except Exception as err:  # noqa: BLE001 - the row says where it stops
            reason = reason or f"{form}: {_one_line(err, folder)}"
            continue
        written.append(form)
        if form in READ_HERE:
            read.append(form)  # `export` ran Transformers on it and compared the logits
    return tuple(written), tuple(read), reason


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


# The page


def row_text(row: Row) -> str:
    """A line of one of the two tables."""
    if not row.units:
        return f"| {row.model_type} | {row.reason} |"
    cells = (
        row.model_type,
        row.units,
        "yes" if row.swept else "no",
        "yes" if row.quantized else "no",
        ", ".join(row.formats) or "none",
        ", ".join(row.read) or "none",
        row.folds or "none",
        row.reason,
    )
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def page(stored: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole of docs/architectures.md, from the stored rows."""
    rows = [Row(**{field.name: row[field.name] for field in fields(Row)}) for _, row in sorted(stored.items())]
    versions = next(iter(stored.values()))["versions"]
    members = [row for row in rows if row.member]
    stopped = [row for row in rows if row.units and not row.member]
    refused = [row for row in rows if not row.units]
    header = ("architecture", "units of a layer", "swept", "quantized", "written", "read back", "AWQ folds", "stops at")
    return "\n".join(
        [
            "# Architectures",
            "",
            "<!-- Written by `make coverage` (benchmarks/architectures.py); do not edit. -->",
            "",
            f"Every causal architecture of Transformers {versions['transformers']} "
            f"(torch {versions['torch'].split('+')[0]}): {len(members)} of {len(rows)} come all the way, "
            f"{len(stopped)} stop on it, {len(refused)} are refused before anything is quantized.",
            "A row is a tiny model with random weights: opened, swept with every unit protected once, quantized with "
            f"GPTQ (INT4, groups of {GROUP}) and layer 1 in 16 bit, written in each format. *Read back*: Transformers "
            "loads it and computes the logits of our own dequantizer; gptq and awq need gptqmodel for that, and are "
            "only checked tensor by tensor ([readers.md](readers.md) has them read). *AWQ folds*: units whose input "
            "scale was proved to fold away. Kinds of layers are parted by `/`. What a trained model keeps of its "
            "quality is not measured here.",
            "",
            "## All the way",
            "",
            *_table(header, members),
            "",
            "## Not all the way",
            "",
            *_table(header, stopped),
            "",
            "## Refused",
            "",
            *_table(("architecture", "reason"), refused),
            "",
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Row]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return lines + [row_text(row) for row in rows]


if __name__ == "__main__":
    main()
