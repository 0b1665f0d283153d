"""Products at the speed of the CPU, chosen by a probe and never assumed."""

import timm.layers
import torch

TOLERANCE = 1e-5  # relative error of one product: float32 kernels stay at 1e-6, bfloat16 ones reach 1e-3


def measure_error(n: int = 256) -> float:
    """Largest error of a product of two (n, n) float32 matrices, as a share of its largest value; about 5 ms."""
    a, b = torch.randn(2, n, n, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).abs().max() / exact.abs().max())


def use_fast_products() -> str:
    """Let oneDNN multiply where that is exact on this CPU; returns what was chosen, as words. Call it before models.

    PyTorch's default takes MKL's AVX2 path on AMD; ``"medium"`` takes oneDNN at twice its rate, and on CPUs with AMX
    bfloat16, which the probe sees. Beside it timm's own attention is 5 to 9 times faster than the fused kernel.
    """
    before = torch.get_float32_matmul_precision()
    if torch.cuda.is_available():
        return f"{before}: a GPU does the products"
    torch.set_float32_matmul_precision("medium")
    error = measure_error()
    if error >= TOLERANCE:
        torch.set_float32_matmul_precision(before)
        return f"{before}: medium is off by {error:.0e} on this CPU"
    timm.layers.set_fused_attn(False)
    return f"medium: off by {error:.0e}, attention not fused"
