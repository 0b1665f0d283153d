"""Defenses do what they say: outputs exactly and repeatably, trainings with gradients that are really per image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mia_utils import datasets, pretrain, seeds
from mia_utils.datasets import scenes
from mia_utils.models import encoders, outputs, segmenters
from mia_utils.pretrain import accounting, mae, privacy
from mia_utils.protocol import metrics
from mia_utils.runner import choices, estimates, profiles

TINY = dict(arch="vit_nano_patch8_32", progress=False, device="cpu")
SMALL = dict(encoder_depth=3, decoder_channels=(16, 8, 8))
NET = dict(arch="mobilenet_v2", n_classes=11, progress=False, device="cpu")
STEP = dict(augmentation="none", size=32, progress=0.0)
MAPS = STEP | {"size": None}  # of segmenters: the pictures' own


@pytest.fixture(scope="module")
def pictures():
    return scenes.make_scenes(24, size=32, seed=1, progress=False)


@pytest.fixture(scope="module")
def tensors(pictures):
    images = torch.from_numpy(pictures["images"]).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(pictures["masks"]).long()


def make_encoder():
    """Rows of pixels as tokens (N, 8, 24): what it answers about an image can't depend on the batch."""
    return encoders.wrap(tokens=lambda x: x.transpose(1, 2).flatten(2), size=8)


def make_segmenter():
    return segmenters.wrap(lambda x: 4 * x, n_classes=3, outputs="logits")


def make_autoencoder():
    return pretrain.build("mae", "vit_nano_patch8_32").eval()


def ask(model, x):
    """All answers of a model to images (N, 3, H, W)."""
    if isinstance(model, segmenters.Segmenter):
        return [model.posteriors(x)]
    if isinstance(model, encoders.Encoder):
        return [model.tokens(x), model.embed(x)]
    masks = mae.draw_masks(2, 16, 0.75, np.random.default_rng(0))
    return [model.reconstruct(x, masks[0])]


CASES = [("encoder", make_encoder, 8), ("segmenter", make_segmenter, 8), ("autoencoder", make_autoencoder, 32)]
STRENGTH = {"noise": 0.5, "rounding": 0.1, "top-k": 2, "temperature": 3.0, "argmax": None, "gauss": 0.1}


# ------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize(("kind", "make", "size"), CASES)
def test_the_neutral_strength_of_every_output_defense_changes_no_bit(kind, make, size):
    model, x = make(), torch.rand(4, 3, size, size)
    for defense, strength in (("noise", 0), ("rounding", 0.0), ("gauss", 0), ("temperature", 1)):
        if kind in outputs.OUTPUTS[defense]:
            for plain, same in zip(ask(model, x), ask(outputs.perturb(model, defense, strength), x), strict=True):
                assert torch.equal(plain, same), defense


