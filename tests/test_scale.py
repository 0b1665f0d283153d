"""Several processes, streamed images, half precision and a killed process: the same model as one plain training."""

import os
import pickle
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_drill import kill_in_child
from torch import nn
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher import api

from mia_utils import pretrain, seeds
from mia_utils.datasets import scenes
from mia_utils.pretrain import distributed, inputs, mae, moco, simclr
from mia_utils.runner import artifacts, profiles, train

ARCH = "vit_nano_patch8_32"
TINY = dict(arch=ARCH, progress=False)
# methods whose loss looks at the other images of a batch; without the batch norm of their heads, which on a CPU sees
# the images of its own process only
CONTRASTIVE = {"plain-simclr": {}, "plain-moco": {}, "moco-v2": {"queue_size": 10}}


class PlainSimCLR(simclr.SimCLR):
    def __init__(self, backbone, *, input_size):
        super().__init__(backbone, input_size=input_size)
        self.head = nn.Linear(64, 16)


class PlainMoCo(moco.MoCo):
    def __init__(self, backbone, *, input_size):
        super().__init__(backbone, input_size=input_size)
        self.projector, self.predictor = nn.Linear(64, 16), nn.Linear(16, 16)
        self.projector_momentum = nn.Linear(64, 16)
        self.projector_momentum.load_state_dict(self.projector.state_dict())
        self.projector_momentum.requires_grad_(False)


PLAIN = {"plain-simclr": PlainSimCLR, "plain-moco": PlainMoCo}


def fit_contrastive(images: np.ndarray) -> dict[str, pretrain.Run]:
    settings = dict(arch=ARCH, epochs=2, batch_size=8, progress=False, heldout=images[24:])
    for name, method in PLAIN.items():
        pretrain.register(name, method, lr=1e-3, weight_decay=0.05, batch_size=8, augmentation="simclr-weak")
    try:
        return {name: pretrain.fit(name, images[:24], **settings, **options) for name, options in CONTRASTIVE.items()}
    finally:
        for name in PLAIN:
            del pretrain.METHODS[name]


