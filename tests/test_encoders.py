"""One face for every backbone, and weight files that can't do harm."""

import argparse
import os
import pickle

import pytest
import torch
from torch import nn

from mia_utils.models import encoders

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ["vit_nano_patch8_32", "vit_micro_patch4_32", "resnet_thin_32", "swin_thin_32"])
def test_tokens_and_vectors_have_the_promised_shapes(arch):
    encoder = encoders.make(arch, method="simclr")
    with torch.inference_mode():
        assert encoder.tokens(IMAGES).shape == (3, encoder.n_tokens, encoder.dim)
        assert torch.allclose(encoder.embed(IMAGES), encoder.tokens(IMAGES).mean(1))
        assert encoder.embed(IMAGES[:, :, :16, :16]).shape == (3, encoder.dim)  # a part crop


def test_a_vit_gives_tokens_after_the_final_norm_and_its_class_token_apart():
    encoder = encoders.make("vit_nano_patch8_32", method="dino")
    with torch.inference_mode():
        out = encoder.module.forward_features((IMAGES - 0.5) / 0.5)
        assert torch.equal(encoder.tokens(IMAGES), out[:, 1:])
        assert torch.equal(encoder.embed(IMAGES), out[:, 0])  # auto = class token for DINO
        assert torch.equal(encoder.embed(IMAGES, pooling="mean"), out[:, 1:].mean(1))
    assert abs(float(out[:, 1:].mean())) < 1e-3 and abs(float(out[:, 1:].std()) - 1) < 0.05  # normed


def test_fresh_weights_repeat_with_the_seed_and_leave_the_global_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (encoders.make("vit_nano_patch8_32", seed=s).module.state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_small_inputs_are_resized_up_to_what_the_encoder_takes():
    encoder = encoders.make("vit_nano_patch8_32")
    with torch.inference_mode():
        assert encoder.embed(IMAGES[:, :, :5, :5]).shape == (3, 64)


def test_anything_callable_can_be_wrapped():
    maps = encoders.wrap(tokens=nn.Conv2d(3, 6, 8, 8), size=32, mean=(0.5,) * 3, std=(0.5,) * 3, name="conv")
    with torch.inference_mode():
        assert maps.tokens(IMAGES).shape == (3, 16, 6) and maps.embed(IMAGES).shape == (3, 6)
    vectors = encoders.wrap(lambda x: x.flatten(1), size=32)
    assert vectors.offers == {"embed"}
    with pytest.raises(ValueError, match="offers no tokens"):
        vectors.tokens(IMAGES)
    with pytest.raises(ValueError, match="expected at least 2"):
        encoders.wrap(tokens=lambda x: x.mean((2, 3))[:, None], size=32)


@pytest.mark.parametrize(
    "images", [torch.rand(3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.rand(2, 1, 32, 32)]
)
def test_wrong_images_are_refused_with_what_came(images):
    with pytest.raises(ValueError, match=r"expected float images \(N, 3, H, W\) in \[0, 1\], got"):
        encoders.make("vit_nano_patch8_32").tokens(images)


def test_saved_weights_come_back_with_arch_and_method(tmp_path):
    encoder = encoders.make("resnet_thin_32", method="simclr", seed=3)
    again = encoders.open(encoders.save(encoder, tmp_path / "weights.safetensors"))
    assert (again.arch, again.method) == ("resnet_thin_32", "simclr")
    with torch.inference_mode():
        assert torch.equal(again.tokens(IMAGES), encoder.tokens(IMAGES))


def test_a_checkpoint_of_another_architecture_is_one_line(tmp_path):
    path = encoders.save(encoders.make("vit_nano_patch8_32"), tmp_path / "nano.safetensors")
    with pytest.raises(
        ValueError, match=r"nano.safetensors does not fit vit_micro_patch8_32: .* expected .* got"
    ) as info:
        encoders.open(path, arch="vit_micro_patch8_32")
    assert "\n" not in str(info.value)


def test_a_released_vit_checkpoint_is_read_without_naming_its_architecture(tmp_path):
    module = encoders.make("vit_nano_patch8_32", seed=4).module
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    content = {"model": state, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, tmp_path / "mae.pth")
    with pytest.raises(ValueError, match="number of heads of a ViT of width 64 is in no weight"):
        encoders.open(tmp_path / "mae.pth")
    encoder = encoders.open(tmp_path / "mae.pth", arch_args={"num_heads": 2})
    assert encoder.input_size == 32 and encoder.n_tokens == 16
    assert torch.equal(encoder.module.blocks[0].mlp.fc1.weight, module.blocks[0].mlp.fc1.weight)


class _Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, monkeypatch, writer):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    with open(path, "wb") as file:
        pickle.dump(_Evil(), file) if writer == "pickle" else torch.save({"model": _Evil()}, file)
    with pytest.raises(ValueError, match="evil.pth .*refused, only tensors are read and no code is run") as info:
        encoders.open(path)
    assert "\n" not in str(info.value) and not (tmp_path / "executed").exists()


def test_missing_and_broken_files_and_names_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        encoders.open(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="broken.safetensors is no readable safetensors file"):
        encoders.open(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="timm knows no model 'vit_nothing'"):
        encoders.open("timm:vit_nothing")
    with pytest.raises(ValueError, match="no encoder 'vit_nothing'"):
        encoders.make("vit_nothing")