@pytest.mark.parametrize(("kind", "make", "size"), CASES)
@pytest.mark.parametrize("defense", outputs.OUTPUTS)
def test_an_image_gets_one_answer_alone_in_a_batch_and_twice(kind, make, size, defense):
    if kind not in outputs.OUTPUTS[defense]:
        with pytest.raises(ValueError, match=f"defense '{defense}' does not fit an? {kind}: expected one of noise"):
            outputs.perturb(make(), defense, 1.0)
        return
    model, x = make(), torch.rand(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    defended = outputs.perturb(model, defense, STRENGTH[defense], seed=3)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole, again, turned = ask(defended, x), ask(defended, x), ask(defended, x.flip(0))
    alone = [torch.cat(parts) for parts in zip(*(ask(defended, x[i : i + 1]) for i in range(5)), strict=True)]
    exact = dict(rtol=0, atol=1e-5 if kind == "autoencoder" else 0)  # a ViT's sums depend on the batch in the last bits
    for a, b, c, d, plain in zip(whole, again, turned, alone, ask(model, x), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, plain)
        if defense != "rounding" or kind != "autoencoder":  # a last bit may tip a value over to the next multiple
            torch.testing.assert_close(a, c.flip(0), **exact)
            torch.testing.assert_close(a, d, **exact)
    assert torch.equal(state[0], torch.get_rng_state()) and (state[1] == np.random.get_state()[1]).all()
    other = ask(outputs.perturb(model, defense, STRENGTH[defense], seed=4), x)
    assert torch.equal(other[0], whole[0]) == (defense not in ("noise", "gauss"))
    assert defended.defense == (defense, STRENGTH[defense], 3)


def test_vectors_are_rounded_cut_and_noised_as_told():
    model, x = make_encoder(), torch.rand(64, 3, 8, 8)
    tokens, vector = model.tokens(x), model.embed(x)
    rounded = outputs.perturb(model, "rounding", 0.25).tokens(x)
    assert torch.equal(rounded * 4, (rounded * 4).round()) and float((rounded - tokens).abs().max()) <= 0.125 + 1e-6
    kept = outputs.perturb(model, "top-k", 5).tokens(x)
    for row, full in zip(kept[0], tokens[0], strict=True):
        largest = sorted(full.abs().tolist())[-5:]
        assert sorted(row[row != 0].abs().tolist()) == largest
    noise = outputs.perturb(model, "noise", 0.5).embed(x) - vector
    assert float(noise.std()) == pytest.approx(0.5, rel=0.1)  # 1,536 draws: sd of the estimate is 2 %
    assert abs(float(torch.corrcoef(noise[:2])[0, 1])) < 0.7  # two images, two draws
    assert torch.equal(outputs.perturb(model, "noise", 0.5).embed(x, "mean") - vector, noise)


def test_posteriors_stay_posteriors_and_follow_their_formulas():
    model, x = make_segmenter(), torch.rand(3, 3, 8, 8)
    p = model.posteriors(x)
    for defense, strength in STRENGTH.items():
        q = outputs.perturb(model, defense, strength).posteriors(x)
        assert q.shape == p.shape and float(q.min()) >= 0
        torch.testing.assert_close(q.sum(1), torch.ones(3, 8, 8))
    soft = outputs.perturb(model, "temperature", 2.0).posteriors(x)
    torch.testing.assert_close(soft, p.sqrt() / p.sqrt().sum(1, keepdim=True))
    hard = outputs.perturb(model, "argmax").posteriors(x)
    assert set(hard.unique().tolist()) == {0.0, 1.0} and torch.equal(hard.argmax(1), p.argmax(1))
    two = outputs.perturb(model, "top-k", 2).posteriors(x)
    assert torch.equal((two == 0).sum(1), torch.ones(3, 8, 8).long()) and torch.equal(two.argmin(1), p.argmin(1))
    assert torch.equal(outputs.perturb(model, "rounding", 10.0).posteriors(x), torch.full_like(p, 1 / 3))
    wild = outputs.perturb(model, "gauss", 5.0).posteriors(x)
    assert float(wild.min()) > 0  # clipped at 1e-6 before it was normalized


def test_the_two_ways_to_reconstruct_are_defended_alike():
    x, masks = torch.rand(2, 3, 32, 32), mae.draw_masks(3, 16, 0.75, np.random.default_rng(0))
    model = outputs.perturb(make_autoencoder(), "noise", 0.3, seed=1)
    folded = model.reconstruct_from(model.embed_patches(x), masks, images=x)
    for j in range(3):  # the sums of a ViT depend on the batch in the last bits
        torch.testing.assert_close(folded[:, j], model.reconstruct(x, masks[j]), rtol=0, atol=1e-5)
    noise = folded - make_autoencoder().reconstruct_from(model.embed_patches(x), masks, images=x)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05)
    assert abs(float(torch.corrcoef(noise.flatten(2)[0])[0, 1])) < 0.1  # one image, two masks: two draws


def test_a_defended_model_keeps_its_face():
    encoder = encoders.make("vit_nano_patch8_32", method="mae")
    defended = outputs.perturb(encoder, "noise", 0.1)
    keys = ("name", "arch", "method", "pooling", "input_size", "min_size", "n_tokens", "dim", "module", "offers")
    assert isinstance(defended, encoders.Encoder)
    assert all(getattr(defended, key) is getattr(encoder, key) for key in keys)
    segmenter = make_segmenter()
    assert outputs.perturb(segmenter, "argmax").n_classes == 3 and not hasattr(segmenter, "defense")
    model = make_autoencoder()
    defended = outputs.perturb(model, "rounding", 0.1)
    assert (defended.n_tokens, defended.input_size, defended.module) == (16, 32, model)
    assert next(defended.parameters()) is next(model.parameters())
    assert defended.to("cpu") is defended and outputs.perturb(encoder, "noise", 1).to("cpu").device.type == "cpu"


def test_the_argmax_of_a_segmenter_does_its_job_as_well_as_before(pictures):
    model = segmenters.wrap(lambda x: x, n_classes=3, outputs="logits")
    labels = pictures["masks"] % 3
    plain, hard = (segmenters.measure_iou(m, pictures["images"], labels) for m in (model, _harden(model)))
    assert plain["miou"] == hard["miou"]


def _harden(model):
    return outputs.perturb(model, "argmax")


def test_the_scale_of_an_encoder_is_its_standard_deviation(pictures):
    images = pictures["images"][:, :8, :8]
    expected = make_encoder().embed(datasets.to_float(images)).std(0).square().mean().sqrt()
    assert outputs.measure_scale(make_encoder(), images, batch_size=7) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="expected at least 2 images, got 1"):
        outputs.measure_scale(make_encoder(), images[:1])


