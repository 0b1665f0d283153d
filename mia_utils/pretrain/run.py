"""What a training leaves: ``Run`` (checkpoints and history), and while it runs its ``ResumeFile``."""

import contextlib
import os
import pickle
import zipfile
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


def open_encoder(module: nn.Module, method: str, arch: str, options: dict, name: str | None = None) -> Encoder:
    """Return a backbone as the attacks see it, in eval mode; ``options`` are those of its training."""
    seen = {key: options[key] for key in ("input_size", "mean", "std") if key in options}
    return encoders.from_module(module, arch=arch, method=method, name=name, **seen)


@dataclass
class Run:
    """A finished training.

    Attributes:
        states: epoch -> weights (``backbone.*``, and ``decoder.*`` of masked-image models), 0 to the final one.
        history: DataFrame with epoch, loss_members, loss_heldout, lr, seconds.
        settings: what it was trained with, as ``fit`` resolved it.
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

    def _rebuild(self, state: dict[str, Tensor]) -> nn.Module:
        method = registry.build(self.method, self.arch, seed=self.settings["seed"], **self.settings["options"])
        method.load_state_dict(state, strict=False)  # it holds all of backbone and decoder, nothing else
        return method.eval()

    def encoder_at(self, epoch: int | None = None) -> Encoder | Segmenter:
        """Return the encoder (segmenter) as it was after ``epoch`` (None: the end; 0: before training)."""
        state, name = self._get_state(epoch), self.method if epoch is None else f"{self.method}@{epoch}"
        if self.method in segmenters.ARCHS:
            return self._rebuild(state).as_segmenter(name)
        module = encoders.make_backbone(self.arch)
        module.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
        return open_encoder(module, self.method, self.arch, self.settings["options"], name)

    def autoencoder_at(self, epoch: int | None = None) -> nn.Module | None:
        """Return encoder and decoder together (``reconstruct``), None where the method has no decoder."""
        state = self._get_state(epoch)
        return self._rebuild(state) if hasattr(registry.METHODS[self.method][0], "reconstruct") else None

    encoder = property(encoder_at, doc="The final encoder (segmenter).")
    decoder = property(autoencoder_at, doc="The final autoencoder of a masked-image model, else None.")

    def save(self, folder: str | Path) -> Path:
        """Write encoder.safetensors (the final encoder alone), one file per checkpoint and history.csv."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for epoch, state in self.states.items():
            save_file({k: v.contiguous() for k, v in state.items()}, str(folder / f"epoch-{epoch:06d}.safetensors"))
        final = self.encoder
        what, name = (segmenters, "segmenter") if isinstance(final, Segmenter) else (encoders, "encoder")
        what.save(final, folder / f"{name}.safetensors")
        self.history.to_csv(folder / "history.csv", index=False)
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, settings: dict, seconds: float = 0.0, utility: dict | None = None) -> "Run":
        """Read what ``save`` wrote; ``settings`` are those of the run (artifacts keep them in meta.json)."""
        files = sorted(Path(folder).glob("epoch-*.safetensors"))
        states = {int(file.stem.split("-")[1]): load_file(str(file)) for file in files}
        history = pd.read_csv(Path(folder) / "history.csv")
        return cls(settings["method"], settings["arch"], states, history, settings, seconds, utility or {})


class ResumeFile:
    """State of an unfinished training, never fatal; all processes must see it, process 0 writes it."""

    def __init__(self, path: str | Path, settings: dict):
        self.path, self.settings, self.failed = Path(path), repr(settings), False

    def read(self, model: nn.Module, device: torch.device) -> dict[str, Any] | None:
        """Return what was written last; None, with one line, where that is not sound or not of this training."""
        if not distributed.share(self.path.is_file()):
            return None
        content, fault = {}, "it was changed, cut off, or written by another version"
        errors = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)
        with contextlib.suppress(*errors), zipfile.ZipFile(self.path) as archive:
            if archive.testzip() is None:  # the checksums, which torch does not look at
                content = torch.load(self.path, map_location=device, weights_only=True)
        if "settings" in content:
            shapes = [{k: v.shape for k, v in state.items()} for state in (content["model"], model.state_dict())]
            fault = "" if shapes[0] == shapes[1] else "its weights have other shapes"
            fault = fault if content["settings"] == self.settings else "it is of other settings"
        if first := distributed.share(fault):  # process 0 decides for all
            if distributed.get_rank() == 0:
                tqdm.write(f"{self.path.name} can't be continued ({first}): the training starts over")
            return None
        if fault:
            raise ValueError(f"a process can't read {self.path}: put it where all machines see it")
        return content

    def write(self, content: dict[str, Any]) -> None:
        """Replace the file; where that fails the training goes on without it, which is said once."""
        part = self.path.with_suffix(".writing")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"settings": self.settings} | content, part)
            os.replace(part, self.path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError on a full disk
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            if not self.failed:
                reason = str(error).splitlines()[0][:160]
                tqdm.write(f"can't write {self.path.name} ({reason}): the training goes on, but a kill would lose it")
            self.failed = True