def work(folder: Path, images: np.ndarray) -> None:
    """One process of torchrun: the very command, then what has no row, then what it can't do."""
    sys.argv = ["train", "tiny", "mae", "dino"]
    try:
        runpy.run_module("mia_utils.runner.train", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0
    runs = fit_contrastive(images)
    settings = dict(epochs=2, batch_size=8, resume_path=folder / "resume.pt", **TINY)
    pretrain.fit("mae", images[:24], stop_after=4, **settings)
    runs["resumed"] = pretrain.fit("mae", images[:24], **settings)
    refused = []
    for settings in (dict(batch_size=7), dict(batch_size=8, privacy={"epsilon": 8.0})):
        try:
            pretrain.fit("mae", images, arch=ARCH, epochs=1, **settings)
        except ValueError as error:
            refused.append(str(error))
    if distributed.get_rank() == 0:
        made = {name: (run.history, run.states) for name, run in runs.items()}
        (folder / "out.pkl").write_bytes(pickle.dumps((made, refused)))


PROFILE = """
name: tiny
datasets:
  scenes: {size: 32, n: 160}
split: {n_nonmembers: 24, n_shadow_members: 8, n_shadow_nonmembers: 8}
models:
"""
ROW = "  - {{id: {id}, role: target, method: {method}, arch: {arch}, dataset: {dataset}, n_train: 16, epochs: 3"
ROW += ", augmentation: crop, options: {options}}}\n"


def write_profile(home: Path, *rows: dict) -> None:
    (home / "profiles").mkdir(exist_ok=True)
    lines = [ROW.format(**{"arch": ARCH, "dataset": "scenes", "options": "{batch_size: 8}"} | row) for row in rows]
    (home / "profiles" / "tiny.yaml").write_text(PROFILE + "".join(lines))


def list_artifacts(home: Path) -> list[str]:
    """Folders in the working folder's artifacts, unfinished work included."""
    root = home / "data" / "artifacts"
    return sorted(str(path.relative_to(root)) for path in [*root.glob("*/"), *root.glob(".unfinished/*/")])


def assert_close(history, other, states, other_states):
    """Float32 sums in another order; AdamW turns what is left of vanishing gradients into small steps."""
    columns = history.columns.drop("seconds")
    np.testing.assert_allclose(history[columns], other[columns], rtol=1e-4)
    moved = max((states[max(states)][key] - value).abs().max() for key, value in states[0].items())
    assert moved > 0
    for epoch, state in states.items():
        for key, value in state.items():
            torch.testing.assert_close(value, other_states[epoch][key], rtol=0, atol=0.1 * float(moved))


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def pictures():
    made = scenes.make_scenes(60, size=32, seed=1, progress=False)
    return made["images"], made["labels"]


@pytest.fixture(scope="module")
def two(tmp_path_factory, pictures):
    """What two processes of torchrun printed and made: (lines, working folder, contrastive, refused).

    torchrun's own agent starts them, as forks of this process: they have imported everything.
    """
    home = tmp_path_factory.mktemp("two")
    write_profile(home, dict(id="mae", method="mae"), dict(id="dino", method="dino"))
    config = api.LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", start_method="fork", rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(home / "logs"), redirects=Std.OUT),
    )  # fmt: skip
    caught = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    before = [signal.getsignal(number) for number in caught]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIA_HOME", str(home))
        patch.delenv("MIA_DATA_DIR", raising=False)
        patch.delenv("MIA_ARTIFACTS", raising=False)
        try:
            api.elastic_launch(config, work)(home, pictures[0])
        finally:
            for number, handler in zip(caught, before, strict=True):
                signal.signal(number, handler)
    lines = [line for path in sorted(home.rglob("stdout.log")) for line in path.read_text().splitlines()]
    return lines, home, *pickle.loads((home / "out.pkl").read_bytes())


def test_two_processes_train_the_models_of_one_and_write_one_artifact(two, home):
    lines, other, *_ = two
    write_profile(home, dict(id="mae", method="mae"), dict(id="dino", method="dino"))
    profile = profiles.load("tiny")
    folders = [train.train_row(profile, profile.row(name), progress=False) for name in ("mae", "dino")]
    assert [line.split(" (")[0] for line in lines] == [
        f"{name}: {folder.name}" for name, folder in zip(("mae", "dino"), folders, strict=True)
    ]
    assert list_artifacts(other) == list_artifacts(home) == sorted([".unfinished", *(f.name for f in folders)])
    for folder in folders:
        one, both = train.load_run(folder), train.load_run(other / "data" / "artifacts" / folder.name)
        assert "probe" in one.history and one.settings == both.settings
        assert_close(one.history.drop(columns=["knn", "probe"]), both.history, one.states, both.states)
        assert np.abs(one.utility["knn"] - both.utility["knn"]) < 0.05  # neighbors at one distance may change places


@pytest.fixture(scope="module")
def one(pictures):
    return fit_contrastive(pictures[0])


@pytest.mark.parametrize("method", CONTRASTIVE)
def test_two_processes_contrast_with_the_images_of_both(two, one, method):
    """Negatives, the positive's place among them, the gradient through both, and the order in which keys are queued."""
    history, states = two[2][method]
    assert_close(one[method].history, history, one[method].states, states)


def test_two_processes_resume_inside_an_epoch_from_what_the_first_has_written(two, pictures):
    whole, (history, states) = pretrain.fit("mae", pictures[0][:24], epochs=2, batch_size=8, **TINY), two[2]["resumed"]
    assert_close(whole.history, history, whole.states, states)