def test_behind_enough_noise_a_threshold_knows_nothing():
    """Members are answered with smaller values, which undefended tells all; the intervals then hold 0.5."""
    n = 150
    is_member = np.arange(2 * n) < n
    x = torch.rand(2 * n, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.4
    x[n:] += 0.5

    def read(model):
        return -model.embed(x).norm(dim=1), -model.tokens(x).norm(dim=(1, 2))

    for plain, noised in zip(read(make_encoder()), read(outputs.perturb(make_encoder(), "noise", 1e4)), strict=True):
        assert metrics.evaluate(plain.numpy(), is_member).auc == 1.0
        blind = metrics.evaluate(noised.numpy(), is_member)
        assert blind.auc_low < 0.5 < blind.auc_high
    segmenter = segmenters.wrap(lambda x: torch.cat([-9 * x[:, :1], 9 * x[:, :2]], 1), n_classes=3, outputs="logits")
    for defense in ("noise", "gauss"):
        score = [m.posteriors(x)[:, 0].mean((1, 2)) for m in (segmenter, outputs.perturb(segmenter, defense, 1e4))]
        assert metrics.evaluate(score[0].numpy(), is_member).auc == 1.0
        blind = metrics.evaluate(score[1].numpy(), is_member)
        assert blind.auc_low < 0.5 < blind.auc_high


@pytest.mark.parametrize(
    ("make", "defense", "strength", "message"),
    [
        (make_encoder, "blur", 1.0, "unknown output defense 'blur': expected one of noise"),
        (make_encoder, "noise", -0.1, "noise: expected sigma >= 0, got -0.1"),
        (make_segmenter, "gauss", -1, "gauss: expected sigma >= 0, got -1"),
        (make_encoder, "noise", None, r"noise needs a number as strength \(sigma\), got None"),
        (make_encoder, "noise", math.nan, "got nan"),
        (make_encoder, "noise", True, "got True"),
        (make_encoder, "rounding", "fine", "rounding needs a number"),
        (make_encoder, "top-k", 0, "top-k: expected a whole k from 1 to 24, got 0"),
        (make_encoder, "top-k", 25, "from 1 to 24, got 25"),
        (make_segmenter, "top-k", 4, "from 1 to 3, got 4"),
        (make_segmenter, "top-k", 1.5, "a whole k"),
        (make_segmenter, "temperature", 0, "expected temperature > 0, got 0"),
        (make_segmenter, "argmax", 1.0, "argmax has no strength"),
        (make_encoder, "argmax", None, "'argmax' does not fit an encoder"),
        (make_autoencoder, "top-k", 3, "'top-k' does not fit an autoencoder"),
        (lambda: "model.pt", "noise", 1.0, "expected an Encoder, a Segmenter or an autoencoder .* got str"),
        (lambda: outputs.perturb(make_encoder(), "noise", 1), "noise", 1.0, "one behind 'noise'"),
    ],
)
def test_a_wrong_output_defense_is_one_line(make, defense, strength, message):
    with pytest.raises(ValueError, match=message) as error:
        outputs.perturb(make(), defense, strength)
    assert "\n" not in str(error.value)


def test_the_public_names_are_those_of_the_rooms():
    from mia_utils import defenses

    assert defenses.perturb is outputs.perturb and defenses.measure_scale is outputs.measure_scale
    assert defenses.plan_privacy is accounting.plan_privacy and defenses.measure_epsilon is accounting.measure_epsilon
    assert choices.PRIVATE_METHODS == accounting.METHODS


# ------------------------------------------------------------------------------------------- accounting


def test_the_epsilon_agrees_with_opacus_counting_step_by_step():
    from opacus.accountants import RDPAccountant

    for target in (0.8, 8.0):
        plan = accounting.plan_privacy(n_images=256, batch_size=32, steps=400, epsilon=target, delta=1e-4)
        accountant = RDPAccountant()
        for _ in range(400):
            accountant.step(noise_multiplier=plan["noise_multiplier"], sample_rate=1 / 8)
        assert plan["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-4), rel=1e-9)
        assert 0.98 * target < plan["epsilon"] <= target
        text = accounting.describe_privacy(plan)
        assert f"epsilon {plan['epsilon']:.4g} at delta 0.0001" in text and "rate 0.125, 400 steps" in text
    known = accounting.measure_epsilon(noise_multiplier=1.0, sample_rate=0.25, steps=10000, delta=1e-5)
    assert known == pytest.approx(551, abs=1)
    assert accounting.measure_epsilon(noise_multiplier=0, sample_rate=0.5, steps=1, delta=1e-5) == math.inf


# ------------------------------------------------------------------------------------------- per-example gradients


def build(method, **options):
    network = pretrain.build(method, "mobilenet_v2" if method in segmenters.ARCHS else TINY["arch"], **options)
    privacy.freeze_tokens(network)
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return network.train()


@pytest.mark.parametrize(
    ("method", "options"),
    [("mae", {}), ("mae", {"norm_pix_loss": True, "dropout": 0.2, "drop_path": 0.3}), ("simmim", {})]
    + [("unet", {"n_classes": 11, "norm": "group"})],
)
def test_per_example_gradients_are_those_of_micro_batches_of_one(tensors, method, options):
    images, labels = tensors
    network = build(method, **options)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert privacy.require_private(network, images[:2], labels[:2] if method == "unet" else None) == []
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in network.parameters())
    assert not any("activations" in vars(module) for module in network.modules())


def test_wrong_per_example_gradients_are_refused_without_an_error_of_opacus(tensors):
    images, _ = tensors
    network = build("mae")
    network.decoder["blocks"].mask_token.requires_grad_(True)
    with pytest.raises(
        ValueError, match="can't be private.* per-example gradients .*mask_token|no per-example"
    ) as error:
        privacy.require_private(network, images[:2])
    assert "\n" not in str(error.value)


def test_per_example_gradients_of_convolutions_are_exact_in_any_memory_order():
    for groups, settings in ((1, {}), (4, dict(stride=2, padding=1)), (8, dict(padding=2, dilation=2, bias=False))):
        torch.manual_seed(0)
        layer, x = nn.Conv2d(8, 16, 3, groups=groups, **settings), torch.rand(3, 8, 9, 7)
        x = x.to(memory_format=torch.channels_last)
        out = layer(x)
        weight = torch.rand_like(out)
        made = privacy.compute_conv_gradients(layer, [x], weight.to(memory_format=torch.channels_last))
        for i in range(3):
            alone = torch.autograd.grad((layer(x[i : i + 1]) * weight[i]).sum(), list(layer.parameters()))
            for p, expected in zip(layer.parameters(), alone, strict=True):
                torch.testing.assert_close(made[p][i], expected, rtol=1e-4, atol=1e-4)


def test_group_norm_takes_the_place_of_batch_norm_and_leaves_all_else():
    plain, ours = (segmenters.make_network("unet", 5, norm=norm, **SMALL) for norm in ("batch", "group"))
    norms = {name: m for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)}
    groups = {name: m.num_groups for name, m in ours.named_modules() if isinstance(m, nn.GroupNorm)}
    assert groups == {name: math.gcd(32, m.num_features) for name, m in norms.items()} and len(groups) > 20
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in ours.state_dict().items())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    with pytest.raises(ValueError, match="expected norm 'batch' or 'group', got 'layer'"):
        segmenters.make_network("unet", 5, norm="layer")
    with pytest.raises(ValueError, match="norm 'group' does not fit this encoder"):
        segmenters.make_network("unet", 5, encoder="mobilenetv3_small_050", norm="group", **SMALL)


