"""Every method learns, keeps what it should, and continues a killed training with the same numbers."""

import resource

import numpy as np
import pytest
import timm.layers
import torch
from lightly.models.utils import patchify, unpatchify

from mia_utils import pretrain
from mia_utils.datasets import scenes
from mia_utils.models import backbones
from mia_utils.pretrain import mae, moco, simclr
from mia_utils.pretrain import run as run_module

TINY = dict(arch="vit_nano_patch8_32", progress=False)


@pytest.fixture(scope="module")
def pictures():
    made = scenes.make_scenes(96, size=32, seed=1, progress=False)
    return made["images"], made["labels"]


QUEUE = {"moco-v1": {"queue_size": 8}, "moco-v2": {"queue_size": 8}}  # options of methods that need some
QUEUE["moco-v2-split"] = {"queue_size": 8, "bn_splits": 4}


@pytest.mark.parametrize(("method", "epochs"), [("mae", 15), ("simclr", 12), ("moco", 40), ("supervised", 10)])
def test_a_method_lowers_its_loss_on_the_members(pictures, method, epochs):
    images, labels = pictures
    outside = dict(heldout=images[64:], heldout_labels=labels[64:])
    run = pretrain.fit(method, images[:32], labels=labels[:32], epochs=epochs, **outside, **TINY)
    first, last = run.history.iloc[0], run.history.iloc[-1]
    assert last.loss_members < 0.9 * first.loss_members
    assert np.isfinite(run.history.loss_heldout).all()
    assert run.checkpoints[0] == 0 and run.checkpoints[-1] == epochs


def test_moco_with_a_queue_lowers_its_loss_once_the_queue_holds_keys(pictures):
    settings = dict(arch="resnet_thin_32", epochs=25, batch_size=16, queue_size=8, progress=False)
    loss = pretrain.fit("moco-v2", pictures[0][:32], **settings).history.loss_members
    assert loss.iloc[0] < 0.01 < loss.max()  # a queue of random keys is easily told from, one of real keys is not
    assert loss.iloc[-1] < 0.8 * loss.max()


@pytest.mark.parametrize("method", ["simclr", "moco"])
def test_before_training_members_and_strangers_have_the_same_loss(pictures, method):
    """A contrastive loss grows with the batch: both sides must be measured on batches of one size."""
    run = pretrain.fit(method, pictures[0][:32], heldout=pictures[0][32:], epochs=1, batch_size=16, **TINY)
    first = run.history.iloc[0]
    # few random pictures scatter by 0.2; batches of which one is twice the other lie log(2) = 0.69 apart
    assert abs(first.loss_members - first.loss_heldout) < 0.4


def test_dino_moves_its_teacher_and_keeps_it(pictures):
    run = pretrain.fit("dino", pictures[0][:16], epochs=2, **TINY)
    start, end = run.encoder_at(0).module, run.encoder.module
    assert not torch.equal(start.blocks[0].mlp.fc1.weight, end.blocks[0].mlp.fc1.weight)
    assert np.isfinite(run.history.loss_members).all()
    still = pretrain.fit("dino", pictures[0][:16], epochs=2, momentum=1.0, **TINY)
    student = pretrain.fit("dino", pictures[0][:16], epochs=2, momentum=1.0, keep="student", **TINY)
    assert still.history.loss_members.equals(student.history.loss_members)  # one training, two networks
    weights = [r.encoder.module.blocks[0].mlp.fc1.weight for r in (still, student)]
    start = start.blocks[0].mlp.fc1.weight
    assert torch.equal(start, weights[0]) and not torch.equal(start, weights[1])


