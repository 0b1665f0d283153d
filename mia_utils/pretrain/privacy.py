"""DP-SGD: one step of the training loop that no single image can move far.

Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1. Per-example gradients, clipping and noise are opacus';
batches, noise and augmentation come from streams named by the step, so that a killed training continues with the same
numbers. (Whoever knows the seed knows the noise: a deployment would draw it from a secret source. The losses in
``history`` are measured on the members without noise; they are for the lesson and would not be released.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.optimizers import DPOptimizer
from timm.layers import LayerNorm
from torch import Tensor, nn

from mia_utils import seeds
from mia_utils.models import outputs

CHUNK_BYTES = 96e6  # of per-example gradients held at a time; a larger batch is summed up in parts
GPU_CHUNK_BYTES = 8e9


def compute_conv_gradients(
    layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-example gradients of a convolution, (N, *weight.shape) and (N, *bias.shape).

    Opacus' own is silently wrong for tensors in channels-last order, which convolutions on a CPU hand on among
    themselves, and for depthwise ones it computes the gradients of all pairs of channels.
    """
    columns = nn.functional.unfold(
        activations[0], layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    n, groups = len(backprops), layer.groups
    x = columns.reshape(n, groups, -1, columns.shape[-1])  # (N, G, C_in / G * k * k, places)
    g = backprops.reshape(n, groups, -1, columns.shape[-1])  # (N, G, C_out / G, places)
    made = {}
    if layer.weight.requires_grad:
        made[layer.weight] = (g @ x.transpose(2, 3)).reshape(n, *layer.weight.shape)
    if layer.bias is not None and layer.bias.requires_grad:
        made[layer.bias] = backprops.flatten(2).sum(2)
    return made


class PerExampleGradients(GradSampleModule):
    """Opacus' hooks on a network: after ``backward`` every parameter has ``grad_sample`` (N, ...).

    Three things are repaired: convolutions (see above); modules that are reached by two names, which would be hooked
    twice (the encoder of a masked-image model); and timm's subclass of layer norm, which is one.
    """

    GRAD_SAMPLERS = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: compute_conv_gradients}

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        yield from dict.fromkeys(super().iterate_submodules(module))

    def _get_module_type(self, module: nn.Module) -> type:
        return nn.LayerNorm if type(module) is LayerNorm else type(module)

    def capture_backprops_hook(
        self, module: nn.Module, _input: object, output: tuple[Tensor], loss_reduction: str, batch_first: bool
    ) -> None:
        """Keep what is computed as it is; opacus adds it to zeros first, which takes a quarter of a ViT's time."""
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        compute = self.GRAD_SAMPLERS.get(self._get_module_type(module), ft_compute_per_sample_gradient)
        for p, gradients in compute(module, activations, backprops).items():
            if not p.requires_grad:
                continue
            if p.grad_sample is not None:
                raise RuntimeError(f"a {type(module).__name__} runs twice in one forward")
            p.grad_sample = gradients
        del module.max_batch_len

    def backward(self, loss: Tensor) -> None:
        """Backward of a summed loss; the pictures need no gradient, which torch would remark upon at every step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()

    def close(self) -> None:
        """Take the hooks, and everything they keep, out of the network."""
        for module in self.to_standard_module().modules():
            for name in ("activations", "max_batch_len"):  # of modules that ran, but got no gradient
                vars(module).pop(name, None)


class PrivateSteps:
    """Takes the optimizer steps of a private training.

    Args:
        method: network with ``losses(images, ...) -> (B,)``, one loss per image; in training mode.
        optimizer: over its parameters.
        plan: of :func:`mia_utils.models.outputs.plan_privacy`.
        images: (N, 3, H, W) uint8, the members.
        labels: (N, H, W) for segmenters.
        seed: of batches, noise, masks and augmentation.

    Raises:
        ValueError: the network can't be private; one line with the reason.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: dict,
        *,
        images: Tensor,
        labels: Tensor | None = None,
        seed: int = 0,
    ):
        self.method, self.images, self.labels, self.seed = method, images, labels, seed
        self.sample_rate = plan["sample_rate"]
        for module in method.modules():  # an activation that overwrites its input breaks opacus' hooks
            if getattr(module, "inplace", False):
                module.inplace = False
        some = slice(0, 2)
        for name in outputs.require_private(method, images[some], None if labels is None else labels[some]):
            method.get_parameter(name).requires_grad_(False)  # never used, for example stages behind encoder_depth
        self._hooked = PerExampleGradients(method, loss_reduction="sum")
        self.optimizer = DPOptimizer(
            optimizer,
            noise_multiplier=plan["noise_multiplier"],
            max_grad_norm=plan["max_grad_norm"],
            expected_batch_size=self.sample_rate * len(images),
            generator=torch.Generator(images.device),
        )
        n_weights = sum(p.numel() for p in self.optimizer.params)
        self.chunk = max(1, int((GPU_CHUNK_BYTES if images.device.type == "cuda" else CHUNK_BYTES) / (4 * n_weights)))

    def draw_batch(self, step: int) -> np.ndarray:
        """Draw a Poisson batch: every image is in it with probability ``sample_rate``; it may be empty."""
        chance = seeds.rng(self.seed, "private-batch", step).random(len(self.images))
        return np.flatnonzero(chance < self.sample_rate)

    def take(self, step: int, **settings) -> Tensor:
        """Take step number ``step`` on its Poisson batch; returns the mean loss of the batch."""
        return self.take_on(self.draw_batch(step), step, **settings)

    def take_on(self, batch: np.ndarray, step: int, *, augmentation: str, size, progress: float) -> Tensor:
        """Take a step on the images ``batch``: the clipped gradients are summed, noised, and divided by q N."""
        rng = seeds.rng(self.seed, "train-views", step, 0)
        self.optimizer.generator.manual_seed(seeds.derive(self.seed, "private-noise", step))
        parts = np.array_split(batch, max(1, -(-len(batch) // self.chunk)))
        total = torch.zeros((), device=self.images.device)
        for index, part in enumerate(parts):
            self.optimizer.zero_grad(set_to_none=True)  # between parts their clipped sum stays
            if len(part):
                extra = {} if self.labels is None else {"labels": self.labels[part]}
                losses = self.method.losses(
                    self.images[part], augmentation=augmentation, size=size, rng=rng, progress=progress, **extra
                )
                self._hooked.backward(losses.sum())
                total += losses.detach().sum()
            else:  # nobody was drawn: the step is noise alone, and it counts
                for p in self.optimizer.params:
                    p.grad_sample = p.new_zeros((0, *p.shape))
            self.optimizer.signal_skip_step(do_skip=index + 1 < len(parts))
            self.optimizer.step()
        return total / max(len(batch), 1)

    def close(self) -> None:
        """Take the hooks out of the network."""
        self._hooked.close()