# ------------------------------------------------------------------------------------------- DP-SGD


def make_steps(network, images, labels=None, *, batch_size=8, noise=0.0, clip=1e9, lr=0.1):
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr)
    plan = accounting.plan_privacy(
        n_images=len(images), batch_size=batch_size, steps=10, noise_multiplier=noise, max_grad_norm=clip
    )
    return privacy.PrivateSteps(network, optimizer, plan, images=images, labels=labels)


@pytest.mark.parametrize("method", ["mae", "unet"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_without_noise_and_clipping_it_is_plain_sgd_on_the_same_batches(tensors, method, chunk):
    images, labels = tensors[0], tensors[1] if method == "unet" else None
    options = dict(n_classes=11, norm="group", **SMALL) if method == "unet" else {}
    network, plain = build(method, **options), build(method, **options)
    steps = make_steps(network, images, labels, lr=0.01)
    steps.chunk = chunk or steps.chunk
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        batch = np.arange(8 * step, 8 * step + 8)
        loss = steps.take_on(batch, step, **(STEP if method == "mae" else MAPS))
        rng = seeds.rng(0, "train-views", step, 0)
        parts = [batch] if chunk is None else np.array_split(batch, 3)  # masks are drawn part by part
        mean = 0.0
        for part in parts:  # the batch loss: every mask hides as many patches, every picture has as many valid pixels
            extra = STEP if method == "mae" else MAPS | {"labels": labels[part]}
            mean = mean + len(part) / 8 * plain.loss(images[part], rng=rng, **extra)
        optimizer.zero_grad()
        mean.backward()
        assert float(loss) == pytest.approx(float(mean.detach()), rel=1e-4)
        for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
            if p.requires_grad:  # float32 sums in another order
                scale = max(float(q.grad.norm()), 1e-3)
                assert float((p.grad - q.grad).norm()) < 1e-3 * scale, name
        optimizer.step()
        for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
        plain.load_state_dict(network.state_dict())  # rounding must not grow from step to step
    steps.close()


def test_one_image_moves_the_gradient_by_at_most_c_and_noise_has_its_size(tensors):
    network = build("mae")
    steps = make_steps(network, tensors[0], clip=1e-2)
    steps.take_on(np.array([3]), 0, **STEP)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in steps.optimizer.params))
    assert norm == pytest.approx(1e-2 / 8, rel=1e-3)  # its gradient is larger, so it is cut to C, divided by q N
    noisy = make_steps(build("mae"), tensors[0], clip=0.5, noise=2.0)
    noisy.take_on(np.array([], int), 0, **STEP)  # an empty draw: the noise alone
    values = torch.cat([p.grad.flatten() for p in noisy.optimizer.params])
    assert float(values.std()) == pytest.approx(2.0 * 0.5 / 8, rel=0.01)  # 100,000 draws