def test_what_processes_cannot_share_is_refused(two):
    uneven, private = two[3]
    assert uneven.startswith("expected a batch that 2 processes share equally, got 7 images: set batch_size")
    assert private == "private training runs in one process, got 2: start it without torchrun"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", RANK="0").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="one GPU for each of the 4 processes on this machine, got 1: start fewer"):
        distributed.launch()


def test_under_slurm_without_torchrun_there_is_one_process(monkeypatch, pictures):
    plain = pretrain.fit("mae", pictures[0][:8], epochs=1, **TINY)
    for name, value in dict(SLURM_NTASKS="2", SLURM_JOB_NAME="job", SLURM_JOB_ID="1", SLURM_PROCID="1").items():
        monkeypatch.setenv(name, value)
    assert (distributed.count(), distributed.get_rank(), distributed.share("mine")) == (1, 0, "mine")
    run = pretrain.fit("mae", pictures[0][:8], epochs=1, **TINY)
    assert all(torch.equal(value, run.states[1][key]) for key, value in plain.states[1].items())


DRAWS = {
    "random": lambda rng, n: rng.random((n, 3), dtype=np.float32),
    "uniform": lambda rng, n: rng.uniform(2, 5, (n, 2, 2)),
    "integers": lambda rng, n: rng.integers(0, 9, n),
    "normal": lambda rng, n: rng.normal(1, 2, (n, 3)),
    "beta": lambda rng, n: rng.beta(0.4, 0.4, n),
    "choice": lambda rng, n: rng.choice(20, n, replace=True),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_draws_of_all_processes_are_those_of_one(name):
    draw = DRAWS[name]
    whole = seeds.rng(3, "step")
    expected = [draw(whole, 6) for _ in range(2)]  # the second draw shows that the streams stay together
    parts = [seeds.RowGenerator(seeds.rng(3, "step"), 6, slice(start, start + 2)) for start in (0, 2, 4)]
    for values in expected:
        np.testing.assert_array_equal(values, np.concatenate([draw(part, 2) for part in parts]))


def test_partners_are_drawn_among_the_rows_of_a_process_and_a_wrong_number_of_rows_is_refused():
    part = seeds.RowGenerator(seeds.rng(3, "step"), 6, slice(4, 6))
    assert sorted(part.permutation(2)) == [0, 1]
    assert len(part.choice(4, 2, replace=False)) == 2  # the whole batch of 6 does not fit among 4
    with pytest.raises(ValueError, match="expected draws for the 2 rows of this process, got size 6"):
        part.random(6)


# ---------------------------------------------------------------------------------------------- killed and resumed


def test_a_process_killed_inside_an_epoch_resumes_at_the_step_to_the_same_weights(tmp_path, pictures, monkeypatch):
    images, settings = pictures[0][:24], dict(epochs=3, batch_size=8, **TINY)
    path = tmp_path / "resume.pt"

    def train():
        def kill(self, progress):
            if round(progress * 9) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        mae.MAE.after_step = kill
        pretrain.fit("mae", images, resume_path=path, save_every=0, **settings)

    kill_in_child(train)
    assert torch.load(path, weights_only=True)["step"] == 4  # of 9, in the second of 3 epochs
    whole, steps = pretrain.fit("mae", images, **settings), []
    monkeypatch.setattr(mae.MAE, "after_step", lambda self, progress: steps.append(round(progress * 9)))
    resumed = pretrain.fit("mae", images, resume_path=path, **settings)
    assert steps == [5, 6, 7, 8, 9]
    for epoch, state in whole.states.items():
        assert all(torch.equal(value, resumed.states[epoch][key]) for key, value in state.items())
    assert whole.history.drop(columns="seconds").equals(resumed.history.drop(columns="seconds"))


@pytest.mark.parametrize("stop", [3, 4])  # at the end of an epoch, and inside one
def test_a_streamed_training_resumes_at_its_step(tmp_path, pictures, stop):
    settings = dict(epochs=2, batch_size=8, **TINY)
    whole = pretrain.fit("mae", pictures[0][:24], **settings)
    for stop_after in (stop, None):
        images = Lazy(pictures[0][:24], [])
        run = pretrain.fit("mae", images, resume_path=tmp_path / "r.pt", stop_after=stop_after, **settings)
    assert all(torch.equal(value, run.states[2][key]) for key, value in whole.states[2].items())


# ---------------------------------------------------------------------------------------------- streamed


class Lazy:
    """Images that are decoded by ``np.asarray``; ``decoded`` notes how many at a time."""

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(self, array: np.ndarray, decoded: list[int]):
        self.array, self.decoded = array, decoded

    shape = property(lambda self: self.array.shape)

    def __len__(self):
        return len(self.array)

    def __getitem__(self, rows):
        return Lazy(self.array[rows], self.decoded)

    def __array__(self, dtype=None, copy=None):
        self.decoded.append(len(self))
        return self.array.copy()


@pytest.mark.parametrize(("method", "options"), [("mae", {}), ("simclr", {}), ("supervised", {"drop_path": 0.3})])
def test_streamed_images_train_the_same_weights_and_are_never_decoded_at_once(pictures, method, options):
    images, labels = pictures
    settings = dict(labels=labels[:24], heldout_labels=labels[24:40], epochs=2, batch_size=8, **TINY, **options)
    whole, decoded = pretrain.fit(method, images[:24], heldout=images[24:40], **settings), []
    streamed = pretrain.fit(method, Lazy(images[:24], decoded), heldout=Lazy(images[24:40], decoded), **settings)
    assert whole.history.drop(columns="seconds").equals(streamed.history.drop(columns="seconds"))
    assert all(torch.equal(value, streamed.states[2][key]) for key, value in whole.states[2].items())
    assert max(decoded) == 8


def test_a_memory_map_is_streamed_too(pictures, tmp_path):
    np.save(tmp_path / "images.npy", pictures[0])
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    assert isinstance(inputs.place(images, torch.device("cpu")), inputs.Streamed)
    rows, batch = next(inputs.read(inputs.place(images, torch.device("cpu")), [np.array([5, 2])]))
    assert torch.equal(batch, torch.from_numpy(pictures[0][rows]).permute(0, 3, 1, 2))


def test_a_few_batches_are_decoded_ahead_and_no_more_after_the_end(pictures):
    decoded = []
    batches = inputs.read(
        inputs.Streamed(Lazy(pictures[0], decoded), torch.device("cpu")), (slice(i, i + 2) for i in range(0, 48, 2))
    )
    for _ in range(3):
        next(batches)
    batches.close()  # waits for its thread
    assert 3 <= len(decoded) <= 3 + inputs.AHEAD


def test_a_file_that_cannot_be_decoded_stops_the_training_with_its_message(pictures):
    class Broken(Lazy):
        def __getitem__(self, rows):
            raise ValueError("x.png is no image")

    with pytest.raises(ValueError, match="x.png is no image"):
        pretrain.fit("mae", Broken(pictures[0], []), epochs=1, **TINY)


def test_a_row_on_a_streamed_folder_trains_the_weights_of_the_folder_in_memory(home, pictures):
    for i, image in enumerate(pictures[0]):
        folder = home / "pictures" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:02}.png")
    states = []
    for stream in ("", ", stream: true"):
        name = f"folder:{home / 'pictures'}"
        write_profile(home, dict(id="mae", method="mae", dataset=f'"{name}"'))
        path = home / "profiles" / "tiny.yaml"
        path.write_text(path.read_text().replace("scenes: {size: 32, n: 160}", f'"{name}": {{size: 32{stream}}}'))
        profile = profiles.load("tiny")
        states.append(train.load_run(train.train_row(profile, profile.row("mae"), progress=False)).states)
    assert len(list_artifacts(home)) == 3  # two, and .unfinished
    assert all(torch.equal(value, states[1][3][key]) for key, value in states[0][3].items())


