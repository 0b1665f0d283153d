"""SimMIM: hidden patches are hidden, only they are judged, and a training is kept and continued exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightly.models.utils import patchify, unpatchify

from mia_utils import pretrain
from mia_utils.datasets import scenes
from mia_utils.pretrain import mae

ARCHS = ("vit_nano_patch8_32", "swin_thin_32")
LOSS = dict(augmentation="none", size=32, progress=0.0)


@pytest.fixture(scope="module")
def pictures():
    return scenes.make_scenes(32, size=32, seed=2, progress=False)["images"]


@pytest.fixture(scope="module", params=ARCHS)
def method(request):
    return pretrain.build("simmim", request.param, seed=0).eval()


def draw(n: int, seed: int = 0, ratio: float = 0.6) -> torch.Tensor:
    return mae.draw_masks(n, 16, ratio, np.random.default_rng(seed))


def change_patches(method, images, masks):
    """Other random pixels in the masked units."""
    patches = patchify(images, method.patch)
    noise = torch.rand(patches.shape, generator=torch.Generator().manual_seed(9))
    return unpatchify(torch.where(masks[..., None], noise, patches), method.patch)


def test_one_mask_entry_is_one_place_of_the_encoders_output(method):
    assert method.n_tokens == 16 and method.patch == 8
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        tokens = method.embed_patches(images)
        assert tokens.shape == (2, 16 * method.patches_per_side**2, method.decoder.mask_token.shape[-1])
        assert method.predict(2 * images - 1, draw(2)).shape == (2, 16, 192)


def test_hidden_pixels_are_never_seen_and_visible_ones_are(method):
    images, masks = torch.rand(3, 3, 32, 32), draw(3)
    made = method.reconstruct(images, masks)
    assert torch.equal(made, method.reconstruct(change_patches(method, images, masks), masks))
    other = method.reconstruct(change_patches(method, images, ~masks), masks)
    assert ((made - other).abs().amax((1, 2, 3)) > 1e-3).all()


def test_the_mask_token_is_learned_shared_and_kept_with_the_decoder(method):
    images, masks = torch.rand(2, 3, 32, 32), draw(2)
    before, token = method.reconstruct(images, masks), method.decoder.mask_token
    saved = token.detach().clone()
    with torch.no_grad():
        token.copy_(saved.roll(1, dims=-1))  # the same numbers at other places
        assert not torch.allclose(before, method.reconstruct(images, masks), atol=1e-4)
        token.copy_(saved)
    assert torch.equal(before, method.reconstruct(images, masks))
    assert sum(p is token for p in method.parameters()) == 1
    method.loss(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), **LOSS, rng=np.random.default_rng(0)).backward()
    assert token.grad.abs().sum() > 0
    method.zero_grad()


def test_a_vit_predicts_as_lightly_masks():
    method = pretrain.build("simmim", "vit_nano_patch8_32", seed=1).eval()
    images, masks = torch.rand(3, 3, 32, 32), draw(3)
    with torch.inference_mode():
        whole = method.encoder.encode(images, mask=torch.cat([torch.zeros(3, 1, dtype=torch.bool), masks], dim=1))
        assert torch.allclose(method.predict(images, masks), method.decoder.predict(whole[:, 1:]), atol=1e-6)


def test_a_swin_predicts_as_patch_by_patch():
    method = pretrain.build("simmim", "swin_thin_32", seed=1).eval()
    images, masks = torch.rand(2, 3, 32, 32), draw(2)
    with torch.inference_mode():
        grid = method.backbone.patch_embed(images).clone()  # (2, 16, 16, 48): patches of 2 px
        for i in range(2):
            for row in range(16):
                for column in range(16):
                    if masks[i, 4 * (row // 4) + column // 4]:
                        grid[i, row, column] = method.decoder.mask_token[0, 0]
        slow = method.decoder.predict(method.backbone.norm(method.backbone.layers(grid)).reshape(2, 16, -1))
        assert torch.allclose(method.predict(images, masks), slow, atol=1e-6)


def test_the_loss_is_the_mean_absolute_error_of_hidden_pixels_alone(method, monkeypatch):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8))
    seen = {}

    def predict(x, masks):  # a prediction that depends on nothing
        seen["masks"] = masks
        return torch.zeros(len(x), 16, 192)

    monkeypatch.setattr(method, "predict", predict)
    loss = float(method.loss(images, **LOSS, rng=np.random.default_rng(3)))
    masks, total, count = seen["masks"], 0.0, 0
    for i in range(4):
        for unit in range(16):
            if masks[i, unit]:
                row, column = 8 * (unit // 4), 8 * (unit % 4)
                pixels = images[i, :, row : row + 8, column : column + 8].double() / 127.5 - 1
                total, count = total + float(pixels.abs().sum()), count + pixels.numel()
    assert masks.sum(1).tolist() == [10] * 4  # 0.6 of 16
    assert abs(loss - total / count) < 1e-6
    changed = (255 * change_patches(method, images / 255, ~masks)).round().to(torch.uint8)
    assert abs(loss - float(method.loss(changed, **LOSS, rng=np.random.default_rng(3)))) < 1e-6
    changed = (255 * change_patches(method, images / 255, masks)).round().to(torch.uint8)
    assert abs(loss - float(method.loss(changed, **LOSS, rng=np.random.default_rng(3)))) > 1e-4


@pytest.mark.parametrize(("arch", "n", "epochs"), [(ARCHS[0], 32, 40), (ARCHS[1], 8, 15)])
def test_training_lowers_the_loss_on_the_members(pictures, arch, n, epochs):
    run = pretrain.fit("simmim", pictures[:n], arch=arch, epochs=epochs, progress=False, checkpoints=[])
    assert run.history.loss_members.iloc[-1] < 0.75 * run.history.loss_members.iloc[0]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_killed_training_resumes_to_the_same_weights_and_a_saved_one_reconstructs_the_same(pictures, tmp_path, arch):
    n = 16 if arch == ARCHS[0] else 6

    def fit(**extra):
        return pretrain.fit("simmim", pictures[:n], arch=arch, epochs=3, batch_size=n // 2, progress=False, **extra)

    whole = fit(checkpoints=[1])
    fit(checkpoints=[1], resume_path=tmp_path / "resume.pt", stop_after=3)
    resumed = fit(checkpoints=[1], resume_path=tmp_path / "resume.pt")
    assert "decoder.mask_token" in whole.states[3]
    for key, value in whole.states[3].items():
        assert torch.equal(value, resumed.states[3][key]), key
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))

    again = pretrain.Run.load(whole.save(tmp_path / "run"), settings=whole.settings)
    images, masks = torch.from_numpy(pictures[:3]).permute(0, 3, 1, 2) / 255, draw(3)
    made = []
    for epoch in (0, 1, 3):
        kept, read = (run.autoencoder_at(epoch).reconstruct(images, masks) for run in (whole, again))
        assert torch.equal(kept, read)
        with torch.inference_mode():
            assert torch.equal(whole.encoder_at(epoch).tokens(images), again.encoder_at(epoch).tokens(images))
        made.append(kept)
    assert not torch.allclose(made[0], made[1], atol=1e-4) and not torch.allclose(made[1], made[2], atol=1e-4)
    untrained, start = pretrain.build("simmim", arch).backbone, whole.encoder_at(0)
    for key, value in start.module.state_dict().items():
        assert torch.equal(value, untrained.state_dict()[key]), key


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet_thin_32", {}, "simmim needs a plain ViT or a Swin, got ResNet"),
        (ARCHS[0], {"mask_ratio": 0.0}, "hides 0 of 16 patches"),
        (ARCHS[0], {"mask_ratio": 1.0}, "hides 16 of 16 patches"),
        (ARCHS[0], {"norm_pix_loss": True}, "simmim does not take these options"),
    ],
)
def test_bad_settings_are_one_line(pictures, arch, options, message):
    with pytest.raises(ValueError, match=message) as error:
        pretrain.fit("simmim", pictures[:4], arch=arch, epochs=1, progress=False, **options)
    assert "\n" not in str(error.value)