def test_poisson_batches_are_repeatable_sometimes_empty_and_of_the_right_size(tensors):
    steps = make_steps(build("mae"), tensors[0][:4], batch_size=1)
    batches = [steps.draw_batch(step) for step in range(400)]
    assert all(np.array_equal(batches[i], steps.draw_batch(i)) for i in range(0, 400, 40))
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(1, abs=0.15) and (sizes == 0).mean() == pytest.approx(0.75**4, abs=0.08)
    before = steps.method.decoder["predict"].weight.clone()
    steps.take_on(np.array([], int), 0, **STEP)  # without noise an empty draw moves nothing
    assert torch.equal(before, steps.method.decoder["predict"].weight)


def test_tiny_batches_train_and_the_accounting_is_printed_and_kept(pictures, capsys, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    settings = dict(epochs=2, batch_size=1, privacy={"epsilon": 20.0, "delta": 1e-4}, **TINY)
    run = pretrain.fit("mae", pictures["images"][:5], **settings)
    plan = run.settings["privacy"]
    assert plan["steps"] == 10 and plan["sample_rate"] == 0.2 and 19 < plan["epsilon"] <= 20
    assert accounting.describe_privacy(plan) in capsys.readouterr().out
    assert torch.equal(state, torch.get_rng_state())
    first, last = run.states[0], run.states[2]
    assert all(torch.isfinite(value).all() for value in last.values())
    assert not torch.equal(first["backbone.blocks.0.mlp.fc1.weight"], last["backbone.blocks.0.mlp.fc1.weight"])
    for token in ("backbone.cls_token", "backbone.pos_embed", "decoder.blocks.mask_token"):
        assert torch.equal(first[token], last[token])
    again = pretrain.Run.load(run.save(tmp_path), settings=run.settings)
    x = datasets.to_float(pictures["images"][:2])
    assert torch.equal(again.encoder.embed(x), run.encoder.embed(x)) and again.decoder is not None


@pytest.mark.parametrize("method", ["mae", "unet"])
def test_a_killed_private_training_resumes_to_the_same_weights(pictures, tmp_path, method):
    settings = dict(epochs=2, batch_size=6, privacy={"noise_multiplier": 0.5, "max_grad_norm": 1.0})
    settings |= TINY | {"dropout": 0.1} if method == "mae" else NET | SMALL
    labels = pictures["masks"][:12]
    fit = lambda **extra: pretrain.fit(method, pictures["images"][:12], labels=labels, **settings, **extra)  # noqa: E731
    whole = fit()
    fit(resume_path=tmp_path / "resume.pt", stop_after=1)
    resumed = fit(resume_path=tmp_path / "resume.pt")
    for key, value in whole.states[2].items():
        assert torch.equal(value, resumed.states[2][key]), key
    if method == "unet":  # group norm is found again, from a checkpoint and from the file
        x = datasets.to_float(pictures["images"][:2])
        again = pretrain.Run.load(whole.save(tmp_path / "run"), settings=whole.settings)
        expected = whole.encoder.posteriors(x)
        for segmenter in (again.encoder, again.encoder_at(2), segmenters.load(tmp_path / "run")):
            assert torch.equal(segmenter.posteriors(x), expected)
        assert not any("running_mean" in key for key in whole.states[2])


def test_a_plain_training_is_what_it_was_and_a_private_one_leaves_nothing_behind(pictures):
    plain = lambda: pretrain.fit("mae", pictures["images"][:8], epochs=1, **TINY)  # noqa: E731
    first = plain()
    pretrain.fit("mae", pictures["images"][:8], epochs=1, privacy={"noise_multiplier": 1.0}, **TINY)
    again = plain()
    assert all(torch.equal(value, again.states[1][key]) for key, value in first.states[1].items())
    keys = "method arch epochs seed augmentation lr weight_decay batch_size warmup n_train options"
    assert " ".join(first.settings) == keys and first.settings["options"] == {}  # resume states compare their text
    assert not torch.equal(first.states[0]["backbone.cls_token"], first.states[1]["backbone.cls_token"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(privacy={"epsilon": 0.001}),
            "no noise reaches epsilon 0.001 at delta 1e-05 with sample rate 1 and 2 steps",
        ),
        (dict(privacy={"epsilon": 0}), "expected epsilon a number above 0, got 0"),
        (dict(privacy={"epsilon": -2.0}), "expected epsilon a number above 0, got -2.0"),
        (dict(privacy={"epsilon": "small"}), "expected epsilon a number above 0, got 'small'"),
        (dict(privacy={"noise_multiplier": -1.0}), "expected noise_multiplier a number above 0, got -1.0"),
        (dict(privacy={"epsilon": 8.0, "delta": 1.0}), "delta below 1"),
        (dict(privacy={"epsilon": 8.0, "max_grad_norm": 0}), "expected max_grad_norm a number above 0"),
        (dict(privacy={"epsilon": 8.0, "noise_multiplier": 1.0}), "one of the two"),
        (dict(privacy={"delta": 1e-5}), "one of the two"),
        (dict(privacy={"epsilon": 8.0, "sigma": 1}), "expected privacy a mapping of epsilon, noise_multiplier, delta"),
        (dict(privacy=8.0), "expected privacy a mapping"),
        (dict(method="simclr"), "simclr can't be trained with privacy: .*compares the images of a batch"),
        (dict(method="moco-v2"), "moco-v2 can't be trained with privacy: .* compares"),
        (dict(method="dino"), "dino can't be trained with privacy: .*center is a mean over it"),
        (dict(method="supervised"), "supervised can't be trained with privacy: it has no loss of each image"),
        (dict(method="simmim", arch="swin_thin_32"), "no per-example gradients, so it can't be private"),
        (dict(method="upernet", decoder_channels=16, **NET), "no per-example gradients, so it can't be private"),
        (dict(method="unet", mixup=0.4, **SMALL | NET), "option mixup can't be combined with privacy"),
        (dict(precision="bf16-mixed"), "needs precision '32-true', got 'bf16-mixed'"),
        (dict(encoder=encoders.make("vit_nano_patch8_32"), arch=None), "the attacker's own"),
    ],
)
def test_what_can_not_be_private_is_refused_in_one_line(pictures, change, message):
    settings = dict(method="mae", epochs=2, privacy={"noise_multiplier": 1.0}) | TINY | change
    labels = pictures["masks" if settings["method"] in segmenters.ARCHS else "labels"][:4]
    with pytest.raises(ValueError, match=message) as error:
        pretrain.fit(settings.pop("method"), pictures["images"][:4], labels=labels, **settings)
    assert "\n" not in str(error.value)


