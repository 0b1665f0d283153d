"""The only training loop: every encoder of the book is trained here.

The data set lives on the device as uint8 (or is streamed from disk) and is augmented there in batches. Every step draws
from its own named stream, so a training that was killed continues, at the very step, with the numbers it would have
seen.

Several processes (``torchrun``) take equal parts of every batch and draw the numbers of the whole one, so that they
train the model a single process would have trained. Two things differ: batch norm on a CPU uses each process's own part
(on CUDA it is synchronized), and segmenters average over the valid pixels of each part.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from safetensors.torch import load_file, save_file
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from tqdm import tqdm

from mia_utils import pretrain, seeds
from mia_utils.models import encoders, outputs, segmenters
from mia_utils.models.encoders import Encoder
from mia_utils.models.segmenters import Segmenter
from mia_utils.pretrain import distributed, inputs

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
WRITING = 0.05  # share of the time that may go into writing the resume state, however large it is


@dataclass
class Run:
    """A finished training.

    Attributes:
        method, arch: what was trained.
        states: epoch -> weights (``backbone.*``, and ``decoder.*`` of masked-image models); 0 is the initial state,
            the largest is the final one.
        history: DataFrame with epoch, loss_members, loss_heldout, lr, seconds.
        settings: everything that was passed to ``fit``.
        seconds: training time.
    """

    method: str
    arch: str
    states: dict[int, dict[str, Tensor]]
    history: pd.DataFrame
    settings: dict
    seconds: float = 0.0
    utility: dict = field(default_factory=dict)

    @property
    def checkpoints(self) -> list[int]:
        """Epochs whose weights were kept, ascending."""
        return sorted(self.states)

    def _get_state(self, epoch: int | None) -> dict[str, Tensor]:
        epoch = self.checkpoints[-1] if epoch is None else epoch
        if epoch not in self.states:
            raise ValueError(f"no checkpoint of epoch {epoch}: kept are {', '.join(map(str, self.checkpoints))}")
        return self.states[epoch]

    def encoder_at(self, epoch: int | None = None) -> Encoder | Segmenter:
        """Return the encoder (segmenter) as it was after ``epoch`` (None: the end; 0: before training)."""
        state = self._get_state(epoch)
        method = pretrain.METHODS[self.method][0]
        if hasattr(method, "restore"):
            name = self.method if epoch is None else f"{self.method}@{epoch}"
            return method.restore(state, arch=self.arch, name=name, **self.settings["options"])
        module = encoders.make_backbone(self.arch)
        module.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
        name = self.method if epoch is None else f"{self.method}@{epoch}"
        view = _get_input(self.settings.get("options", {}))
        return encoders.from_module(module, arch=self.arch, method=self.method, name=name, **view)

    def autoencoder_at(self, epoch: int | None = None) -> nn.Module | None:
        """Return encoder and decoder together (``reconstruct``), None where the method has no decoder."""
        state = self._get_state(epoch)
        if not hasattr(pretrain.METHODS[self.method][0], "reconstruct"):
            return None
        method = pretrain.build(self.method, self.arch, seed=self.settings["seed"], **self.settings.get("options", {}))
        method.load_state_dict(state, strict=False)  # the state holds all of backbone and decoder, nothing else
        return method.eval()

    @property
    def encoder(self) -> Encoder:
        """The final encoder."""
        return self.encoder_at()

    @property
    def decoder(self) -> nn.Module | None:
        """The final autoencoder of a masked-image model, else None."""
        return self.autoencoder_at()

    def save(self, folder: str | Path) -> Path:
        """Write encoder.safetensors (the final encoder alone), one file per checkpoint and history.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for epoch, state in self.states.items():
            save_file({k: v.contiguous() for k, v in state.items()}, str(folder / f"epoch-{epoch:06d}.safetensors"))
        final = self.encoder
        if isinstance(final, Segmenter):
            segmenters.save(final, folder / "segmenter.safetensors")
        else:
            encoders.save(final, folder / "encoder.safetensors")
        self.history.to_csv(folder / "history.csv", index=False)
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, settings: dict, seconds: float = 0.0, utility: dict | None = None) -> Run:
        """Read what ``save`` wrote; ``settings`` as passed to ``fit`` (artifacts keep them in meta.json)."""
        folder = Path(folder)
        files = sorted(folder.glob("epoch-*.safetensors"))
        states = {int(file.stem.split("-")[1]): load_file(str(file)) for file in files}
        history = pd.read_csv(folder / "history.csv")
        return cls(settings["method"], settings["arch"], states, history, settings, seconds, utility or {})


