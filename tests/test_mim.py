"""MIM attack: scores against a slow loop, masks shared by all images, the attacker's own decoder over an encoder."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import pytest
import torch
from lightly.models.utils import patchify
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from mia_utils import attacks, pretrain, seeds
from mia_utils.attacks import mim
from mia_utils.datasets import Pool, scenes
from mia_utils.models import encoders, views
from mia_utils.pretrain import loop
from mia_utils.protocol import splits

MODELS = {
    "mae": ("mae", "vit_nano_patch8_32"),
    "simmim-vit": ("simmim", "vit_nano_patch8_32"),
    "simmim-swin": ("simmim", "swin_thin_32"),
}


@pytest.fixture(scope="module")
def images():
    return scenes.make_scenes(64, size=32, seed=3, progress=False)["images"]


@pytest.fixture(scope="module", params=MODELS)
def autoencoder(request):
    return pretrain.build(*MODELS[request.param], seed=0).eval()


@pytest.fixture(scope="module")
def model():
    return pretrain.build("mae", "vit_nano_patch8_32", seed=0).eval()


def compute_ssim_slowly(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """SSIM of two (H, W) planes in [0, 1]: Gaussian window of 11 pixels, sigma 1.5, mirrored borders."""

    def blur(plane):
        return gaussian_filter(plane, 1.5, truncate=3.5, mode="mirror")

    vx, vy, c = blur(x * x) - blur(x) ** 2, blur(y * y) - blur(y) ** 2, blur(x * y) - blur(x) * blur(y)
    return ((2 * blur(x) * blur(y) + 1e-4) * (2 * c + 9e-4)) / ((blur(x) ** 2 + blur(y) ** 2 + 1e-4) * (vx + vy + 9e-4))


def score_slowly(model, images, masks, distance: str, region: str) -> list[float]:
    """One image, one mask, one pixel plane at a time, in float64."""
    scores = []
    for image in images:
        distances = []
        for mask in masks:
            x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
            made = model.reconstruct(x, mask[None])[0].double().numpy()
            truth, total, count = image.astype(float).transpose(2, 0, 1) / 255, 0.0, 0
            patch = 32 // round(len(mask) ** 0.5)
            for channel in range(3):
                if distance == "ssim":
                    error = 1 - compute_ssim_slowly(made[channel], truth[channel])
                else:
                    error = abs(made[channel] - truth[channel]) ** (2 if distance == "mse" else 1)
                for row in range(32):
                    for column in range(32):
                        if region == "all" or mask[row // patch * (32 // patch) + column // patch]:
                            total, count = total + error[row, column], count + 1
            distances.append(total / count)
        scores.append(-sum(distances) / len(distances))
    return scores


@pytest.mark.parametrize("region", ["masked", "all"])
@pytest.mark.parametrize("distance", ["mse", "l1", "ssim"])
def test_scores_equal_a_loop_over_images_masks_and_pixels(autoencoder, images, distance, region):
    options = dict(n_masks=3, mask_ratio=0.6, seed=5)
    got = mim.score_reconstruction(autoencoder, images[:2], distance=distance, region=region, **options)
    masks = mim.draw_masks(3, autoencoder.n_tokens, mask_ratio=0.6, seed=5)
    slow = score_slowly(autoencoder, images[:2], masks, distance, region)
    assert got.dtype == np.float64 and np.abs(got - slow).max() < 1e-5
    assert np.ptp(got) > 1e-4  # and they are not all the same


def test_an_autoencoder_that_only_reconstructs_gets_the_same_scores(model, images):
    class Foreign:
        n_tokens = 16

        def reconstruct(self, x, masks):
            return model.reconstruct(x, masks)

    for options in (dict(), dict(batch_size=3), dict(distance="ssim", n_masks=4)):
        ours, plain = (mim.score_reconstruction(m, images[:5], **options) for m in (model, Foreign()))
        np.testing.assert_allclose(plain, ours, atol=1e-6)  # float32 products of another batch shape


def test_a_score_is_the_same_alone_and_in_any_batch_and_order(autoencoder, images):
    images = images[:10]
    together = mim.score_reconstruction(autoencoder, images, n_masks=4)
    alone = np.concatenate([mim.score_reconstruction(autoencoder, images[i : i + 1], n_masks=4) for i in range(10)])
    order = np.random.default_rng(0).permutation(10)
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)
    for batch_size in (1, 3, 13):  # 3 pairs per forward: fewer than the masks of one image
        shuffled = mim.score_reconstruction(autoencoder, images[order], n_masks=4, batch_size=batch_size)
        np.testing.assert_allclose(shuffled, together[order], rtol=0, atol=1e-6)


def test_few_masks_are_the_first_of_many_so_a_sweep_is_paired(model, images):
    many = mim.draw_masks(64, 16, seed=2)
    assert many.shape == (64, 16) and (many.sum(1) == 12).all() and len(many.unique(dim=0)) > 32
    for m in (1, 2, 16, 32):
        assert torch.equal(mim.draw_masks(m, 16, seed=2), many[:m])
    distances = mim.compute_distances(model, images[:3], n_masks=8, seed=2)
    assert distances.shape == (3, 8) and (distances > 0).all()
    np.testing.assert_allclose(mim.compute_distances(model, images[:3], n_masks=3, seed=2), distances[:, :3], atol=1e-6)
    np.testing.assert_allclose(
        mim.score_reconstruction(model, images[:3], n_masks=8, seed=2), -distances.mean(1), atol=1e-12
    )


def test_the_same_seed_repeats_and_another_differs_without_the_global_seed(model, images):
    torch.manual_seed(1)
    state, first = torch.random.get_rng_state(), mim.score_reconstruction(model, images[:3])
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(first, mim.score_reconstruction(model, images[:3]))
    assert not np.allclose(first, mim.score_reconstruction(model, images[:3], seed=1))


def test_images_come_in_any_order_and_are_resized_like_every_query(model, images):
    whole = mim.score_reconstruction(model, images[:3])
    assert np.array_equal(mim.score_reconstruction(model, torch.from_numpy(images[:3].copy())), whole)
    assert np.array_equal(mim.score_reconstruction(model, images[2::-1]), whole[::-1])
    large = scenes.make_scenes(3, size=48, seed=3, progress=False)["images"]
    seen = views.make_views(torch.from_numpy(large).permute(0, 3, 1, 2), ["", "", ""], size=32, seed=0)
    seen = (255 * seen).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.allclose(mim.score_reconstruction(model, large), mim.score_reconstruction(model, seen), rtol=0, atol=1e-7)
    assert mim.score_reconstruction(model, images[:0]).shape == (0,)


def test_a_reference_is_subtracted_under_the_same_masks(model, images):
    other = pretrain.build("simmim", "vit_nano_patch8_32", seed=1)
    options = dict(image_ids=list("abcd"), seed=4, n_masks=3)
    d, reference = (mim.extract_distances(m, images[:4], **options) for m in (model, other))
    assert d.shape == (4, 1) and np.array_equal(mim.score_distances(d), -d[:, 0])
    np.testing.assert_allclose(mim.extract_distances(model, images[:4], reference=other, **options), d - reference)
    half = mim.extract_distances(model, images[:4], reference=other, alpha=0.5, **options)
    np.testing.assert_allclose(half, d - 0.5 * reference)
    assert np.array_equal(mim.extract_distances(model, images[:4], reference=model, **options), np.zeros((4, 1)))


def test_standardized_patches_come_back_as_pixels(images):
    model = pretrain.build("mae", "vit_nano_patch8_32", norm_pix_loss=True).eval()
    x = torch.from_numpy(images[:4]).permute(0, 3, 1, 2) / 255
    patches = patchify(2 * x - 1, 8)
    standard = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    masks = mim.draw_masks(2, 16)
    perfect, model.predict_from = model.predict_from, lambda tokens, masks: standard.repeat_interleave(2, 0)
    assert torch.allclose(model.reconstruct_from(torch.zeros(4, 17, 64), masks, images=x)[:, 1], x, atol=1e-5)
    model.predict_from = perfect
    # the distance in normalized space is the training loss: squared error of standardized hidden patches
    with torch.inference_mode():
        for column, mask in enumerate(masks):
            error = (model.predict(2 * x - 1, mask.expand(4, -1)) - standard).square().mean(-1)[:, mask].mean(1)
            got = mim.compute_distances(model, images[:4], n_masks=2)[:, column]  # "auto" is normalized for this model
            np.testing.assert_allclose(got, error, rtol=1e-3)  # a flat patch magnifies float32 by its 1 / sd
    assert not np.allclose(got, mim.compute_distances(model, images[:4], n_masks=2, space="pixels")[:, 1])
    options = dict(n_masks=2, distance="ssim")
    ssim = [mim.score_reconstruction(model, images[:4], space=s, **options) for s in ("auto", "pixels")]
    assert np.array_equal(*ssim)


def test_training_on_standardized_patches_lowers_the_loss_and_is_an_option_of_the_row(images, tmp_path):
    settings = dict(arch="vit_nano_patch8_32", epochs=25, norm_pix_loss=True, progress=False)
    run = pretrain.fit("mae", images[:16], **settings)
    assert run.history.loss_members.iloc[-1] < 0.9 * run.history.loss_members.iloc[0]
    again = pretrain.Run.load(run.save(tmp_path), settings=run.settings).decoder
    assert again.norm_pix_loss
    assert np.array_equal(*(mim.score_reconstruction(m, images[:4]) for m in (run.decoder, again)))


@pytest.fixture(scope="module")
def memorized(images):
    """A MAE that has seen sixteen of the images a few hundred times."""
    ids = np.array([f"scene-{i}" for i in range(64)])
    pool = Pool("tiny", images, np.zeros(64, np.int64), ids, None, ("scene",))
    split = splits.draw(pool, n_members=16, n_nonmembers=48, n_shadow_members=0, n_shadow_nonmembers=0, seed=0)
    settings = dict(arch="vit_nano_patch8_32", epochs=300, checkpoints=[], progress=False)
    return pool, split, pretrain.fit("mae", images[split.target_members], **settings)


def test_memorized_images_score_higher_and_an_untrained_model_sees_nothing(memorized):
    pool, split, run = memorized
    is_member = np.isin(np.arange(64), split.target_members)
    for distance, region in (("mse", "masked"), ("l1", "all"), ("ssim", "masked")):
        score = mim.score_reconstruction(run.decoder, pool.images, n_masks=8, distance=distance, region=region)
        assert roc_auc_score(is_member, score) > 0.75
    # before training 16 against 48 scores of the same law: the AUC has standard deviation 0.08
    before = mim.score_reconstruction(run.autoencoder_at(0), pool.images, n_masks=8)
    assert abs(roc_auc_score(is_member, before) - 0.5) < 0.25


def test_the_attack_room_runs_it_with_its_controls(memorized):
    pool, split, run = memorized
    attacks.register(
        "mim-here",
        needs={"reconstruct"},
        queries=lambda params: params["n_masks"],
        extract=mim.extract_distances,
        score=mim.score_distances,
    )
    options = dict(untrained=run.autoencoder_at(0), n_masks=8)
    try:
        result = attacks.evaluate("mim-here", run.decoder, pool, split, **options)
        assert result.auc > 0.75 and result.meta["queries"] == 8
        assert {name: len(control.score) for name, control in result.controls.items()} == dict.fromkeys(
            attacks.CONTROLS, 64
        )
        options = dict(reference=run.autoencoder_at(0), controls=False, n_masks=8)
        calibrated = attacks.evaluate("mim-here", run.decoder, pool, split, **options)
        assert not np.allclose(calibrated.score, result.score)
        with pytest.raises(ValueError, match="needs reconstruct, which the model lacks"):
            attacks.evaluate("mim-here", run.encoder, pool, split)
    finally:
        del attacks.ATTACKS["mim-here"]


# ---------------------------------------------------------------------------------------------------- white box


def test_a_gradient_norm_is_that_of_the_training_loss_by_finite_differences(autoencoder, images):
    model, ids = copy.deepcopy(autoencoder).double(), np.array(["a", "b", "c"])
    got = mim.extract_gradient_norm(model, images[:3], image_ids=ids, seed=5, n_masks=2)
    alone = mim.extract_gradient_norm(model, images[1:2], image_ids=ids[1:2], seed=5, n_masks=2)
    np.testing.assert_allclose(alone, got[1:2], rtol=1e-9)
    batch = torch.from_numpy(images[1:2]).permute(0, 3, 1, 2).expand(2, -1, -1, -1)

    def measure() -> torch.Tensor:
        rng = seeds.rng(5, "mim.masks")
        return model.loss(batch, augmentation="none", size=model.input_size, rng=rng, progress=1.0)

    weights = [w for w in model.parameters() if w.requires_grad]
    gradients = torch.autograd.grad(measure(), weights, materialize_grads=True)
    steps = [g / np.exp(got[1, 0]) for g in gradients]  # a unit step uphill
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, step in zip(weights, steps, strict=True):
                w += sign * 1e-4 * step
            ends.append(float(measure()))
            for w, step in zip(weights, steps, strict=True):
                w -= sign * 1e-4 * step
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(np.exp(got[1, 0]), rel=1e-3)


def test_members_have_the_smaller_gradients_and_an_untrained_model_sees_nothing(memorized):
    pool, split, run = memorized
    result = attacks.evaluate("gradient-norm", run.decoder, pool, split, untrained=run.autoencoder_at(0), n_masks=4)
    assert result.auc > 0.75 and abs(result.controls["untrained"].auc - 0.5) < 0.25
    with pytest.raises(ValueError, match="expected a masked-image model with its training loss"):
        mim.extract_gradient_norm(torch.nn.Identity(), pool.images[:1], image_ids=["a"], seed=0)


# ------------------------------------------------------------------------------------- the attacker's own decoder


@pytest.mark.parametrize("target", ["mae", "dino", "simmim-swin"])
def test_a_decoder_is_trained_while_the_encoder_stays_bit_for_bit(images, target):
    arch = "swin_thin_32" if target == "simmim-swin" else "vit_nano_patch8_32"
    encoder = encoders.make(arch, method=target.split("-")[0], seed=7)
    before = {key: value.clone() for key, value in encoder.module.state_dict().items()}
    n, epochs = (8, 6) if target == "simmim-swin" else (16, 40)
    model = mim.train_decoder(encoder, images[:n], epochs=epochs, progress=False, batch_size=8, lr=5e-3).decoder
    assert type(model).__name__ == ("SimMIM" if target == "simmim-swin" else "MAE") and not model.training
    for key, value in before.items():
        assert torch.equal(value, encoder.module.state_dict()[key]), key
        assert torch.equal(value, model.backbone.state_dict()[key]), key
    fresh = pretrain.build("simmim" if target == "simmim-swin" else "mae", arch)
    fresh.backbone.load_state_dict(encoder.module.state_dict())
    learned, random = (mim.score_reconstruction(m, images[:n], n_masks=4).mean() for m in (model, fresh))
    assert learned > 0.5 * random  # both negative: at most half the distance


def test_the_frozen_encoder_is_in_eval_mode_and_has_no_gradient(images):
    encoder = encoders.make("swin_thin_32", seed=0)  # drops paths in training mode
    model = pretrain.build("simmim", "swin_thin_32")
    model.backbone.requires_grad_(False)
    loop._set_training(model)
    assert model.decoder.training and not any(m.training for m in model.backbone.modules())
    run = pretrain.fit("simmim", images[:4], encoder=encoder, epochs=1, progress=False, heldout=images[4:8])
    assert run.arch == "swin_thin_32" and run.checkpoints == [0, 1]


def test_a_frozen_encoder_keeps_its_own_normalization(images):
    module = encoders.make_backbone("vit_nano_patch8_32", seed=4)
    encoder = encoders.from_module(
        module, arch="vit_nano_patch8_32", method="dino", mean=encoders.IMAGENET_MEAN, std=encoders.IMAGENET_STD
    )
    x = torch.from_numpy(images[:3]).permute(0, 3, 1, 2) / 255
    run = pretrain.fit("mae", images[:8], encoder=encoder, epochs=2, progress=False)
    with torch.inference_mode():
        assert torch.equal(run.encoder.tokens(x), encoder.tokens(x))
        visible = run.decoder.backbone.forward_features((x - run.decoder.mean) / run.decoder.std)[:, 1:]
        assert torch.equal(visible, encoder.tokens(x))
        tokens = run.decoder.embed_patches(x)
        assert torch.allclose(tokens, run.decoder.encoder.preprocess(encoder._prepare(x)), atol=1e-6)


def test_a_killed_decoder_training_resumes_and_another_encoder_starts_anew(images, tmp_path):
    one, two = (encoders.make("vit_nano_patch8_32", seed=seed) for seed in (1, 2))

    def fit(encoder, **extra):
        return pretrain.fit("mae", images[:16], encoder=encoder, epochs=4, batch_size=8, progress=False, **extra)

    whole, path = fit(one), tmp_path / "resume.pt"
    fit(one, resume_path=path, stop_after=4)
    for encoder, expected in ((one, whole), (two, fit(two))):
        resumed = fit(encoder, resume_path=path)
        assert all(torch.equal(value, resumed.states[4][key]) for key, value in expected.states[4].items())


def test_settings_of_other_trainings_are_as_they_were(images):
    run = pretrain.fit("mae", images[:4], arch="vit_nano_patch8_32", epochs=1, progress=False)
    assert list(run.settings) == (
        "method arch epochs seed augmentation lr weight_decay batch_size warmup n_train options".split()
    )
    assert run.settings["options"] == {}
    assert {key.split(".")[0] for key in run.states[1]} == {"backbone", "decoder"}


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n_masks=0), "n_masks of at least 1, got 0"),
        (dict(mask_ratio=0.0), "hides 0 of 16 patches: expected some, but not all"),
        (dict(mask_ratio=1.0), "hides 16 of 16 patches: expected some, but not all"),
        (dict(mask_ratio=0.02), "hides 0 of 16"),
        (dict(mask_ratio=0.98), "hides 16 of 16"),
        (dict(distance="psnr"), "expected distance mse, l1, ssim, got 'psnr'"),
        (dict(region="visible"), "expected region masked, all, got 'visible'"),
        (dict(space="log"), "expected space auto, pixels, normalized, got 'log'"),
        (dict(distance="ssim", space="normalized"), "defined on pixels"),
    ],
)
def test_bad_parameters_are_one_line(model, images, options, message):
    with pytest.raises(ValueError, match=message) as error:
        mim.score_reconstruction(model, images[:2], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.zeros((2, 3, 32, 32), np.uint8), r"expected \(N, H, W, 3\) uint8, got \(2, 3, 32, 32\)"),
        (np.zeros((32, 32, 3), np.uint8), r"got \(32, 32, 3\)"),
        (np.zeros((2, 32, 32, 3), np.float32), "got .* float32"),
    ],
)
def test_bad_images_are_one_line(model, wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        mim.score_reconstruction(model, wrong)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_reconstruct_is_told_the_way_out(images):
    class Uneven:
        n_tokens = 15

        def reconstruct(self, x, masks):
            return x[:, :, ::2]

    vit, resnet = encoders.make("vit_nano_patch8_32"), encoders.make("resnet_thin_32")
    wrapped = encoders.wrap(lambda x: x.flatten(1), size=32, name="mine")
    cases = [
        (vit, "the encoder 'untrained-vit_nano_patch8_32' alone: train a decoder .* attacks.mim.train_decoder"),
        (resnet, "it has no patches to mask"),
        (wrapped, "'mine' alone: it has no patches to mask"),
        (None, r"got None \(this method has no decoder\)"),
        (torch.nn.Linear(2, 2), "expected an autoencoder with reconstruct.* got Linear"),
        (Uneven(), "square grid of patches, got n_tokens=15"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            mim.score_reconstruction(wrong, images[:2])
        assert "\n" not in str(error.value)
    Uneven.n_tokens = 16
    with pytest.raises(ValueError, match="expected reconstructions .2, 3, 32, 32. per mask, got"):
        mim.score_reconstruction(Uneven(), images[:2])
    Uneven.n_tokens = 25
    with pytest.raises(ValueError, match="32 x 32 pixels can't be cut into 5 x 5 patches"):
        mim.score_reconstruction(Uneven(), images[:2])


def test_broken_weights_are_told(images):
    model = pretrain.build("mae", "vit_nano_patch8_32")
    torch.nn.init.constant_(model.decoder["predict"].bias, float("nan"))
    with pytest.raises(ValueError, match="2 of 2 images are not finite"):
        mim.score_reconstruction(model, images[:2])
    with pytest.raises(ValueError, match="got 1 ids for 2 images"):
        mim.extract_distances(model, images[:2], image_ids=["a"], seed=0)


def test_encoders_that_take_no_decoder_are_one_line(images):
    vit = encoders.make("vit_nano_patch8_32")
    wrapped = encoders.wrap(lambda x: x.flatten(1), size=32, name="mine")
    cases = [
        (lambda: mim.train_decoder(encoders.make("resnet_thin_32"), images, epochs=1), "mae needs a plain ViT"),
        (lambda: mim.train_decoder(encoders.make("swin_thin_32"), images, epochs=1, method="mae"), "needs a plain ViT"),
        (lambda: mim.train_decoder(wrapped, images, epochs=1), "'mine': a wrapped callable"),
        (lambda: mim.train_decoder(vit.module, images, epochs=1), "expected an Encoder .* got VisionTransformer"),
        (lambda: mim.train_decoder(vit, images, epochs=1, mask_ratio=1.0, progress=False), "expected some, but not all"),
        (lambda: pretrain.fit("simclr", images, encoder=vit, epochs=1), "simclr trains the encoder itself"),
        (lambda: pretrain.fit("mae", images, encoder=vit, arch="vit_micro_patch8_32", epochs=1), "leave arch out"),
        (lambda: pretrain.fit("mae", images, epochs=1), "expected arch= .* or encoder="),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_defaults_are_those_of_the_public_interface():
    parameters = inspect.signature(mim.compute_distances).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    assert defaults["n_masks"] == 16 and defaults["mask_ratio"] == 0.75 and defaults["seed"] == 0
    assert defaults["distance"] == "mse" and defaults["region"] == "masked"
    assert {key: p.default for key, p in inspect.signature(mim.extract_distances).parameters.items()}["alpha"] == 1.0
