"""Several processes train one model (``torchrun``): how they are started, and what they agree on.

Process 0 writes the artifact; the others take the same steps on their rows of every batch. Nothing imports torch before
it is needed.
"""

from __future__ import annotations

import functools
import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")
PATIENCE = timedelta(days=7)  # process 0 may wait for a lock or measure a large model: the others wait with it


def count() -> int:
    """Return how many processes ``torchrun`` started for this training; 1 without it (SLURM's numbers do not count)."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def get_rank() -> int:
    """Return the number of this process, 0 to ``count() - 1``."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def launch(*, device: str | None = None, precision: str = "32-true") -> Fabric:
    """Return the fabric that a training runs on: one device (None: CUDA, else the CPU), or one for each process."""
    import torch
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment
    from lightning_fabric.strategies import DDPStrategy

    settings = dict(accelerator=device or ("cuda" if torch.cuda.is_available() else "cpu"), precision=precision)
    if count() == 1:  # named, because fabric would look for SLURM's tasks and refuse some numbers of them
        return Fabric(devices=1, plugins=LightningEnvironment(), **settings)
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if settings["accelerator"] == "cuda" and here > torch.cuda.device_count():
        raise ValueError(
            f"expected one GPU for each of the {here} processes on this machine, got {torch.cuda.device_count()}: "
            "start fewer, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    # "auto" would be one device on a CPU; static_graph: not every weight gets a gradient (MAE's encoder: a mask token)
    strategy = DDPStrategy(static_graph=True)
    fabric = Fabric(devices=here, num_nodes=count() // here, strategy=strategy, **settings)
    fabric.launch()
    return fabric


@functools.cache
def _agree() -> Any:
    """Return a group of all processes that waits longer than the one gradients go through."""
    import torch

    if not torch.distributed.is_initialized():
        launch()
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def share(value: T) -> T:
    """Return process 0's value in every process, waiting for it; all must call this in the same order."""
    if count() == 1:
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=_agree())
    return box[0]
