"""Integer layouts and the kernels that compute on them, usable without the rest of the project.

N is the number of output features (rows), K of input features (columns), M of tokens, G of groups along K.

* `packing`: the bit layouts of checkpoint formats, unsigned integers `[N, K]` to and from the int32 tensors of files.
* `nibble_planes`: the kernels' own layout, `dequantize` the way back, `naive` the truth that everything is tested with.
* `int4_matmul`: the operator; `kernel_config` chooses, `launch` launches, `triton_kernels` are the kernels.
* `cpu_matmul`: the fast way on a CPU.
* `verify`, `sass`, `timing`, `tune`: are they right, what do they compile to, how fast are they, what is fastest here.

Only launching a Triton kernel needs triton and a GPU; the rest needs torch alone.
"""