# ---------------------------------------------------------------------------------------------- half precision


@pytest.mark.parametrize("method", ["mae", "simmim", "dino", "moco", "moco-v1", "moco-v2", "simclr", "supervised"])
def test_every_method_takes_steps_in_half_precision(pictures, method):
    options = {"queue_size": 4} if method.startswith("moco-v") else {}
    settings = dict(labels=pictures[1][:8], epochs=2, checkpoints=[], **TINY, **options)
    full = pretrain.fit(method, pictures[0][:8], **settings)
    half = pretrain.fit(method, pictures[0][:8], precision="bf16-mixed", **settings)
    assert half.settings == full.settings | {"precision": "bf16-mixed"}  # a resume state of one is not the other's
    assert half.history.loss_members[0] == full.history.loss_members[0]  # measured in float32
    assert np.isfinite(half.history.loss_members).all()
    assert all(value.dtype == full.states[2][key].dtype for key, value in half.states[2].items())
    gaps = [(value - full.states[2][key]).abs().max() for key, value in half.states[2].items()]
    assert 0 < max(gaps) < 6e-3  # it was used; two steps of AdamW, each of at most lr in either direction


def test_a_segmenter_takes_a_step_in_half_precision(pictures):
    masks = (pictures[0][:4, :, :, 0] > 128).astype(np.uint8)
    settings = dict(labels=masks, arch="mobilenet_v2", epochs=1, checkpoints=[], progress=False)
    precisions = ("32-true", "bf16-mixed")
    full, half = (pretrain.fit("unet", pictures[0][:4], precision=p, **settings) for p in precisions)
    assert np.isfinite(half.history.loss_members).all()
    assert any(not torch.equal(value, half.states[1][key]) for key, value in full.states[1].items())


