"""Segmenters: one face for any network, the four we train, joint augmentation, weights on disk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mia_utils import pretrain
from mia_utils.models import checkpoints, segmenters
from mia_utils.pretrain import segmentation

SMALL = {
    "unet": {"encoder_depth": 3, "decoder_channels": (16, 8, 8)},
    "upernet": {"encoder_depth": 3, "decoder_channels": 16},
    "pspnet": {"psp_out_channels": 16},
    "deeplabv3plus": {"decoder_channels": 16},
}


def make_batch(n: int = 4, size: tuple[int, int] = (32, 64), n_classes: int = 5, seed: int = 0):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, n_classes, (n, *size)).astype(np.uint8)
    masks[:, :3] = 255
    return rng.integers(0, 256, (n, *size, 3), dtype=np.uint8), masks


def to_tensors(images: np.ndarray, masks: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(masks)


# ------------------------------------------------------------------------------------------- the face


def color_logits(x: torch.Tensor) -> torch.Tensor:
    return 4 * x


def test_logits_and_posteriors_are_told_apart_and_sum_to_one():
    x = torch.rand(2, 3, 6, 7)
    for outputs in ("auto", "logits"):
        segmenter = segmenters.wrap(color_logits, n_classes=3, outputs=outputs)
        torch.testing.assert_close(segmenter.posteriors(x), (4 * x).softmax(1))
        assert segmenter.outputs == "logits"
    for outputs in ("auto", "posteriors"):
        segmenter = segmenters.wrap(lambda x: color_logits(x).softmax(1), n_classes=3, outputs=outputs)
        torch.testing.assert_close(segmenter.posteriors(x), (4 * x).softmax(1))
        assert segmenter.outputs == "posteriors"
    assert segmenter.offers == {"posteriors"} and "C=3" in repr(segmenter)


def test_what_auto_decided_first_is_kept_for_every_batch():
    segmenter = segmenters.wrap(lambda x: x, n_classes=3)
    segmenter.posteriors(torch.rand(1, 3, 4, 4))
    even = torch.full((1, 3, 4, 4), 1 / 3)  # logits that happen to sum to one
    torch.testing.assert_close(segmenter.posteriors(even), even.softmax(1))
    with pytest.raises(ValueError, match="expected posteriors that sum to one.*outputs='logits'"):
        segmenters.wrap(lambda x: 3 * x, n_classes=3, outputs="posteriors").posteriors(torch.ones(1, 3, 4, 4))


class Answer:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "packed", [lambda y: {"out": y, "aux": y[:1]}, lambda y: {"logits": y}, lambda y: (y, 7), Answer]
)
def test_dicts_tuples_and_objects_of_common_libraries_are_unpacked(packed):
    x = torch.rand(2, 3, 4, 5)
    got = segmenters.wrap(lambda x: packed(color_logits(x)), n_classes=3).posteriors(x)
    torch.testing.assert_close(got, (4 * x).softmax(1))


def test_a_module_is_normalized_put_in_eval_mode_and_scaled_up_from_a_coarse_grid():
    class Coarse(nn.Module):
        def forward(self, x):
            assert not self.training
            return nn.functional.avg_pool2d(x, 4)

    module = Coarse().train()
    segmenter = segmenters.wrap(module, n_classes=3, mean=(0.5,) * 3, std=(0.25,) * 3, multiple=8)
    x = torch.full((2, 3, 12, 20), 0.75)
    x[:, 0] = 0.5
    got = segmenter.posteriors(x)
    assert got.shape == (2, 3, 12, 20) and segmenter.module is module
    torch.testing.assert_close(got[0, :, 5, 5], torch.tensor([0.0, 1.0, 1.0]).softmax(0))


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        (color_logits, torch.zeros(3, 4, 4), "float images .N, 3, H, W."),
        (color_logits, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"),
        (lambda x: x[:, :2], torch.zeros(1, 3, 4, 4), r"\(1, 3, ...\), got \(1, 2, 4, 4\)"),
        (lambda x: x.mean((2, 3)), torch.zeros(1, 3, 4, 4), r"got \(1, 3\)"),
        (lambda x: "road", torch.zeros(1, 3, 4, 4), "expected a tensor .N, C, H, W., got str"),
        (lambda x: x / 0, torch.ones(1, 3, 4, 4), "not finite"),
    ],
)
def test_wrong_inputs_and_answers_are_one_line(model, images, message):
    with pytest.raises(ValueError, match=message) as error:
        segmenters.wrap(model, n_classes=3, outputs="logits").posteriors(images)
    assert "\n" not in str(error.value)


def test_wrong_arguments_of_wrap_and_make_are_one_line():
    for call, message in [
        (lambda: segmenters.wrap(color_logits, n_classes=3, outputs="scores"), "auto, logits, posteriors"),
        (lambda: segmenters.wrap(color_logits, n_classes=1), "n_classes from 2"),
        (lambda: segmenters.wrap("model.pt", n_classes=3), "module or function"),
        (lambda: segmenters.make("segnet", 3), "unknown segmenter 'segnet': expected one of unet"),
        (lambda: segmenters.make("unet", 3, encoder="no_such_net"), "no unet on encoder 'no_such_net'"),
        (
            lambda: segmenters.make("unet", 3, colour="red"),
            "unet takes no option 'colour'; allowed: .*decoder_channels",
        ),
        (lambda: segmenters.make("unet", 3, encoder_depth=9), "no unet on encoder"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- the four networks


@pytest.mark.parametrize("arch", segmenters.ARCHS)
def test_each_network_answers_trains_a_step_and_comes_back_from_disk(arch, tmp_path):
    _, defaults = pretrain.METHODS[arch]
    method = pretrain.build(arch, "mobilenet_v2", n_classes=5, seed=1, **SMALL[arch])
    untrained = segmenters.make(arch, 5, (32, 64), seed=1, **SMALL[arch])
    for key, value in untrained.module.state_dict().items():
        assert torch.equal(value, method.backbone.state_dict()[key]), key  # the twin is where training begins
    images, masks = to_tensors(*make_batch())
    method.train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=defaults["lr"])
    loss = method.loss(images, labels=masks, augmentation="crop", size=None, rng=np.random.default_rng(0), progress=0.0)
    loss.backward()
    optimizer.step()
    method.after_step(1.0)
    assert torch.isfinite(loss) and 0.5 < float(loss.detach()) < 5
    segmenter = method.as_segmenter()
    x = images.float() / 255
    with torch.inference_mode():
        before = segmenter.posteriors(x)
        assert before.shape == (4, 5, 32, 64)
        torch.testing.assert_close(before.sum(1), torch.ones(4, 32, 64))
        # a batch of one, and another order: convolutions of other batch shapes differ in the last bits of float32
        torch.testing.assert_close(segmenter.posteriors(x[2:3]), before[2:3], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(segmenter.posteriors(x.flip(0)), before.flip(0), rtol=1e-4, atol=1e-5)
        assert segmenter.posteriors(x[:1, :, :20, :45]).shape == (1, 5, 20, 45)  # no multiple of 32: padded and cut
        segmenters.save(segmenter, tmp_path / "segmenter.safetensors")
        again = segmenters.load(tmp_path)
        assert torch.equal(again.posteriors(x), before)
        assert (again.method, again.arch, again.n_classes, again.size) == (arch, "mobilenet_v2", 5, None)


def test_a_timm_encoder_is_found_by_its_timm_name_and_seeds_are_private():
    options = {"encoder": "resnet10t", "encoder_depth": 3, "decoder_channels": (16, 8, 8)}
    torch.manual_seed(1)
    first = segmenters.make("unet", 3, seed=0, **options)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    other = segmenters.make("unet", 3, seed=1, **options)
    weights = [s.module.segmentation_head[0].weight for s in (first, other)]
    assert not torch.equal(*weights)
    assert torch.equal(weights[0], segmenters.make("unet", 3, seed=0, **options).module.segmentation_head[0].weight)


def test_files_that_are_no_segmenter_are_one_line_each(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        segmenters.load(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_bytes(b"not found, sorry")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "bare.safetensors"))
    whole = segmenters.save(segmenters.make("unet", 3, **SMALL["unet"]), tmp_path / "whole.safetensors")
    _, header = checkpoints.read_safetensors(whole)
    save_file({"a": torch.zeros(1)}, str(tmp_path / "other.safetensors"), metadata=header)
    for name, message in (("text", "no readable"), ("bare", "lacks 'method'"), ("other", "does not fit unet")):
        with pytest.raises(ValueError, match=f"{name}.safetensors.*{message}") as error:
            segmenters.load(tmp_path / f"{name}.safetensors")
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="wrapped ones can not"):
        segmenters.save(segmenters.wrap(color_logits, n_classes=3), tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------------- training


def test_void_does_not_train_and_a_batch_of_void_has_no_gradient():
    method = pretrain.build("unet", "mobilenet_v2", n_classes=5, **SMALL["unet"])
    images, masks = to_tensors(*make_batch())
    call = {"augmentation": "none", "size": None, "progress": 0.0}
    method.eval()
    with torch.no_grad():
        loss = method.loss(images, labels=masks, rng=np.random.default_rng(0), **call)
        logits = method.backbone(images.float() / 127.5 - 1)
        slow = nn.functional.cross_entropy(logits.permute(0, 2, 3, 1)[masks != 255], masks[masks != 255].long())
    torch.testing.assert_close(loss, slow, rtol=1e-4, atol=1e-5)
    method.train()
    nothing = method.loss(images, labels=torch.full_like(masks, 255), rng=np.random.default_rng(0), **call)
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_wrong_label_ids_and_color_augmentations_are_one_line():
    method = pretrain.build("unet", "mobilenet_v2", n_classes=3, **SMALL["unet"])
    images, masks = to_tensors(*make_batch())
    call = {"size": None, "progress": 0.0, "rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match="id 4, expected 0 to 2, or 255"):
        method.loss(images, labels=masks, augmentation="none", **call)
    with pytest.raises(ValueError, match="'simclr' changes colors"):
        method.loss(images, labels=masks, augmentation="simclr", **call)
    with pytest.raises(ValueError, match=r"masks \(B, H, W\)"):
        method.loss(images, labels=masks[:, 1:], augmentation="none", **call)


@pytest.mark.parametrize("settings", [{}, {"flip": 0.5}, {"scale": (0.2, 1.0), "flip": 0.5}])
def test_image_and_mask_are_augmented_alike(settings):
    # the mask is written into the picture: after any augmentation they still show the same
    rng = np.random.default_rng(0)
    masks = np.repeat(np.repeat(rng.integers(0, 6, (8, 4, 8)), 8, axis=1), 8, axis=2).astype(np.uint8)
    images = np.repeat(masks[:, None] * 40, 3, axis=1).astype(np.uint8)
    x, y = segmentation.augment_pair(
        torch.from_numpy(images), torch.from_numpy(masks), rng=np.random.default_rng(1), **settings
    )
    assert x.shape == (8, 3, 32, 64) and y.dtype == torch.int64
    assert 0 <= float(x.min()) and float(x.max()) <= 1 and set(y.unique().tolist()) <= set(range(6))
    shown = (x[:, 0] * 255 / 40 - y).abs()
    # bilinear and nearest may differ on the borders of the squares only
    assert float((shown < 0.02).float().mean()) > (0.5 if settings.get("scale") else 0.999)
    again = segmentation.augment_pair(
        torch.from_numpy(images), torch.from_numpy(masks), rng=np.random.default_rng(1), **settings
    )
    assert torch.equal(again[0], x) and torch.equal(again[1], y)


def test_without_augmentation_pixels_and_labels_are_untouched_and_void_survives_a_crop():
    images, masks = to_tensors(*make_batch())
    x, y = segmentation.augment_pair(images, masks, rng=np.random.default_rng(0))
    assert torch.equal((x * 255).round().byte(), images) and torch.equal(y, masks.long())
    _, y = segmentation.augment_pair(
        images, torch.full_like(masks, 255), rng=np.random.default_rng(0), scale=(0.2, 1), flip=0.5
    )
    assert (y == 255).all()


def test_mixed_precision_moves_no_label_and_no_pixel():
    images, masks = to_tensors(*make_batch())
    method = pretrain.build("unet", "mobilenet_v2", n_classes=5, **SMALL["unet"])
    call = dict(augmentation="crop", size=None)
    plain = method._augment(images, masks, rng=np.random.default_rng(0), **call)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method._augment(images, masks, rng=np.random.default_rng(0), **call)
    assert all(map(torch.equal, plain, mixed))


def test_iou_leaves_void_and_absent_classes_out():
    labels = np.array([[[0, 0, 1, 255]]], np.uint8)

    def model(x):
        return nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 4).permute(0, 3, 1, 2).float() * 9

    got = segmenters.measure_iou(
        segmenters.wrap(model, n_classes=4, outputs="logits"), np.zeros((1, 1, 4, 3), np.uint8), labels
    )
    np.testing.assert_allclose(got["iou"], [0.5, 0.5, np.nan, np.nan])
    np.testing.assert_allclose([got["miou"], got["pixel_accuracy"]], [0.5, 2 / 3])