def _export(method: nn.Module) -> dict[str, Tensor]:
    state = method.state_dict()
    return {k: v.detach().cpu().clone() for k, v in state.items() if k.startswith(("backbone.", "decoder."))}


def _get_input(options: dict) -> dict:
    """Of a method's options, those that say what the encoder sees."""
    return {key: options[key] for key in ("input_size", "mean", "std") if key in options}


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _set_training(method: nn.Module) -> None:
    """Training mode; a frozen encoder stays in eval mode."""
    method.train()
    if not any(p.requires_grad for p in method.backbone.parameters()):
        method.backbone.eval()


def _pick_epochs(epochs: int, checkpoints: Sequence[int] | None) -> list[int]:
    if checkpoints is None:  # evenly in the logarithm: most happens early
        checkpoints = [round(epochs * share) for share in (0.02, 0.05, 0.1, 0.2, 0.5)]
    wrong = [e for e in checkpoints if not 0 <= e <= epochs]
    if wrong:
        raise ValueError(f"checkpoints {wrong} lie outside 0..{epochs} epochs")
    return sorted({0, *checkpoints, epochs})


def _measure_loss(
    method: nn.Module,
    images: Tensor | inputs.Streamed,
    labels: Tensor | None,
    size: int,
    augmentation: str,
    batch_size: int,
) -> float:
    """Mean loss in eval mode, in float32, with views that are the same at every call.

    Members and strangers are cut into whole batches of one size: a contrastive loss grows with its batch. So every
    process measures them all.
    """
    method.eval()
    losses, rng = [], seeds.rng(0, "measure-loss")
    starts = range(0, max(len(images) - batch_size, 0) + 1, batch_size)
    with torch.no_grad():
        for rows, batch in inputs.read(images, (slice(start, start + batch_size) for start in starts)):
            extra = {} if labels is None else {"labels": labels[rows]}
            loss = method.loss(batch, augmentation=augmentation, size=size, rng=rng, progress=1.0, **extra)
            losses.append(float(loss))
    _set_training(method)
    return sum(losses) / len(losses)


def _prepare_privacy(
    method: str, cls: type, privacy: dict, options: dict, *, encoder: Encoder | None, precision: str
) -> dict:
    """Refuse what can't be trained with privacy; returns the options it is trained with."""
    known = ("epsilon", "noise_multiplier", "delta", "max_grad_norm")
    if not isinstance(privacy, dict) or set(privacy) - set(known):
        raise ValueError(f"expected privacy a mapping of {', '.join(known)}, got {privacy!r}")
    outputs.refuse_coupled(method, cls, options)
    if encoder is not None:
        raise ValueError("privacy= goes with a whole training: a decoder over a frozen encoder= is the attacker's own")
    if precision != "32-true":
        raise ValueError(f"private training needs precision '32-true', got {precision!r}")
    return {**options, "norm": "group"} if method in segmenters.METHODS else options


