"""Quantize: a loaded model and a plan in, a `QuantizedModel` (integers, and what stays in 16 bit) out.

- `methods`: what each method needs and can do, and its solver; a new one is a file and a line there (no torch)
- `grid_rules`: which grids exist and which shapes they fit (no torch)
- `grid`, `clipping`: scales, zero points, rounding to nearest; `QuantizedTensor`
- `gptq`, `awq`: the solver of one weight, and of one fusion group; `folding`: where AWQ's scales go
- `compensation`: what a module has to compute to make up for those in front of it; `refinement`: after GPTQ
- `columns`: input channels that stay in 16 bit beside the integers
- `calibration`: text as token rows, the same number of tokens for every language (no torch)
- `blocks`, `moments`: a model run block by block on calibration rows, and the second moments of its inputs
- `selection`: which modules a plan quantizes
- `solving`: one fusion group by one method; `stream`: `quantize_model`, which puts the above together
- `minimax`: language weights that lower the worst damage
- `backends`: the same by another tool
"""