def test_batch_norm_is_refused_with_the_reason(tensors):
    network = build("unet", n_classes=11, **SMALL)
    with pytest.raises(ValueError, match="batch norm can't be private .*mixes the images of a batch.*norm: group"):
        privacy.require_private(network, tensors[0][:2], tensors[1][:2])


# ------------------------------------------------------------------------------------------- plain regularizers


@pytest.mark.parametrize("option", [{"dropout": 0.3}, {"drop_path": 0.5}])
def test_an_encoder_trained_with_dropout_begins_alike_and_is_opened_without_it(pictures, option):
    plain, run, again = (
        pretrain.fit("mae", pictures["images"][:8], epochs=2, **TINY, **extra) for extra in ({}, option, option)
    )
    key, x = "backbone.blocks.1.mlp.fc1.weight", datasets.to_float(pictures["images"][:2])
    assert torch.equal(run.states[0][key], plain.states[0][key])
    assert torch.equal(run.states[2][key], again.states[2][key]) and not torch.equal(
        run.states[2][key], plain.states[2][key]
    )
    assert torch.equal(run.encoder.embed(x), run.encoder.embed(x)) and run.settings["options"] == option
    assert not run.decoder.training


@pytest.mark.parametrize(
    ("method", "arch", "options", "message"),
    [
        ("mae", "vit_nano_patch8_32", {"dropout": 1.0}, "expected dropout from 0 to below 1, got 1.0"),
        ("mae", "vit_nano_patch8_32", {"drop_path": -0.1}, "expected drop_path from 0 to below 1"),
        ("simclr", "resnet_thin_32", {"dropout": 0.1}, "option dropout does not fit resnet_thin_32"),
        ("unet", "mobilenet_v2", {"n_classes": 3, "dropout": 1.5}, "expected dropout from 0 to below 1"),
        ("unet", "mobilenet_v2", {"n_classes": 3, "label_smoothing": -0.1}, "expected label_smoothing from 0"),
        ("unet", "mobilenet_v2", {"n_classes": 3, "mixup": 0.4, "distill": 2.0}, "one of mixup, distill, minmax"),
        ("unet", "mobilenet_v2", {"n_classes": 3, "minmax": -1.0}, "one of mixup, distill, minmax"),
        ("unet", "mobilenet_v2", {"n_classes": 3, "minmax": 1.0, "mixup": 0.4}, "one of mixup, distill, minmax"),
    ],
)
def test_a_wrong_regularizer_is_one_line(method, arch, options, message):
    with pytest.raises(ValueError, match=message) as error:
        pretrain.build(method, arch, **options)
    assert "\n" not in str(error.value)


