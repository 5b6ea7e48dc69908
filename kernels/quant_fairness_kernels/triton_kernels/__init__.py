"""The Triton kernels: `matmul` (one launch), `tiles` (its parts), `dequantization` (bits to numbers), `weights`.

Importing these needs triton, so the host code imports them where it launches them. Function bodies are Triton's
language, not Python: argument types are unannotated but for `tl.constexpr`, and the size limits do not apply.
"""
