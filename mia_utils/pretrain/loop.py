"""The only training loop: every encoder and segmenter of the book is trained here.

Every step draws from its own named stream, so a killed training continues with the numbers it would have seen. Several
processes (``torchrun``) take equal parts of every batch and draw the numbers of the whole one: together they train the
model of a single one, but batch norm on a CPU and the valid pixels of segmenters are those of each process's own part.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lightly.utils.scheduler import CosineWarmupScheduler
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from tqdm import tqdm

from mia_utils import seeds
from mia_utils.models import segmenters
from mia_utils.models.encoders import Encoder
from mia_utils.pretrain import accounting, distributed, inputs, registry
from mia_utils.pretrain.run import ResumeFile, Run, open_encoder

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
WRITING = 0.05  # share of the time that may go into writing the resume state, however large it is
RECORDS = 24  # rows of history, evenly in the logarithm of the epoch: most happens early


def fit(
    method: str, images: np.ndarray, *, arch: str | None = None, epochs: int, seed: int = 0,
    encoder: Encoder | None = None, labels: np.ndarray | None = None, heldout: np.ndarray | None = None,
    heldout_labels: np.ndarray | None = None, augmentation: str | None = None, batch_size: int | None = None,
    lr: float | None = None, weight_decay: float | None = None, warmup: float = 0.05,
    checkpoints: Sequence[int] | None = None, resume_path: str | Path | None = None, save_every: float = 20.0,
    progress: bool = True, device: str | None = None, precision: str = "32-true", stop_after: int | None = None,
    on_checkpoint: Callable[[int, Encoder], dict] | None = None, privacy: dict | None = None,
    reference: np.ndarray | None = None, reference_labels: np.ndarray | None = None, **options,
) -> Run:  # fmt: skip
    """Train an encoder or a segmenter.

    Args:
        method: a key of ``pretrain.METHODS``; ``augmentation``, ``batch_size`` (that of all processes together), ``lr``
            and ``weight_decay`` (AdamW) are its own where they are None.
        images: (N, H, W, 3) uint8, the members; anything but an array in memory is streamed, to the same weights.
        arch: backbone, ``encoders.ARCHS`` or a timm name; trained at its own input size. None: that of ``encoder``.
        seed: of weights, order and augmentation; the global random state is not used.
        encoder: keep its weights and train only the decoder of a masked-image model over it (the attacker's decoder).
        labels: (N,) int, for supervised training; (N, H, W) for segmenters.
        heldout, heldout_labels: images (M, H, W, 3) that are never trained on; their loss goes into ``history``.
        warmup: share of the steps with linear warm-up; a cosine to zero follows.
        checkpoints: epochs whose weights are kept beside 0 and the end; None: five, evenly in the logarithm.
        resume_path: file from which a killed training goes on at its very step; written every ``save_every`` seconds
            (0: after every step), less often where that takes long.
        device: None: CUDA when there is one, else the CPU.
        precision: of the networks; views, losses, weights and what is measured stay float32.
        stop_after: stop after this many steps (tests of resuming).
        on_checkpoint: called with (epoch, encoder) at every kept epoch, in process 0; its dict goes into ``history``.
        privacy: train with DP-SGD: arguments of ``accounting.plan_privacy``; batches are then Poisson samples, tokens
            of a ViT keep their start, a segmenter has group norm.
        reference, reference_labels: images (R, H, W, 3) and label maps outside the members, for option ``minmax``.
        options: keyword arguments of the method; of every encoder also ``dropout`` and ``drop_path``.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"expected images (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
    if len(images) < 2 or epochs < 1:
        raise ValueError(f"expected at least 2 images and 1 epoch, got {len(images)} and {epochs}")
    cls, defaults = registry.get(method)
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision one of {', '.join(PRECISIONS)}, got {precision!r}")
    if encoder is not None:
        arch, options = _freeze(encoder, method, arch, options)
    if arch is None:
        raise ValueError("expected arch= (a backbone to train) or encoder= (one to keep), got neither")
    if supervised := getattr(cls, "needs_labels", False):
        if labels is None or len(labels) != len(images):
            raise ValueError(f"{method} needs labels for all {len(images)} images")
        both = [np.asarray(x) for x in (labels, heldout_labels) if x is not None]
        if labels.ndim == 3:  # label maps: void is no class
            both = [x[x != segmenters.VOID] for x in both]
        options.setdefault("n_classes", int(max(x.max(initial=0) for x in both)) + 1)
    n_processes = distributed.count()
    if privacy is not None:
        accounting.refuse(method, cls, privacy, options, precision=precision, frozen=encoder is not None)
        options = {**options, "norm": "group"} if method in segmenters.ARCHS else options
        if n_processes > 1:
            raise ValueError(f"private training runs in one process, got {n_processes}: start it without torchrun")

    # what identifies the training: kept in the run, compared before a killed one is continued
    augmentation = augmentation or defaults["augmentation"]
    batch_size = min(batch_size or defaults["batch_size"], len(images))
    lr, weight_decay = lr or defaults["lr"], defaults["weight_decay"] if weight_decay is None else weight_decay
    kept = _pick_epochs(epochs, checkpoints)
    settings = dict(method=method, arch=arch, epochs=epochs, seed=seed, augmentation=augmentation, lr=lr)
    settings |= dict(weight_decay=weight_decay, batch_size=batch_size, warmup=warmup, n_train=len(images))
    settings["options"] = options
    n_batches = max(len(images) // batch_size, 1)
    n_steps = epochs * n_batches
    if encoder is not None:
        settings["encoder"] = _hash_weights(encoder.module)
    if privacy is not None:
        plan = accounting.plan_privacy(n_images=len(images), batch_size=batch_size, steps=n_steps, **privacy)
        settings["privacy"] = plan
    if precision != "32-true":
        settings["precision"] = precision
    if batch_size % n_processes:
        message = f"expected a batch that {n_processes} processes share equally, got {batch_size} images"
        raise ValueError(f"{message}: set batch_size to a multiple of {n_processes}")

    # model and optimizer
    fabric = distributed.launch(device=device, precision=precision)
    model = registry.build(method, arch, seed=seed, **options)
    if encoder is not None:
        model.backbone.load_state_dict(encoder.module.state_dict())
        model.backbone.requires_grad_(False)
    if getattr(model, "queue_size", 0) > len(images) // 2:
        raise ValueError(f"expected queue_size up to half of the {len(images)} images, got {model.queue_size}")
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)  # convolutional networks train half as fast again on a CPU
    if n_processes > 1 and fabric.device.type == "cuda" and getattr(model, "bn_splits", 1) == 1:
        model = convert_sync_batchnorm(model)  # torch has none for CPUs
    if privacy is not None:
        from mia_utils.pretrain import privacy as dp  # opacus takes seconds to import

        dp.freeze_tokens(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay}]
    groups += [{"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}]
    fused = precision != "16-mixed"  # whose scaled gradients could not be clipped
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
    schedule = CosineWarmupScheduler(optimizer, warmup_epochs=max(int(n_steps * warmup), 1), max_epochs=n_steps + 1)
    _set_training(model)
    wrapped, optimizer = fabric.setup(model, optimizer)
    wrapped.mark_forward_method("loss")

    # data on the device
    def place(images: np.ndarray, labels: np.ndarray | None) -> tuple[Tensor | inputs.Streamed, Tensor | None]:
        if labels is None or not supervised:
            return inputs.place(images, fabric.device), None
        labels = torch.from_numpy(np.ascontiguousarray(labels)).long()
        return inputs.place(images, fabric.device), labels.to(fabric.device)

    sides = {"loss_members": place(images, labels)}
    if heldout is not None:
        sides["loss_heldout"] = place(heldout, heldout_labels)
    if reference is not None:
        model.reference = place(np.asarray(reference), reference_labels)
    (data, targets), private = sides["loss_members"], None
    if privacy is not None:
        private = dp.PrivateSteps(model, optimizer, plan, images=data, labels=targets, seed=seed)
        print(accounting.describe_privacy(plan), flush=True)

    # where it stands
    step, spent, history, states = 0, 0.0, [], {}
    resume = None
    if resume_path:  # the same settings on other images are another training
        seen, some = hashlib.blake2b(digest_size=8), images[:: max(len(images) // 64, 1)]
        for start in range(0, len(some), batch_size):  # streamed images are never decoded all at once
            seen.update(np.ascontiguousarray(some[start : start + batch_size]))
        resume = ResumeFile(resume_path, settings | {"images": seen.hexdigest()})
    if resume and (saved := resume.read(model, fabric.device)):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        fabric.strategy.precision.load_state_dict(saved["scaler"])
        step, history, spent = saved["step"], saved["history"], saved["seconds"]
        states = {int(epoch): {k: w.cpu() for k, w in state.items()} for epoch, state in saved["states"].items()}
    began = last_saved = time.perf_counter()
    view = dict(augmentation=augmentation, size=model.input_size)

    def record(epoch: int) -> None:
        """Add a row to the history, and the weights of a kept epoch to the states."""
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"], "seconds": spent + time.perf_counter() - began}
        n = min(batch_size, *(len(x) for x, _ in sides.values()))  # of one size: a contrastive loss grows with it
        row |= {name: _measure_loss(model, x, y, n, **view) for name, (x, y) in sides.items()}
        if epoch in kept:
            weights = model.state_dict().items()
            states[epoch] = {k: w.detach().cpu().clone() for k, w in weights if k.startswith(("backbone.", "decoder."))}
            if on_checkpoint is not None and fabric.is_global_zero:
                segments = hasattr(model, "as_segmenter")
                face = model.as_segmenter() if segments else open_encoder(model.backbone, method, arch, options)
                row |= on_checkpoint(epoch, face)
                _set_training(model)
        history.append(distributed.share(row))

    # this process's rows of a batch, and its steps
    n_rows = batch_size // n_processes
    own = slice(fabric.global_rank * n_rows, (fabric.global_rank + 1) * n_rows)

    def draw_batches(first: int) -> Iterator[np.ndarray]:
        for step in range(first, n_steps):
            epoch, index = divmod(step, n_batches)
            if step == first or index == 0:
                order = seeds.rng(seed, "train-order", epoch).permutation(len(images))
            yield order[index * batch_size : (index + 1) * batch_size][own]

    def take(step: int) -> Tensor:
        """Take a step; returns the loss."""
        if private is not None:
            return private.take_on(private.draw_batch(step), step, progress=step / n_steps, **view)
        rows, batch = next(batches)
        rng = seeds.rng(seed, "train-views", step, 0)
        if n_processes > 1:
            rng = seeds.RowGenerator(rng, batch_size, own)
        extra = {} if targets is None else {"labels": targets[rows]}
        with fabric.autocast():
            loss = wrapped.loss(batch, rng=rng, progress=step / n_steps, **view, **extra)
        optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        if "clip" in defaults:
            fabric.clip_gradients(wrapped, optimizer, max_norm=defaults["clip"])
        optimizer.step()
        return loss.detach()

    logged = {*kept, *map(int, np.geomspace(1, epochs, RECORDS).round())}
    if not history:
        record(0)
    batches = inputs.read(data, draw_batches(step)) if private is None else None
    hidden, pause = not progress or not fabric.is_global_zero, save_every
    bar = tqdm(total=epochs, initial=step // n_batches, unit="epoch", desc=method, disable=hidden)
    cuda = [fabric.device.index] if fabric.device.type == "cuda" else []
    while step < n_steps:
        with torch.random.fork_rng(devices=cuda):  # dropout and drop-path draw from the global state
            torch.manual_seed(seeds.derive(seed, "train-dropout", step, fabric.global_rank))
            loss = take(step)
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
        stopped = step == stop_after
        due = stopped or step == n_steps or time.perf_counter() - last_saved > pause
        if resume and fabric.is_global_zero and due:
            writing = time.perf_counter()
            content = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
            content |= dict(scaler=fabric.strategy.precision.state_dict(), step=step, states=states, history=history)
            resume.write(content | {"seconds": spent + writing - began})
            last_saved = time.perf_counter()
            pause = max(save_every, (last_saved - writing) / WRITING) if save_every else 0.0
        if stopped:
            break
    bar.close()
    if private is not None:
        private.close()
    return Run(method, arch, states, pd.DataFrame(history), settings, spent + time.perf_counter() - began)


def _freeze(encoder: Encoder, method: str, arch: str | None, options: dict) -> tuple[str, dict]:
    """Return architecture and options with which a decoder is trained over a frozen encoder."""
    if not hasattr(registry.METHODS[method][0], "reconstruct"):
        raise ValueError(f"{method} trains the encoder itself: a frozen encoder= goes with mae or simmim")
    if encoder.module is None:
        raise ValueError(f"expected encoder= over a timm backbone, got {encoder.name!r}: a wrapped callable")
    if arch not in (None, encoder.arch):
        raise ValueError(f"encoder {encoder.name!r} is a {encoder.arch}, not a {arch}: leave arch out")
    seen = {key: getattr(encoder, f"_{key}").flatten().tolist() for key in ("mean", "std")}
    return encoder.arch, {**options, "input_size": encoder.input_size, **seen}


def _pick_epochs(epochs: int, checkpoints: Sequence[int] | None) -> list[int]:
    if checkpoints is None:  # evenly in the logarithm: most happens early
        checkpoints = [round(epochs * share) for share in (0.02, 0.05, 0.1, 0.2, 0.5)]
    if wrong := [e for e in checkpoints if not 0 <= e <= epochs]:
        raise ValueError(f"checkpoints {wrong} lie outside 0..{epochs} epochs")
    return sorted({0, *checkpoints, epochs})


def _hash_weights(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _set_training(method: nn.Module) -> None:
    """Set training mode; a frozen encoder stays in eval mode."""
    method.train()
    if not any(p.requires_grad for p in method.backbone.parameters()):
        method.backbone.eval()


def _measure_loss(
    method: nn.Module, images: Tensor | inputs.Streamed, labels: Tensor | None, batch_size: int, **view
) -> float:
    """Mean loss of whole batches in eval mode and float32, every process of all, with the same views at every call."""
    method.eval()
    losses, rng = [], seeds.rng(0, "measure-loss")
    starts = range(0, len(images) - batch_size + 1, batch_size)
    with torch.no_grad():
        for rows, batch in inputs.read(images, (slice(start, start + batch_size) for start in starts)):
            extra = {} if labels is None else {"labels": labels[rows]}
            losses.append(float(method.loss(batch, rng=rng, progress=1.0, **view, **extra)))
    _set_training(method)
    return sum(losses) / len(losses)