def test_label_smoothing_spreads_a_share_of_the_label_in_training_only(tensors):
    images, labels = tensors[0][:3], tensors[1][:3].clone()
    labels[:, :4] = segmenters.VOID
    network = pretrain.build("unet", "mobilenet_v2", n_classes=11, label_smoothing=0.3, norm="group", **SMALL).train()
    loss = lambda: float(network.loss(images, labels=labels, rng=np.random.default_rng(0), **MAPS).detach())  # noqa: E731
    with torch.no_grad():
        log_p = (
            network.backbone(images.float() / 127.5 - 1).log_softmax(1).permute(0, 2, 3, 1)[labels != segmenters.VOID]
        )
    hit = log_p[torch.arange(len(log_p)), labels[labels != segmenters.VOID]]
    assert loss() == pytest.approx(-float((0.7 * hit + 0.3 * log_p.mean(1)).mean()), rel=1e-4)
    network.eval()
    assert loss() == pytest.approx(-float(hit.mean()), rel=1e-4)


def test_mixup_mixes_images_and_labels_by_one_share(tensors):
    class Draws:
        random = staticmethod(np.random.default_rng(0).random)
        beta = staticmethod(lambda a, b, n: np.full(n, 0.25))
        permutation = staticmethod(lambda n: np.arange(n)[::-1].copy())

    images, labels = tensors[0][:2], tensors[1][:2]
    network = pretrain.build("unet", "mobilenet_v2", n_classes=11, mixup=0.4, norm="group", **SMALL).train()
    with torch.no_grad():
        loss = network.loss(images, labels=labels, rng=Draws(), **MAPS)
        x = images.float() / 127.5 - 1
        logits = network.backbone(0.25 * x + 0.75 * x.flip(0))
        own, other = (nn.functional.cross_entropy(logits, y) for y in (labels, labels.flip(0)))
    assert float(loss) == pytest.approx(float(0.25 * own + 0.75 * other), rel=1e-4)


def test_a_distilled_segmenter_never_sees_a_label_and_is_kept_without_its_teacher(tensors, pictures, tmp_path):
    images, labels = tensors[0][:3], tensors[1][:3]
    network = pretrain.build("unet", "mobilenet_v2", n_classes=11, distill=2.0, norm="group", **SMALL).train()

    def grad(y):
        network.zero_grad()
        network.loss(images, labels=y, rng=np.random.default_rng(0), **MAPS).backward()
        heads = [net.segmentation_head[0].weight.grad.clone() for net in (network.backbone, network.teacher)]
        return heads

    first, other = grad(labels), grad((labels + 1) % 11)
    torch.testing.assert_close(first[0], other[0], rtol=1e-4, atol=1e-6)  # the answers of one teacher, in one state
    assert not torch.allclose(first[1], other[1], rtol=0.1)
    assert not torch.equal(network.backbone.segmentation_head[0].weight, network.teacher.segmentation_head[0].weight)
    for option in ({"distill": 2.0, "dropout": 0.5}, {"mixup": 0.4, "label_smoothing": 0.2}):
        settings = dict(epochs=1, batch_size=4, **NET, **SMALL, **option)
        run = pretrain.fit("unet", pictures["images"][:8], labels=pictures["masks"][:8], **settings)
        assert all(key.startswith("backbone.") for key in run.states[1])
        x = datasets.to_float(pictures["images"][:2])
        for segmenter in (run.encoder_at(1), segmenters.load(run.save(tmp_path / next(iter(option))))):
            assert torch.equal(segmenter.posteriors(x), run.encoder.posteriors(x))
            assert not set(segmenter.options) & set(option)


