"""GGUF files of tiny models as llama.cpp's converter would write them: names and row orders spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from quant_fairness_plugin.checkpoint.dequantize import read_dense_state
from quant_fairness_plugin.model.weights import read_json

LLAMA = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GPT2 = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WHOLE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


SIZES = {"Q4_0": 18, "Q5_0": 22, "Q8_0": 34}
"""Bytes of a block of 32 weights."""


def gguf_name(name: str) -> str:
    """What llama.cpp calls a tensor."""
    module, _, suffix = name.rpartition(".")
    if module in WHOLE:
        return f"{WHOLE[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{(LLAMA | GPT2)[rest]}.{suffix}"


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head as llama.cpp's rotary embedding takes them: 0, n/2, 1, n/2 + 1, …"""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for place in range(size // 2):
            rows += [head * size + place, head * size + size // 2 + place]
    return weight[rows]


def as_converted(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """What the converter stores of a tensor."""
    kind = config["model_type"]
    if kind in ("llama", "mistral") and ".q_proj." in name:
        return interleaved(tensor, config["num_attention_heads"])
    if kind in ("llama", "mistral") and ".k_proj." in name:
        return interleaved(tensor, config["num_key_value_heads"])
    if kind == "gemma" and "norm" in name:
        return tensor + 1
    if kind == "gpt2" and tensor.ndim == 2 and "wte" not in name and "wpe" not in name:
        return tensor.T
    return tensor


def write_gguf_of(
    model: Path, path: Path, *, kind: str = "F16", leave_out: str = "", add: str = "", alignment: int = 32
) -> Path:
    """Write the GGUF file of a 16-bit model folder, its matrices as one type."""
    config = read_json(model / "config.json")
    name = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, name)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(config.get("num_hidden_layers") or config["n_layer"])
    writer.add_file_type(1)
    writer.add_array("quant_fairness.test", ["a", "b"])
    writer.add_head_count(config.get("num_attention_heads") or config["n_head"])
    if "hidden_size" in config:
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
        writer.add_vocab_size(config["vocab_size"])
        if "head_dim" in config:
            writer.add_key_length(config["head_dim"])
            writer.add_value_length(config["head_dim"])
    for name, tensor in read_dense_state(model).items():
        if name == leave_out:
            continue
        values = as_converted(name, tensor, config).contiguous().numpy()
        wide = values.ndim == 1 or ".wpe." in name
        wanted = gguf.GGMLQuantizationType["F32" if wide else kind]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, wanted), raw_dtype=wanted)
    if add:
        writer.add_tensor(add, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_values(path: Path) -> dict[str, Tensor]:
    """What every tensor of a GGUF file stands for, by loops over its blocks for Q4_0, Q5_0 and Q8_0."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        kind, data = tensor.tensor_type.name, np.ascontiguousarray(tensor.data)
        if kind in SIZES:
            values = [_block(kind, block) for block in data.reshape(-1, SIZES[kind])]
            found[tensor.name] = torch.tensor(values).view(shape)
        else:
            bits = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            found[tensor.name] = torch.frombuffer(bytearray(data.tobytes()), dtype=bits).view(shape).float()
    return found


def _block(kind: str, block: np.ndarray[Any, Any]) -> list[float]:
    scale = float(block[:2].view(np.float16)[0])
    if kind == "Q8_0":
        return [scale * int(value) for value in block[2:].view(np.int8)]
    if kind == "Q5_0":
        fifth, low = int.from_bytes(block[2:6].tobytes(), "little"), [int(byte) for byte in block[6:]]
        nibbles = [byte & 15 for byte in low] + [byte >> 4 for byte in low]
        return [scale * ((nibble | (fifth >> place & 1) << 4) - 16) for place, nibble in enumerate(nibbles)]
    return [scale * ((int(b) & 15) - 8) for b in block[2:]] + [scale * ((int(b) >> 4) - 8) for b in block[2:]]