@pytest.mark.parametrize(
    ("method", "arch"),
    [("mae", "vit_nano_patch8_32"), ("dino", "vit_nano_patch8_32"), ("moco", "vit_nano_patch8_32")]
    + [("moco-v2", "vit_nano_patch8_32"), ("moco-v1", "resnet_thin_32"), ("moco-v2-split", "resnet_thin_32")],
)
def test_a_killed_training_resumes_to_the_same_weights(pictures, tmp_path, method, arch):
    """Also what is no weight: the queue of keys, batch norm's statistics, the momentum encoder."""
    settings = dict(arch=arch, epochs=3, batch_size=8, progress=False, **QUEUE.get(method, {}))
    name = method.removesuffix("-split")
    fit = lambda **extra: pretrain.fit(name, pictures[0][:24], **settings, **extra)  # noqa: E731
    whole = fit()
    fit(resume_path=tmp_path / "resume.pt", stop_after=4)  # of 9: after the first of three steps of an epoch
    resumed = fit(resume_path=tmp_path / "resume.pt")
    for key, value in whole.states[3].items():
        assert torch.equal(value, resumed.states[3][key]), key
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


def test_the_queue_holds_the_latest_keys_and_never_an_image_s_own(pictures):
    method = pretrain.build("moco-v2", "vit_nano_patch8_32", queue_size=12).train()
    images = torch.from_numpy(pictures[0][:32]).permute(0, 3, 1, 2)
    before = method.queue.clone()
    settings = dict(augmentation="flip", size=32, progress=0.0)
    for step, rows in enumerate((slice(0, 8), slice(8, 16))):
        method.loss(images[rows], rng=np.random.default_rng(step), **settings)
    assert int(method.oldest) == 4  # 16 keys in 12 places
    assert not torch.equal(method.queue, before)
    assert torch.allclose(method.queue.norm(dim=1), torch.ones(12), atol=1e-5)
    queue = method.queue.clone()
    method.eval().loss(images[:8], rng=np.random.default_rng(0), **settings)
    assert torch.equal(queue, method.queue)  # measuring a loss leaves the queue as it was


def test_the_queue_s_loss_is_the_cross_entropy_of_key_against_queue(pictures):
    method = pretrain.build("moco-v2", "vit_nano_patch8_32", queue_size=5, temperature=0.5).eval()
    images = torch.from_numpy(pictures[0][:3]).permute(0, 3, 1, 2)
    with torch.no_grad():
        loss = method.loss(images, augmentation="none", size=32, rng=np.random.default_rng(0), progress=0.0)
        vector = method.projector(method._read(2 * images.float() / 255 - 1))
    expected = []
    for row in (vector / vector.norm(dim=1, keepdim=True)).double():
        positive, negatives = 1 / 0.5, [float(row @ key.double()) / 0.5 for key in method.queue]  # view and key agree
        expected.append(-positive + np.log(np.exp(positive) + np.exp(negatives).sum()))
    assert float(loss) == pytest.approx(np.mean(expected), abs=1e-5)


def test_split_batch_norm_sees_each_part_of_a_batch_by_itself():
    split, plain = (torch.nn.BatchNorm2d(5).train() for _ in range(2))
    torch.nn.init.uniform_(split.weight)
    plain.load_state_dict(split.state_dict())
    moco.split_batch_norm(torch.nn.Sequential(split), 4)
    x = torch.randn(8, 5, 3, 3).to(memory_format=torch.channels_last)
    made, running = split(x), []
    for part in range(4):
        one = torch.nn.BatchNorm2d(5)
        one.load_state_dict(plain.state_dict())
        torch.testing.assert_close(made[2 * part : 2 * part + 2], one(x[2 * part : 2 * part + 2]))
        running.append(torch.stack([one.running_mean, one.running_var]))
    torch.testing.assert_close(torch.stack([split.running_mean, split.running_var]), torch.stack(running).mean(0))
    assert split.state_dict().keys() == plain.state_dict().keys()  # a plain network opens the weights
    with pytest.raises(ValueError, match="a batch that bn_splits 4 divides, got 6 images"):
        split.train()(x[:6])
    with pytest.raises(ValueError, match="bn_splits 8: expected .* a backbone with batch norm"):
        pretrain.build("moco-v2", "vit_nano_patch8_32", bn_splits=8)