def fit(
    method: str,
    images: np.ndarray,
    *,
    arch: str | None = None,
    epochs: int,
    seed: int = 0,
    encoder: Encoder | None = None,
    labels: np.ndarray | None = None,
    heldout: np.ndarray | None = None,
    heldout_labels: np.ndarray | None = None,
    augmentation: str | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    warmup: float = 0.05,
    checkpoints: Sequence[int] | None = None,
    resume_path: str | Path | None = None,
    save_every: float = 20.0,
    progress: bool = True,
    device: str | None = None,
    precision: str = "32-true",
    on_checkpoint: Callable[[int, Encoder], dict] | None = None,
    stop_after: int | None = None,
    privacy: dict | None = None,
    reference: np.ndarray | None = None,
    reference_labels: np.ndarray | None = None,
    **options,
) -> Run:
    """Train an encoder.

    Args:
        method: a key of ``pretrain.METHODS``.
        images: (N, H, W, 3) uint8, the members. An array goes onto the device; another array-like (``ImageFiles``, a
            memory map) is streamed: its batches are decoded ahead in a thread, to the same weights.
        arch: backbone, ``encoders.ARCHS`` or a timm name; trained at its own input size. None: that of ``encoder``.
        epochs: passes over the images.
        seed: of weights, order and augmentation (streams of their own; the global random state is not used).
        encoder: start from its weights and leave them as they are: only the decoder of a masked-image model is
            trained (the attacker's own decoder over a target that was released without one).
        labels: (N,) int, for supervised training.
        heldout, heldout_labels: images (M, H, W, 3) that are never trained on, an array or streamed; their loss goes
            into ``history``.
        augmentation: name from ``views.AUGMENTATIONS``; None: the method's own.
        batch_size, lr, weight_decay: None: the method's own (AdamW). A batch is that of all processes together.
        warmup: share of the steps with linear warm-up; a cosine to zero follows.
        checkpoints: epochs whose weights are kept; None: five, evenly in the logarithm. 0 and the end always are.
        resume_path: file that keeps optimizer and step; a killed training goes on from that very step. That of other
            settings is ignored. All processes must see it; process 0 writes it.
        save_every: seconds between two writes of it, more where a write takes long; 0: after every step.
        progress: show a bar.
        device: None: CUDA when there is one, else the CPU.
        precision: ``"32-true"``, or ``"bf16-mixed"`` (``"16-mixed"``): networks in half precision; views, losses,
            weights and what is measured stay float32.
        on_checkpoint: called with (epoch, encoder) at every kept epoch, in process 0; its dict goes into ``history``.
        stop_after: stop after this many steps and return nothing of use (tests of resuming).
        privacy: train with DP-SGD (``pretrain.private``): keyword arguments of ``outputs.plan_privacy``, that is
            ``epsilon`` (or ``noise_multiplier``), ``delta``, ``max_grad_norm``. Batches are then Poisson samples of
            expected size ``batch_size`` (large ones suit it), tokens of a ViT keep their start, batch norm of a
            segmenter becomes group norm. What was reached is printed and kept in ``settings["privacy"]``.
        reference, reference_labels: images (R, H, W, 3) with label maps of the owner that are not trained on, for a
            segmenter's option ``minmax``.
        options: keyword arguments of the method; of every encoder also ``dropout`` and ``drop_path``.

    Returns:
        Run.

    Raises:
        ValueError: wrong shapes, unknown names, a loss that is no longer finite, a training that can't be private, a
            batch that the processes can't share equally.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected images (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if len(images) < 2 or epochs < 1:
        raise ValueError(f"expected at least 2 images and 1 epoch, got {len(images)} and {epochs}")
    if method not in pretrain.METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(pretrain.METHODS)}")
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision one of {', '.join(PRECISIONS)}, got {precision!r}")
    cls, defaults = pretrain.METHODS[method]
    if encoder is not None:
        if not hasattr(cls, "reconstruct"):
            raise ValueError(f"{method} trains the encoder itself: a frozen encoder= goes with mae or simmim")
        if encoder.module is None:
            raise ValueError(f"expected encoder= over a timm backbone, got {encoder.name!r}: a wrapped callable")
        if arch not in (None, encoder.arch):
            raise ValueError(f"encoder {encoder.name!r} is a {encoder.arch}, not a {arch}: leave arch out")
        arch = encoder.arch
        seen = {key: getattr(encoder, f"_{key}").flatten().tolist() for key in ("mean", "std")}
        options = {**options, "input_size": encoder.input_size, **seen}
    if arch is None:
        raise ValueError("expected arch= (a backbone to train) or encoder= (one to keep), got neither")
    supervised = getattr(cls, "needs_labels", False)
    if supervised:
        if labels is None or len(labels) != len(images):
            raise ValueError(f"{method} needs labels for all {len(images)} images")
        both = [np.asarray(x) for x in (labels, heldout_labels) if x is not None]
        if labels.ndim == 3:  # label maps: void is no class
            both = [x[x != segmenters.VOID] for x in both]
        options.setdefault("n_classes", int(max(x.max(initial=0) for x in both)) + 1)
    if privacy is not None:
        options = _prepare_privacy(method, cls, privacy, options, encoder=encoder, precision=precision)
    augmentation = augmentation or defaults["augmentation"]
    batch_size = min(batch_size or defaults["batch_size"], len(images))
    lr, weight_decay = lr or defaults["lr"], defaults["weight_decay"] if weight_decay is None else weight_decay
    kept = _pick_epochs(epochs, checkpoints)
    settings = dict(method=method, arch=arch, epochs=epochs, seed=seed, augmentation=augmentation, lr=lr)
    settings |= dict(
        weight_decay=weight_decay, batch_size=batch_size, warmup=warmup, n_train=len(images), options=options
    )
    if encoder is not None:
        settings["encoder"] = _hash_weights(encoder.module)
    n_batches = max(len(images) // batch_size, 1)
    n_steps = epochs * n_batches
    if privacy is not None:
        plan = outputs.plan_privacy(n_images=len(images), batch_size=batch_size, steps=n_steps, **privacy)
        settings["privacy"] = plan
    if precision != "32-true":
        settings["precision"] = precision
    if privacy is not None and distributed.count() > 1:
        raise ValueError(f"private training runs in one process, got {distributed.count()}: start it without torchrun")
    if batch_size % distributed.count():
        raise ValueError(
            f"expected a batch that {distributed.count()} processes share equally, got {batch_size} images: set batch_size "
            f"to a multiple of {distributed.count()}, or start another number of processes"
        )

    fabric = distributed.launch(device=device, precision=precision)
    model = pretrain.build(method, arch, seed=seed, **options)
    if encoder is not None:
        model.backbone.load_state_dict(encoder.module.state_dict())
        model.backbone.requires_grad_(False)
    if getattr(model, "queue_size", 0) > len(images) // 2:
        raise ValueError(f"expected queue_size up to half of the {len(images)} images, got {model.queue_size}")
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # convolutional networks train half as fast again on a CPU
    if fabric.world_size > 1 and fabric.device.type == "cuda":  # torch has none for CPUs
        model = convert_sync_batchnorm(model)
    size = model.input_size
    if privacy is not None:
        outputs.freeze_tokens(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.ndim > 1]
    groups = [{"params": decay, "weight_decay": weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    fused = precision != "16-mixed"  # whose scaled gradients could not be clipped
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    schedule = CosineWarmupScheduler(optimizer, warmup_epochs=max(int(n_steps * warmup), 1), max_epochs=n_steps + 1)
    _set_training(model)
    wrapped, optimizer = fabric.setup(model, optimizer)
    wrapped.mark_forward_method("loss")

    def to_device(labels: np.ndarray | None) -> Tensor | None:
        if labels is None or not supervised:
            return None
        return torch.from_numpy(np.ascontiguousarray(labels)).long().to(fabric.device)

    data, targets = inputs.place(images, fabric.device), to_device(labels)
    outside = None if heldout is None else inputs.place(heldout, fabric.device)
    outside_targets = to_device(heldout_labels)
    if reference is not None:
        model.reference = inputs.to_tensor(np.asarray(reference), fabric.device), to_device(reference_labels)
    private = None
    if privacy is not None:
        from mia_utils.pretrain.privacy import PrivateSteps  # opacus takes seconds to import

        private = PrivateSteps(model, optimizer, plan, images=data, labels=targets, seed=seed)
        print(outputs.describe_privacy(plan), flush=True)
    states: dict[int, dict[str, Tensor]] = {}
    history: list[dict] = []
    step, spent = 0, 0.0
    resume_path = Path(resume_path) if resume_path else None
    if distributed.share(resume_path is not None and resume_path.is_file()):
        if not resume_path.is_file():
            raise ValueError(f"process {distributed.get_rank()} does not see {resume_path}: put it where all machines can")
        saved = torch.load(resume_path, map_location=fabric.device, weights_only=True)
        if saved.get("settings") == repr(settings):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
            fabric.strategy.precision.load_state_dict(saved.get("scaler", {}))
            # files of earlier versions count whole epochs
            step = saved["step"] if "step" in saved else saved["epoch"] * n_batches
            states, history, spent = saved["states"], saved["history"], saved["seconds"]
            states = {int(k): {n: w.cpu() for n, w in v.items()} for k, v in states.items()}

    def record(epoch: int) -> None:
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "seconds": spent + time.perf_counter() - began}
        n = batch_size if outside is None else min(batch_size, len(outside))
        row["loss_members"] = _measure_loss(model, data, targets, size, augmentation, n)
        if outside is not None:
            row["loss_heldout"] = _measure_loss(model, outside, outside_targets, size, augmentation, n)
        if epoch in kept:
            states[epoch] = _export(model)
            if on_checkpoint is not None and fabric.is_global_zero:
                if hasattr(model, "as_segmenter"):
                    face = model.as_segmenter()
                else:
                    face = encoders.from_module(model.backbone, arch=arch, method=method, **_get_input(options))
                row |= on_checkpoint(epoch, face)
                _set_training(model)
        history.append(distributed.share(row))

    def store(step: int) -> None:
        content = dict(settings=repr(settings), model=model.state_dict(), optimizer=optimizer.state_dict())
        content |= dict(schedule=schedule.state_dict(), states=states, history=history, step=step)
        content |= dict(scaler=fabric.strategy.precision.state_dict(), seconds=spent + time.perf_counter() - began)
        temporary = resume_path.with_suffix(".writing")
        torch.save(content, temporary)
        os.replace(temporary, resume_path)

    cuda = [fabric.device.index] if fabric.device.type == "cuda" else []
    n_rows = batch_size // fabric.world_size
    own = slice(fabric.global_rank * n_rows, (fabric.global_rank + 1) * n_rows)

    def draw_batches(first: int) -> Iterator[np.ndarray]:
        """This process's rows of every batch, from step ``first`` on."""
        for step in range(first, n_steps):
            epoch, index = divmod(step, n_batches)
            if step == first or index == 0:
                order = seeds.rng(seed, "train-order", epoch).permutation(len(images))
            yield order[index * batch_size : (index + 1) * batch_size][own]

    def take(step: int, rows: np.ndarray, batch: Tensor) -> Tensor:
        """Take a step; returns the loss."""
        rng = seeds.rng(seed, "train-views", step, 0)
        if fabric.world_size > 1:
            rng = seeds.RowGenerator(rng, batch_size, own)
        extra = {} if targets is None else {"labels": targets[rows]}
        with torch.random.fork_rng(devices=cuda):  # dropout and drop-path draw from the global state: lend them one
            torch.manual_seed(seeds.derive(seed, "train-dropout", step, fabric.global_rank))
            with fabric.autocast():
                loss = wrapped.loss(
                    batch, augmentation=augmentation, size=size, rng=rng, progress=step / n_steps, **extra
                )
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        if "clip" in defaults:
            fabric.clip_gradients(wrapped, optimizer, max_norm=defaults["clip"])
        optimizer.step()
        return loss.detach()

    def take_privately(step: int) -> Tensor:
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(seeds.derive(seed, "train-dropout", step, 0))
            return private.take(step, augmentation=augmentation, size=size, progress=step / n_steps)

    began = last_saved = time.perf_counter()
    pause = save_every
    logged = set(np.unique(np.geomspace(1, epochs, 24).round().astype(int)).tolist()) | set(kept)
    if step == 0 and not history:
        record(0)
    bar = tqdm(
        total=epochs,
        initial=step // n_batches,
        unit="epoch",
        desc=method,
        disable=not progress or not fabric.is_global_zero,
    )
    batches = inputs.read(data, draw_batches(step)) if private is None else None
    while step < n_steps:
        loss = take(step, *next(batches)) if private is None else take_privately(step)
        step += 1
        schedule.step()
        model.after_step(step / n_steps)
        epoch, rest = divmod(step, n_batches)
        if rest == 0:
            if not math.isfinite(value := float(fabric.all_reduce(loss))):
                raise ValueError(f"the {method} loss is {value} after epoch {epoch}: lower lr (now {lr:g})")
            bar.update()
            if epoch in logged:
                record(epoch)
        stopped = stop_after is not None and step >= stop_after
        if resume_path and fabric.is_global_zero and (stopped or time.perf_counter() - last_saved > pause):
            writing = time.perf_counter()
            store(step)
            last_saved = time.perf_counter()
            pause = max(save_every, (last_saved - writing) / WRITING) if save_every else 0.0
        if stopped:
            break
    bar.close()
    if private is not None:
        private.close()
    seconds = spent + time.perf_counter() - began
    return Run(method, arch, states, pd.DataFrame(history), settings, seconds)