def test_views_and_contrasts_stay_float32_in_half_precision(pictures):
    images = torch.from_numpy(pictures[0][:8]).permute(0, 3, 1, 2)
    q, k = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    compute = lambda: (  # noqa: E731
        inputs.augment(images, size=24, rng=seeds.rng(0, "x"), scale=(0.2, 1.0), jitter=0.8),
        moco.compute_contrast(q, k, 0.2),
    )
    expected = compute()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (q @ k.T).dtype == torch.bfloat16
        for a, b in zip(expected, compute(), strict=True):
            assert torch.equal(a, b)


def test_the_contrast_with_more_keys_than_queries_takes_the_named_ones_as_positives():
    q, k = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.randn(9, 8)
    whole = [float(moco.compute_contrast(q[i : i + 1], k, 0.2, first=4 + i)) for i in range(3)]
    assert float(moco.compute_contrast(q, k, 0.2, first=4)) == pytest.approx(np.mean(whole), abs=1e-6)
    s = (q[0] @ k.T / q[0].norm() / k.norm(dim=1) / 0.2).double()
    assert whole[0] == pytest.approx(2 * 0.2 * float(torch.logsumexp(s, 0) - s[4]), abs=1e-5)


def test_the_precision_of_a_row_is_part_of_its_model_s_identity(home):
    write_profile(
        home,
        dict(id="full", method="mae"),
        dict(id="half", method="mae", options="{batch_size: 8, precision: bf16-mixed}"),
    )
    profile = profiles.load("tiny")
    names = [artifacts.name_of(train.spec_of(profile, row)) for row in profile.models]
    assert names[0] != names[1]
    run = train.load_run(train.train_row(profile, profile.row("half"), progress=False))
    assert run.settings["precision"] == "bf16-mixed" and "precision" not in run.settings["options"]
    assert run.encoder.module.norm.weight.dtype == torch.float32


def test_an_unknown_precision_is_refused(pictures):
    with pytest.raises(ValueError, match="expected precision one of 32-true, bf16-mixed, 16-mixed, got 'bf16-true'"):
        pretrain.fit("mae", pictures[0][:8], epochs=1, precision="bf16-true", **TINY)