def test_shuffled_keys_come_back_in_the_order_of_their_images(pictures):
    """With the weights of the key encoder's batch norm in eval mode, order and parts change nothing."""
    images, queues = torch.from_numpy(pictures[0][:8]).permute(0, 3, 1, 2), []
    for splits in (1, 4):
        method = pretrain.build("moco-v2", "resnet_thin_32", queue_size=8, bn_splits=splits).train()
        method.backbone_momentum.eval()
        method.loss(images, rng=np.random.default_rng(1), augmentation="flip", size=32, progress=0.0)
        queues.append(method.queue)
    torch.testing.assert_close(*queues)
    method.backbone_momentum.train()
    method.loss(images, rng=np.random.default_rng(1), augmentation="flip", size=32, progress=0.0)
    assert not torch.allclose(queues[0], method.queue, atol=1e-3)


def test_a_queue_longer_than_half_the_images_is_refused(pictures):
    with pytest.raises(ValueError, match="queue_size up to half of the 16 images, got 64"):
        pretrain.fit("moco-v2", pictures[0][:16], epochs=1, **TINY)


def test_a_resume_state_of_other_settings_is_not_used(pictures, tmp_path):
    path = tmp_path / "resume.pt"
    pretrain.fit("mae", pictures[0][:16], epochs=4, resume_path=path, stop_after=2, lr=1e-3, **TINY)
    fresh = pretrain.fit("mae", pictures[0][:16], epochs=4, lr=2e-3, **TINY)
    other = pretrain.fit("mae", pictures[0][:16], epochs=4, lr=2e-3, resume_path=path, **TINY)
    assert torch.equal(fresh.states[4]["backbone.norm.weight"], other.states[4]["backbone.norm.weight"])


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"not a state",
    "cut off": lambda data: data[: len(data) // 2],
    "last byte missing": lambda data: data[:-1],
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
    "zeroed": lambda data: data[:5000] + bytes(4096) + data[9096:],
}


@pytest.fixture(scope="module")
def undamaged(pictures, tmp_path_factory):
    """A training of two epochs, and the resume state of its third of four steps."""
    path, settings = tmp_path_factory.mktemp("undamaged") / "resume.pt", dict(epochs=2, batch_size=8, **TINY)
    pretrain.fit("mae", pictures[0][:16], stop_after=3, resume_path=path, **settings)
    return pretrain.fit("mae", pictures[0][:16], **settings), path.read_bytes()


@pytest.mark.parametrize("damage", [*DAMAGE, "other shape", "old layout"])
def test_a_damaged_resume_state_is_said_and_the_training_starts_over(pictures, undamaged, tmp_path, capsys, damage):
    whole, content = undamaged
    path, settings = tmp_path / "resume.pt", dict(epochs=2, batch_size=8, resume_path=tmp_path / "resume.pt", **TINY)
    path.write_bytes(DAMAGE.get(damage, bytes)(content))
    if damage not in DAMAGE:
        saved = torch.load(path, weights_only=True)
        if damage == "other shape":
            saved["model"]["backbone.norm.weight"] = torch.ones(3)
            file = run_module.ResumeFile(path, {})
            file.settings = saved["settings"]
            file.write(saved)  # sound, but not of this model
        else:
            torch.save({"epoch": 1}, path)
    run = pretrain.fit("mae", pictures[0][:16], **settings)
    assert all(torch.equal(value, run.states[2][key]) for key, value in whole.states[2].items())
    (line,) = capsys.readouterr().out.splitlines()
    reason = "its weights have other shapes" if damage == "other shape" else "it was changed, cut off"
    assert line.startswith(f"resume.pt can't be continued ({reason}") and line.endswith("the training starts over")


