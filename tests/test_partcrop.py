"""PartCrop: energies against a slow obvious version and the released numbers, features against their batch mates."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mia_utils import attacks
from mia_utils.attacks import partcrop
from mia_utils.models import encoders, views

GOLDEN = Path(__file__).parent / "golden" / "partcrop_energies.npz"
# float32 matrix products sum in another order for another batch shape; energies are of the order of 1 to 10
BATCH = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def encoder():
    return encoders.make("vit_nano_patch8_32", seed=0)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)


IDS = [f"image-{i}" for i in range(100)]


def compute_energies_slowly(parts: np.ndarray, tokens: np.ndarray, reference: np.ndarray) -> tuple[list, list]:
    """The formulas of the paper, one number at a time, in float64."""
    uniform, gaussian = [], []
    for part, token in zip(parts.astype(float), tokens.astype(float), strict=True):
        u_of_image, g_of_image = [], []
        for i in range(len(part)):
            s = [float(part[i] @ token[j]) for j in range(len(token))]
            total = sum(math.exp(x - max(s)) for x in s)
            log_v = [x - max(s) - math.log(total) for x in s]
            n = len(token)
            u_of_image.append(sum((math.log(1 / n + 1e-6) - x) / n for x in log_v))
            z = sorted(float(x) for x in reference[i])
            mean = sum(z) / n
            sd = math.sqrt(sum((x - mean) ** 2 for x in z) / (n - 1))
            q = [math.exp(-((x - mean) ** 2) / (2 * sd**2)) / (math.sqrt(2 * math.pi) * sd) for x in z]
            q = [x / sum(q) for x in q]
            g_of_image.append(sum(q[j] * (math.log(q[j] + 1e-6) - log_v[j]) for j in range(n)))
        uniform.append(sorted(u_of_image, reverse=True))
        gaussian.append(sorted(g_of_image, reverse=True))
    return uniform, gaussian


def test_energies_equal_the_double_loop():
    rng = np.random.default_rng(1)
    parts, tokens, reference = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 6, 4)), rng.normal(size=(5, 6))
    uniform, gaussian = compute_energies_slowly(parts, tokens, reference)
    got = partcrop.part_energies(*(torch.tensor(x) for x in (parts, tokens)), reference=torch.tensor(reference))
    np.testing.assert_allclose(got, np.concatenate([uniform, gaussian], axis=1), atol=1e-12)  # float64 on both sides


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "both"])
def test_energies_equal_the_released_numbers(kind):
    golden = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN).items()}
    got = partcrop.part_energies(golden["parts"], golden["tokens"], kind=kind, reference=golden["noise"])
    assert (got - golden[kind]).abs().max() < 1e-5


def test_energies_are_sorted_and_sharp_responses_have_large_ones():
    torch.manual_seed(0)
    parts, tokens = torch.randn(2, 8, 16), torch.randn(2, 9, 16)
    u, g = partcrop.part_energies(parts, tokens).split(8, dim=1)
    assert (u.diff(dim=1) <= 0).all() and (g.diff(dim=1) <= 0).all()
    assert (partcrop.part_energies(3 * parts, tokens, kind="uniform") > u).all()


def test_an_image_keeps_its_energies_among_other_images_and_a_seed_keeps_its_reference():
    parts, tokens = torch.randn(4, 8, 16), torch.randn(4, 9, 16)
    together = partcrop.part_energies(parts, tokens, seed=3)
    torch.testing.assert_close(together[2:3], partcrop.part_energies(parts[2:3], tokens[2:3], seed=3), **BATCH)
    assert torch.equal(together, partcrop.part_energies(parts, tokens, seed=3))
    other = partcrop.part_energies(parts, tokens, seed=4)
    assert torch.equal(other[:, :8], together[:, :8]) and not torch.allclose(other[:, 8:], together[:, 8:])


@pytest.mark.parametrize(
    ("parts", "tokens", "options", "message"),
    [
        ((3, 4), (3, 5, 4), {}, "parts .N, K, D. and tokens .N, L, D. .* got .3, 4. and .3, 5, 4."),
        ((3, 2, 4), (5, 4), {}, "got .3, 2, 4. and .5, 4."),
        ((3, 2, 4), (2, 5, 4), {}, "same N and D"),
        ((3, 2, 4), (3, 5, 6), {}, "same N and D"),
        ((3, 2, 4), (3, 1, 4), {}, "at least 2 tokens"),
        ((3, 2, 4), (3, 5, 4), {"reference": torch.zeros(5, 2)}, "reference: expected .K, L. = .2, 5."),
        ((3, 2, 4), (3, 5, 4), {"kind": "laplace"}, "got 'laplace'"),
    ],
)
def test_wrong_shapes_and_kinds_raise_one_line(parts, tokens, options, message):
    with pytest.raises(ValueError, match=message) as error:
        partcrop.part_energies(torch.zeros(parts), torch.zeros(tokens), **options)
    assert "\n" not in str(error.value)


def test_a_batch_of_one_equals_a_batch_of_a_hundred_in_any_order(encoder, images):
    together = partcrop.extract_features(encoder, images, image_ids=IDS, n_crops=16, batch_size=100)
    assert together.shape == (100, 32) and together.dtype == torch.float32
    alone = torch.cat(
        [partcrop.extract_features(encoder, images[i : i + 1], image_ids=[IDS[i]], n_crops=16) for i in range(100)]
    )
    torch.testing.assert_close(alone, together, **BATCH)
    order = np.random.default_rng(0).permutation(100)
    shuffled = partcrop.extract_features(
        encoder, images[order], image_ids=np.array(IDS)[order], n_crops=16, batch_size=7
    )
    torch.testing.assert_close(shuffled, together[order], **BATCH)


def test_the_same_seed_repeats_and_another_differs_without_the_global_seed(encoder, images):
    options = {"image_ids": IDS[:4], "n_crops": 8}
    torch.manual_seed(1)
    first = partcrop.extract_features(encoder, images[:4], **options)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, partcrop.extract_features(encoder, images[:4], **options))
    assert not torch.equal(first, partcrop.extract_features(encoder, images[:4], **options, seed=1))
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_features_equal_a_loop_over_crops(encoder, images):
    got = partcrop.extract_features(encoder, images[:2], image_ids=IDS[:2], n_crops=6, seed=5, pooling="mean")
    boxes, flips = views.draw_boxes(IDS[:2], 6, height=32, width=32, seed=5, stream="partcrop")
    for i in range(2):
        whole = torch.from_numpy(images[i]).permute(2, 0, 1)[None] / 255
        vectors = []
        for k in range(6):
            crop = views.resized_crop(whole, boxes[i, k][None, None], 16)[0]
            vectors.append(encoder.embed(crop.flip(3) if flips[i, k] else crop, pooling="mean"))
        with torch.inference_mode():
            slow = partcrop.part_energies(torch.cat(vectors)[None], encoder.tokens(whole), seed=5)
        torch.testing.assert_close(got[i : i + 1], slow, rtol=1e-4, atol=1e-4)  # two roundings of 1/255 in float32


def test_a_view_per_image_equals_each_view_alone(encoder, images):
    options = {"image_ids": IDS[:6], "n_crops": 4}
    view = np.array(["resize", "random_resized_crop"] * 3)
    mixed = partcrop.extract_features(encoder, images[:6], view=view, **options)
    for name in np.unique(view):
        alone = partcrop.extract_features(encoder, images[:6], view=str(name), **options)
        torch.testing.assert_close(mixed[view == name], alone[view == name], **BATCH)
    assert not torch.allclose(mixed[1::2], partcrop.extract_features(encoder, images[:6], **options)[1::2])


def test_crop_sizes_are_the_papers_and_small_crops_reach_large_encoders(images):
    assert [partcrop.get_crop_size(s) for s in (32, 64, 224)] == [16, 16, 112]
    swin = encoders.make("swin_thin_32", seed=0)
    features = partcrop.extract_features(swin, images[:2], image_ids=IDS[:2], n_crops=3, crop_size=8)
    assert features.shape == (2, 6) and torch.isfinite(features).all()


def test_no_images_and_wrong_images_are_told_apart(encoder, images):
    assert partcrop.extract_features(encoder, images[:0], image_ids=[], n_crops=4).shape == (0, 8)
    with pytest.raises(ValueError, match="expected .N, H, W, 3. uint8"):
        partcrop.extract_features(encoder, images[:2].astype(np.float32), image_ids=IDS[:2])
    with pytest.raises(ValueError, match="one image id per image, got 3 ids for 2"):
        partcrop.extract_features(encoder, images[:2], image_ids=IDS[:3])


def test_response_maps_sum_to_one_and_absent_parts_are_nan(encoder, images):
    boxes = np.array([[2.0, 3.0, 20.0, 18.0], [np.nan] * 4, [31.6, 31.6, 32.0, 32.0]])
    maps = partcrop.responses(encoder, images[0], boxes)
    assert maps.shape == (3, 16)
    np.testing.assert_allclose(maps[[0, 2]].sum(1), 1, atol=1e-5)  # float32 softmax
    assert np.isnan(maps[1]).all()
    whole = torch.from_numpy(images[0]).permute(2, 0, 1)[None] / 255
    crop = views.resized_crop(whole, torch.tensor([[[2, 3, 18, 15]]]), 16)[0]  # top, left, height, width
    with torch.inference_mode():
        slow = (encoder.tokens(whole)[0] @ encoder.embed(crop)[0]).softmax(0)
    np.testing.assert_allclose(maps[0], slow, atol=1e-4)  # float32, another order of summation


def test_part_boxes_are_pixels_of_the_image_given_not_of_the_view(encoder):
    side = np.linspace(0, 255, 64)
    image = np.stack([*np.meshgrid(side, side), np.full((64, 64), 90.0)], axis=-1).astype(np.uint8)
    box = np.array([[8.0, 16.0, 40.0, 56.0]])
    large, small = partcrop.responses(encoder, image, box), partcrop.responses(encoder, image[::2, ::2], box / 2)
    # the same image at two sizes: a smooth one, so resampling moves a response by little
    np.testing.assert_allclose(large, small, atol=0.1)
    assert np.abs(large - partcrop.responses(encoder, image, box / 2)).max() > 0.1


def test_response_curves_fall_and_sum_to_one(encoder, images):
    curves = partcrop.response_curves(encoder, images[:5], image_ids=IDS[:5], n_crops=8)
    assert curves.shape == (5, 16) and (np.diff(curves, axis=1) <= 0).all()
    np.testing.assert_allclose(curves.sum(1), 1, atol=1e-5)  # float32 softmax


def test_defaults_are_the_papers():
    parameters = inspect.signature(partcrop.extract_features).parameters
    assert parameters["n_crops"].default == 128 and parameters["crop_scale"].default == (0.08, 0.2)
    assert parameters["kind"].default == "both" and parameters["view"].default == "resize"


# ------------------------------------------------------------------------------- without parts, and with one query


def test_random_probes_are_as_large_as_the_parts_and_keyed_by_the_image(encoder, images):
    call = {"image_ids": IDS[:6], "n_crops": 8}
    own, random = (next(partcrop.iterate_parts(encoder, images[:6], probes=p, **call)) for p in ("parts", "random"))
    assert torch.equal(own[1], random[1]) and own[0].shape == random[0].shape  # the same tokens, other probes
    noise = random[0] / own[0].square().mean((1, 2), keepdim=True).sqrt()
    assert noise.std().item() == pytest.approx(1, rel=0.05) and abs(noise.mean().item()) < 0.05  # 6 x 8 x D numbers
    assert not torch.allclose(noise[0], noise[1])


def test_probes_of_another_image_use_its_tokens(encoder, images):
    parts, tokens = next(partcrop.iterate_parts(encoder, images[:6], image_ids=IDS[:6], n_crops=4))
    same, others = next(partcrop.iterate_parts(encoder, images[:6], image_ids=IDS[:6], n_crops=4, probes="other-image"))
    torch.testing.assert_close(same, parts, **BATCH)
    match = (others[:, None] - tokens[None]).abs().amax((2, 3)) < 1e-4  # (6, 6): whose tokens each image got
    assert match.sum(1).tolist() == [1] * 6 and match.sum(0).tolist() == [1] * 6 and not match.diag().any()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        partcrop.extract_features(encoder, images[:1], image_ids=IDS[:1], probes="other-image")
    with pytest.raises(ValueError, match="expected probes parts, random, other-image, got 'none'"):
        partcrop.extract_features(encoder, images[:2], image_ids=IDS[:2], probes="none")


@pytest.mark.parametrize("probes", ["random", "other-image"])
def test_other_probes_do_not_depend_on_batch_or_order_and_follow_the_seed(encoder, images, probes):
    call = {"n_crops": 4, "probes": probes}
    together = partcrop.extract_features(encoder, images[:9], image_ids=IDS[:9], **call)
    order = np.random.default_rng(0).permutation(9)
    again = partcrop.extract_features(encoder, images[order], image_ids=np.array(IDS)[order], batch_size=2, **call)
    torch.testing.assert_close(again, together[order], **BATCH)
    other = partcrop.extract_features(encoder, images[:9], image_ids=IDS[:9], seed=1, **call)
    assert not torch.allclose(together, other)


def test_token_sizes_equal_a_loop_and_need_one_query(encoder, images):
    got = partcrop.extract_spread(encoder, images[:5], image_ids=IDS[:5], batch_size=2)
    assert got.shape == (5, 5) and partcrop.extract_spread(encoder, images[:0], image_ids=[]).shape == (0, 5)
    for i in range(5):
        with torch.inference_mode():
            x = encoder.tokens(torch.from_numpy(images[i]).permute(2, 0, 1)[None] / 255)[0].double().numpy()
        away, long = np.linalg.norm(x - x.mean(0), axis=1), np.linalg.norm(x, axis=1)
        slow = [math.sqrt((away**2).mean()), np.linalg.norm(x.mean(0)), long.mean(), long.max(), away.max()]
        np.testing.assert_allclose(got[i].exp(), slow, rtol=1e-4)  # float32
    np.testing.assert_allclose(partcrop.score_spread(got), -got[:, 0].double(), rtol=1e-7)
    assert {attacks.ATTACKS[name].count_queries() for name in ("token-spread", "token-spread-lr")} == {1}


def test_five_sizes_find_what_one_does_not():
    rng, is_member = np.random.default_rng(0), np.arange(400) < 150
    sizes = rng.normal(size=(400, 5)) + is_member[:, None] * [0, 0, 1, 0, -1]
    score = partcrop.fit_spread(sizes[::2], is_member[::2], validation=(None, None)).score(sizes[1::2])
    assert score.dtype == np.float64 and roc_auc_score(is_member[1::2], score) > 0.75
