"""Integer layouts (and, later, the kernels that compute on them), usable without the rest of the project.

`packing` holds the exact bit layouts of the checkpoint formats: unsigned 4-bit integers `[N, K]` to and from the int32
tensors of `gptq` and `compressed-tensors` files. N is the number of output features (rows), K of input features
(columns), G of groups along K. Everything here needs torch only, and no GPU.
"""