def test_on_a_full_disk_the_training_goes_on_without_its_resume_state(pictures, tmp_path, capsys):
    whole, path = pretrain.fit("mae", pictures[0][:16], epochs=2, **TINY), tmp_path / "resume.pt"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # no file may grow further
    try:
        run = pretrain.fit("mae", pictures[0][:16], epochs=2, resume_path=path, save_every=0, **TINY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(torch.equal(value, run.states[2][key]) for key, value in whole.states[2].items())
    (line,) = capsys.readouterr().out.splitlines()  # once, not at every step
    assert line.startswith("can't write resume.pt (") and "the training goes on" in line
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_what_is_recorded_changes_no_weight(pictures):
    settings = dict(epochs=9, batch_size=8, checkpoints=[2], **TINY)
    both, alone = (pretrain.fit("mae", pictures[0][:16], **settings, heldout=h) for h in (pictures[0][32:44], None))
    assert both.history.epoch.tolist() == [*range(10)] and both.checkpoints == [0, 2, 9]
    assert all(torch.equal(value, alone.states[9][key]) for key, value in both.states[9].items())


def test_the_same_seed_repeats_and_the_global_state_is_left_alone(pictures):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    runs = [pretrain.fit("mae", pictures[0][:16], epochs=2, seed=seed, **TINY) for seed in (0, 0, 1)]
    key = "backbone.blocks.0.mlp.fc1.weight"
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(runs[0].states[2][key], runs[1].states[2][key])
    assert not torch.equal(runs[0].states[2][key], runs[2].states[2][key])


@pytest.mark.parametrize(("name", "cls"), [("mae", mae.MAE), ("simclr", simclr.SimCLR)])
def test_fast_products_train_by_the_same_losses(pictures, monkeypatch, name, cls):
    """Measured in the steps: in eval mode SimCLR's batch norm shows a bias that training never feels (3e-4)."""
    before, fused = torch.get_float32_matmul_precision(), bool(timm.layers.config.use_fused_attn())
    losses, compute = [], cls.loss

    def loss(self, *arguments, **settings):
        losses.append(compute(self, *arguments, **settings))
        return losses[-1]

    monkeypatch.setattr(cls, "loss", loss)
    settings = dict(epochs=3, batch_size=16, **TINY)
    try:
        pretrain.fit(name, pictures[0][:48], **settings)
        backbones.use_fast_products()
        pretrain.fit(name, pictures[0][:48], **settings)
    finally:
        torch.set_float32_matmul_precision(before)
        timm.layers.set_fused_attn(fused)
    plain, fast = np.reshape([float(x.detach()) for x in losses if x.requires_grad], (2, 9))
    np.testing.assert_allclose(fast, plain, rtol=1e-5)


def test_drop_path_repeats_with_the_seed_too(pictures):
    settings = dict(arch="swin_thin_32", epochs=1, progress=False)
    first, again = (pretrain.fit("simclr", pictures[0][:16], **settings).states[1] for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)  # timm's Swin drops paths by default


def test_a_run_is_saved_and_read_with_every_checkpoint(pictures, tmp_path):
    run = pretrain.fit("mae", pictures[0][:16], epochs=4, checkpoints=[1, 2], **TINY)
    again = pretrain.Run.load(run.save(tmp_path), settings=run.settings)
    assert again.checkpoints == [0, 1, 2, 4]
    images = torch.from_numpy(pictures[0][:5]).permute(0, 3, 1, 2) / 255
    for epoch in again.checkpoints:
        with torch.inference_mode():
            assert torch.equal(again.encoder_at(epoch).tokens(images), run.encoder_at(epoch).tokens(images))
    with pytest.raises(ValueError, match="no checkpoint of epoch 3: kept are 0, 1, 2, 4"):
        again.encoder_at(3)


def test_the_untrained_twin_is_the_encoder_before_the_first_step(pictures):
    run = pretrain.fit("mae", pictures[0][:16], epochs=1, seed=7, **TINY)
    twin = pretrain.build("mae", "vit_nano_patch8_32", seed=7).backbone
    assert torch.equal(twin.blocks[1].attn.qkv.weight, run.encoder_at(0).module.blocks[1].attn.qkv.weight)


def test_mae_never_looks_at_hidden_patches():
    method = pretrain.build("mae", "vit_nano_patch8_32").eval()
    masks = mae.draw_masks(3, 16, 0.75, np.random.default_rng(0))
    images = torch.rand(3, 3, 32, 32)
    changed = unpatchify(torch.where(masks[..., None], torch.rand(3, 16, 192), patchify(images, 8)), 8)
    assert torch.allclose(method.reconstruct(images, masks), method.reconstruct(changed, masks), atol=1e-6)
    assert not torch.allclose(method.reconstruct(images, masks), method.reconstruct(1 - changed, masks), atol=1e-3)


def test_mae_predicts_as_lightly_does_with_the_same_modules():
    """The naive path: mask tokens everywhere, then the visible ones set one by one."""
    method = pretrain.build("mae", "vit_nano_patch8_32").eval()
    images, masks = torch.rand(2, 3, 32, 32), mae.draw_masks(2, 16, 0.75, np.random.default_rng(1))
    with torch.inference_mode():
        fast = method.predict(images, masks)
        decoder = method.decoder["blocks"]
        for i in range(2):
            keep = [0, *(1 + torch.nonzero(~masks[i]).flatten()).tolist()]
            visible = method.encoder.encode(images[i : i + 1], idx_keep=torch.tensor([keep]))
            full = decoder.mask_token.expand(1, 17, -1).clone()
            for place, token in zip(keep, method.decoder["embed"](visible)[0], strict=True):
                full[0, place] = token
            slow = method.decoder["predict"](decoder.decode(full + decoder.pos_embed))[0, 1:]
            assert torch.allclose(fast[i], slow, atol=1e-5)  # float32 sums in another order


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.01])
def test_a_mask_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(ValueError, match="expected some, but not all"):
        mae.draw_masks(2, 16, ratio, np.random.default_rng(0))