def test_the_min_max_game_moves_the_network_against_its_attacker_and_on_members_only(tensors, pictures, tmp_path):
    images, labels = tensors[0][:4], tensors[1][:4].clone()
    labels[:, :4] = segmenters.VOID
    network = pretrain.build("unet", "mobilenet_v2", n_classes=11, minmax=3.0, norm="group", **SMALL).train()
    torch.manual_seed(7)  # its attacker's first weights come from the seed too
    again = pretrain.build("unet", "mobilenet_v2", n_classes=11, minmax=3.0, norm="group", **SMALL)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in network.state_dict().items())
    call = dict(labels=labels[:2], rng=np.random.default_rng(0), **MAPS)
    with pytest.raises(ValueError, match="minmax needs images that are not trained on: pass reference="):
        network.loss(images[:2], **call)
    network.reference = images[2:], labels[2:]
    network.loss(images[:2], **call).backward()
    head, attacker = network.backbone.segmentation_head[0].weight, network.adversary[0].weight
    moved, learned = head.grad.clone(), attacker.grad.clone()

    drawn = np.random.default_rng(0).choice(2, 2, replace=False) + 2  # the reference pictures of that step
    logits = network.backbone(torch.cat([images[:2], images[drawn]]).float() / 127.5 - 1)
    y = torch.cat([labels[:2], labels[drawn]])
    valid = (y != segmenters.VOID).unsqueeze(1)
    truth = torch.zeros_like(logits).scatter_(1, y.clamp_max(10).unsqueeze(1), 1.0) * valid
    answers = logits.softmax(1)

    def accuse(answers):
        said = network.adversary(torch.cat([answers, truth], 1)).flatten()
        return nn.functional.binary_cross_entropy_with_logits(said, torch.tensor([1.0, 1.0, 0.0, 0.0]))

    members_only = torch.cat([answers[:2], answers[2:].detach()])
    cost = nn.functional.cross_entropy(logits[:2], labels[:2], ignore_index=segmenters.VOID)
    by_hand = torch.autograd.grad(cost - 3.0 * accuse(members_only), head, retain_graph=True)[0]
    taught = torch.autograd.grad(accuse(answers.detach()), attacker)[0]
    torch.testing.assert_close(moved, by_hand, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(learned, taught, rtol=1e-3, atol=1e-7)

    others = dict(reference=pictures["images"][8:16], reference_labels=pictures["masks"][8:16])
    run = pretrain.fit(
        "unet", pictures["images"][:8], labels=pictures["masks"][:8], epochs=1, batch_size=4, minmax=3.0, **others,
        **NET, **SMALL,
    )  # fmt: skip
    assert all(key.startswith("backbone.") for key in run.states[1])
    x = datasets.to_float(pictures["images"][:2])
    assert torch.equal(segmenters.load(run.save(tmp_path)).posteriors(x), run.encoder.posteriors(x))


# ------------------------------------------------------------------------------------------- rows of profiles

ROW = "{id: a, role: target, method: mae, arch: vit_nano_patch8_32, dataset: scenes, n_train: 32, epochs: 2%s}"


def parse(extra):
    text = f"name: mine\ndatasets: {{scenes: {{size: 32, n: 8000}}}}\nmodels:\n  - {ROW % extra}\n"
    return profiles.parse(text, source="profiles/mine.yaml").row("a")


@pytest.mark.parametrize(
    ("extra", "strength"),
    [
        ("", ""),
        (", defense: dp-sgd, options: {privacy: {epsilon: 8, delta: 1.0e-5}}", 8.0),
        (", defense: dp-sgd, options: {privacy: {noise_multiplier: 1.5}}", "sigma 1.5"),
        (", defense: scsr, augmentation: 'crop:0.2-0.6'", "0.2-0.6"),
        (", defense: dropout, options: {dropout: 0.2}", 0.2),
        (", defense: drop-path, options: {drop_path: 0.1}", 0.1),
        (", defense: weight-decay, options: {weight_decay: 0.5}", 0.5),
    ],
)
def test_a_row_says_how_strong_its_defense_is(extra, strength):
    row = parse(extra)
    assert row.strength == strength and type(row.strength) is type(strength)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (", defense: magic", "a: defense: expected 'none', 'scsr'"),
        (", options: {privacy: {epsilon: 8.0}}", "expected dp-sgd for a row with options: privacy, got 'none'"),
        (", defense: dp-sgd", "a: options: privacy: expected epsilon or noise_multiplier"),
        (", defense: dp-sgd, options: {privacy: {epsilon: -1}}", "privacy: epsilon: expected greater than 0, got -1"),
        (", defense: dp-sgd, options: {privacy: {eps: 1}}", "expected epsilon or noise_multiplier"),
        (", defense: scsr", "a: augmentation: expected crop:LOW-HIGH for defense scsr, got 'none'"),
        (", defense: dropout", "options: dropout: defense dropout expects a number of at least 0, got None"),
        (", defense: label-smoothing, options: {label_smoothing: 0.1}", "label-smoothing fits segmenters"),
        (", defense: min-max, options: {minmax: 1.0}", "min-max fits segmenters"),
    ],
)
def test_a_wrong_defense_of_a_row_is_one_line_before_anything_runs(extra, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(extra)
    assert str(error.value).startswith("profiles/mine.yaml: models: a: ") and "\n" not in str(error.value)


def test_the_estimate_of_a_private_row_knows_what_its_gradients_cost():
    plain, private = parse(""), parse(", defense: dp-sgd, options: {privacy: {epsilon: 8}}")
    steps = [estimates.estimate_seconds(row, None) - estimates.ROW_SECONDS for row in (plain, private)]
    assert steps[1] == pytest.approx(estimates.PRIVATE_COST["mae"] * steps[0])


def test_privacy_of_a_method_that_couples_images_is_refused_in_the_profile():
    extra = ", defense: dp-sgd, options: {privacy: {epsilon: 8.0}}"
    text = f"name: mine\ndatasets: {{scenes: {{size: 32}}}}\nmodels:\n  - {ROW % extra}\n".replace("mae", "simclr")
    with pytest.raises(ValueError, match="a: defense: dp-sgd fits mae, simmim, unet .*, got method 'simclr'"):
        profiles.parse(text, source="profiles/mine.yaml")
