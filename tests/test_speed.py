"""Fast products are taken where they are exact, and change nothing that is measured."""

import timm.layers
import torch

from mia_utils.models import backbones, encoders

IMAGES = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def restore(precision, fused):
    torch.set_float32_matmul_precision(precision)
    timm.layers.set_fused_attn(fused)


def test_what_is_chosen_gives_the_same_tokens():
    before, fused = torch.get_float32_matmul_precision(), bool(timm.layers.config.use_fused_attn())
    try:
        with torch.inference_mode():
            slow = encoders.make("vit_micro_patch8_32").tokens(IMAGES)
        chosen = backbones.use_fast_products()
        assert chosen.startswith(torch.get_float32_matmul_precision())
        assert backbones.measure_error() < backbones.TOLERANCE
        with torch.inference_mode():
            fast = encoders.make("vit_micro_patch8_32").tokens(IMAGES)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    finally:
        restore(before, fused)


def test_a_cpu_that_would_round_keeps_its_setting(monkeypatch):
    before, fused = torch.get_float32_matmul_precision(), bool(timm.layers.config.use_fused_attn())
    try:
        monkeypatch.setattr(backbones, "measure_error", lambda: 1e-3)  # what AMX does in bfloat16
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert backbones.use_fast_products() == f"{before}: medium is off by 1e-03 on this CPU"
        assert torch.get_float32_matmul_precision() == before and bool(timm.layers.config.use_fused_attn()) == fused
    finally:
        restore(before, fused)