def test_the_moco_contrast_equals_its_formula():
    q, k = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), torch.randn(5, 8)
    loss = 0.0
    for i in range(5):
        s = [float(q[i] @ k[j] / (q[i].norm() * k[j].norm())) / 0.2 for j in range(5)]
        loss += -(s[i] - np.log(np.exp(s).sum())) / 5
    assert abs(float(moco.compute_contrast(q, k, 0.2)) - 2 * 0.2 * loss) < 1e-5


def test_a_method_from_outside_trains_like_the_others(pictures):
    class Rotation(torch.nn.Module):
        pooling = "mean"

        def __init__(self, backbone, *, input_size):
            super().__init__()
            self.backbone, self.head = backbone, torch.nn.Linear(64, 4)

        def loss(self, images, *, augmentation, size, rng, progress):
            turns = torch.from_numpy(rng.integers(0, 4, len(images)))
            turned = torch.stack([torch.rot90(x, int(t), (1, 2)) for x, t in zip(images, turns, strict=True)])
            vectors = self.backbone.forward_features(turned / 127.5 - 1)[:, 1:].mean(1)
            return torch.nn.functional.cross_entropy(self.head(vectors), turns)

        def after_step(self, progress):
            pass

    pretrain.register("rotation", Rotation, lr=1e-3, weight_decay=0.0, batch_size=16, augmentation="none")
    try:
        run = pretrain.fit("rotation", pictures[0][:32], epochs=20, **TINY)
    finally:
        del pretrain.METHODS["rotation"]
    assert run.history.loss_members.iloc[-1] < run.history.loss_members.iloc[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(method="nothing"), "unknown method 'nothing'"),
        (dict(augmentation="nothing"), "unknown augmentation"),
        (dict(images=np.zeros((4, 32, 32, 3))), r"expected images \(N, H, W, 3\) uint8"),
        (dict(images=np.zeros((1, 32, 32, 3), np.uint8)), "at least 2 images"),
        (dict(checkpoints=[9]), r"outside 0..2 epochs"),
        (dict(method="supervised"), "needs labels for all 8 images"),
        (dict(arch="resnet_thin_32"), "mae needs a plain ViT"),
        (dict(no_such_option=3), "mae does not take these options"),
        (dict(lr=1e30), "the mae loss is .* lower lr"),
    ],
)
def test_bad_settings_are_one_line(change, message):
    settings = dict(method="mae", images=np.full((8, 32, 32, 3), 7, np.uint8), arch="vit_nano_patch8_32", epochs=2)
    settings |= dict(progress=False) | change
    with pytest.raises(ValueError, match=message) as info:
        pretrain.fit(settings.pop("method"), settings.pop("images"), **settings)
    assert "\n" not in str(info.value)
