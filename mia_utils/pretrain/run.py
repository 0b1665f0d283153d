"""What a training leaves: ``Run`` (checkpoints and history), and while it runs its ``ResumeFile``."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from mia_utils.models import encoders, segmenters
from mia_utils.models.encoders import Encoder
from mia_utils.models.segmenters import Segmenter
from mia_utils.pretrain import distributed, registry

DIGEST_BYTES = 32
INPUT_OPTIONS = ("input_size", "mean", "std")  # of a method's options, those that say what the encoder sees


@dataclass
class Run:
    """A finished training.

    Attributes:
        method, arch: what was trained.
        states: epoch -> weights (``backbone.*``, and ``decoder.*`` of masked-image models), 0 to the final one.
        history: DataFrame with epoch, loss_members, loss_heldout, lr, seconds.
        settings: what it was trained with, as ``fit`` resolved it.
        seconds: training time.
        utility: what the runner measured at the end.
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
        state, options = self._get_state(epoch), self.settings.get("options", {})
        cls, name = registry.METHODS[self.method][0], self.method if epoch is None else f"{self.method}@{epoch}"
        if hasattr(cls, "restore"):
            return cls.restore(state, arch=self.arch, name=name, **options)
        module = encoders.make_backbone(self.arch)
        module.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
        view = {key: options[key] for key in INPUT_OPTIONS if key in options}
        return encoders.from_module(module, arch=self.arch, method=self.method, name=name, **view)

    def autoencoder_at(self, epoch: int | None = None) -> nn.Module | None:
        """Return encoder and decoder together (``reconstruct``), None where the method has no decoder."""
        state = self._get_state(epoch)
        if not hasattr(registry.METHODS[self.method][0], "reconstruct"):
            return None
        settings = {"seed": self.settings["seed"], **self.settings.get("options", {})}
        method = registry.build(self.method, self.arch, **settings)
        method.load_state_dict(state, strict=False)  # the state holds all of backbone and decoder, nothing else
        return method.eval()

    encoder = property(encoder_at, doc="The final encoder (segmenter).")
    decoder = property(autoencoder_at, doc="The final autoencoder of a masked-image model, else None.")

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
        """Read what ``save`` wrote; ``settings`` are those of the run (artifacts keep them in meta.json)."""
        folder = Path(folder)
        files = sorted(folder.glob("epoch-*.safetensors"))
        states = {int(file.stem.split("-")[1]): load_file(str(file)) for file in files}
        history = pd.read_csv(folder / "history.csv")
        return cls(settings["method"], settings["arch"], states, history, settings, seconds, utility or {})


class ResumeFile:
    """State of an unfinished training: written under another name, verified by the digest at its end, never fatal.

    A file of other ``settings`` is not continued. All processes must see it; process 0 writes it.
    """

    def __init__(self, path: str | Path, settings: dict):
        self.path, self.settings, self.failed = Path(path), repr(settings), False

    def read(self, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """Return what was written last; None, with one line, where that is not sound or not of this training."""
        if not distributed.share(self.path.is_file()):
            return None
        content, fault = None, ""
        try:
            content = self._load(model, device)
        except (OSError, ValueError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
            fault = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        if first := distributed.share(fault):  # process 0 decides for all
            if distributed.get_rank() == 0:
                tqdm.write(f"{self.path.name} can't be continued ({first}): the training starts over")
            return None
        if content is None:
            raise ValueError(f"process {distributed.get_rank()} can't read {self.path}: {fault}")
        return content

    def _load(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        if not self.path.is_file():
            raise ValueError("it is not there: put it where all machines see it")
        data = self.path.read_bytes()
        if hashlib.blake2b(data[:-DIGEST_BYTES], digest_size=DIGEST_BYTES).digest() != data[-DIGEST_BYTES:]:
            raise ValueError("it was changed, cut off, or written by another version")
        content = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        if content["settings"] != self.settings:
            raise ValueError("it is of other settings")
        if {k: v.shape for k, v in content["model"].items()} != {k: v.shape for k, v in model.state_dict().items()}:
            raise ValueError("its weights have other shapes")
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file; where that fails the training goes on without it, which is said once."""
        temporary = self.path.with_suffix(".writing")
        try:
            torch.save({"settings": self.settings} | content, temporary)
            with temporary.open("r+b") as file:
                file.write(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest())
            os.replace(temporary, self.path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not self.failed:
                reason = str(error).splitlines()[0][:160]
                tqdm.write(f"can't write {self.path.name} ({reason}): the training goes on, but a kill would lose it")
            self.failed = True
