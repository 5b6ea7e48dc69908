"""Step 6, quantize: a loaded model and a list of protected layers in, a `QuantizedModel` (integers, 16-bit rest) out.

- `grid_rules`: which grids exist and which shapes they fit (no torch)
- `grid`: scales, zero points, rounding to nearest; `QuantizedTensor`
- `gptq`: one weight solved against the second moment of its inputs
- `calibration`: text as token rows, the same number of tokens for every language (no torch)
- `selection`: which modules a plan quantizes
- `blocks`: a model run block by block on calibration rows
- `stream`: `quantize_model`, which puts the above together
- `bank`: dequantized weights, swapped into a model and out again
- `legacy`: the seeds' `simulate_int4`, bit for bit
"""
