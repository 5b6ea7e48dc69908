"""What a module has to compute so that it makes up for what the modules in front of it have lost.

In the quantized model a module is given x, in the 16-bit model x₁₆. A solution that comes close to W x keeps the error
of x; the target T whose outputs T x come closest to W x₁₆ undoes as much of it as a matrix can. Written from Arai and
Ichikawa, "Quantization Error Propagation" (arXiv 2504.09629); that a module should match the 16-bit model's own outputs
is also in Li et al., "GPTAQ" (arXiv 2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_fairness_plugin.quantize.moments import check_finite


def compensated(weight: Tensor, hessian: Tensor, across: Tensor, *, damp: float) -> Tensor:
    """Return the weight T that minimizes E|W x₁₆ - T x|² + λ|T - W|².

    T = W + W A (H + λI)⁻¹, where H = E[x xᵀ] and A = E[(x₁₆ - x) xᵀ].

    Args:
        weight: W, float `[rows, cols]`, not changed.
        hessian: H `[cols, cols]`, in any scale, not changed.
        across: A `[cols, cols]`, in the same scale.
        damp: λ, as a share of the mean diagonal of H. It keeps T near W in directions that the calibration text hardly
            has, where A says nothing that would hold for other text.

    Raises:
        UnsolvableError: H or A holds NaN or infinity.
    """
    check_finite(hessian, across)
    if not across.any():  # nothing in front is quantized
        return weight
    factor, wide = hessian.clone(), weight.to(across.dtype)
    factor.diagonal().add_(damp * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(factor)
    return (wide + torch.cholesky_solve((wide @ across).T, factor).T).to(weight.dtype)
