"""DP-SGD: steps of the training loop that no single image can move far, and the check that they are exact.

Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1. Per-example gradients, clipping and noise are opacus';
batches, noise and augmentation come from streams named by the step. (The seed tells the noise: a deployment would draw
it from a secret source. The losses in ``history`` are measured without noise; they would not be released.)
"""

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

CHUNK_BYTES, GPU_CHUNK_BYTES = 96e6, 8e9  # of per-example gradients held at a time; a larger batch is summed in parts
TOLERANCE = 1e-4  # of the norm of an image's gradient; float32 sums in another order reach 2e-5
# opacus gives no gradients, or wrong ones, for these where they are expanded along the batch: they keep their start
TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def compute_conv_gradients(layer: nn.Conv2d, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Per-example gradients of a convolution, (N, *weight.shape) and (N, *bias.shape).

    Opacus' own is silently wrong for tensors in channels-last order, and costs all pairs of channels if depthwise.
    """
    columns = nn.functional.unfold(
        activations[0], layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    )
    n, groups = len(backprops), layer.groups
    x = columns.reshape(n, groups, -1, columns.shape[-1])  # (N, G, C_in / G * k * k, places)
    g = backprops.reshape(n, groups, -1, columns.shape[-1])  # (N, G, C_out / G, places)
    made = {layer.weight: (g @ x.transpose(2, 3)).reshape(n, *layer.weight.shape)}
    return made if layer.bias is None else made | {layer.bias: backprops.flatten(2).sum(2)}


class PerExampleGradients(GradSampleModule):
    """Opacus' hooks on a network: after ``backward`` every parameter has ``grad_sample`` (N, ...).

    Repaired: convolutions; modules of two names, hooked twice (a masked-image model's encoder); timm's layer norm.
    """

    GRAD_SAMPLERS = {**GradSampleModule.GRAD_SAMPLERS, nn.Conv2d: compute_conv_gradients}

    def iterate_submodules(self, module: nn.Module) -> Iterable[nn.Module]:
        yield from dict.fromkeys(super().iterate_submodules(module))

    def _get_module_type(self, module: nn.Module) -> type:
        return nn.LayerNorm if type(module) is LayerNorm else type(module)

    def capture_backprops_hook(
        self, module: nn.Module, _input: object, output: tuple[Tensor], loss_reduction: str, batch_first: bool
    ) -> None:
        """Keep what is computed as it is: adding it to zeros, as opacus does, takes a quarter of a ViT's time."""
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        compute = self.GRAD_SAMPLERS.get(self._get_module_type(module), ft_compute_per_sample_gradient)
        for p, gradients in compute(module, activations, backprops).items():
            if p.requires_grad and p.grad_sample is not None:
                raise RuntimeError(f"a {type(module).__name__} runs twice in one forward")
            p.grad_sample = gradients if p.requires_grad else None
        del module.max_batch_len

    def backward(self, loss: Tensor) -> None:
        """Backward of a summed loss; the images need no gradient, which torch would remark upon at every step."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            loss.backward()

    def close(self) -> None:
        """Take the hooks, and everything they keep, out of the network."""
        for module in self.to_standard_module().modules():
            for name in ("activations", "max_batch_len"):  # of modules that ran, but got no gradient
                vars(module).pop(name, None)


def freeze_tokens(method: nn.Module) -> None:
    """Take class, mask and position tokens out of a private training."""
    for name, p in method.named_parameters():
        p.requires_grad_(p.requires_grad and name.split(".")[-1] not in TOKENS)


def require_private(method: nn.Module, images: Tensor, labels: Tensor | None = None) -> list[str]:
    """Refuse a network whose images are not told apart exactly; returns parameters that no image ever moves.

    The gradients that opacus computes of a batch are compared with those of each image alone.

    Args:
        method: in training mode, with ``losses``; its weights are not changed, its dropout is in eval mode meanwhile.
        images: (B, 3, H, W) uint8, two or three; ``labels`` (B, H, W) for segmenters.
    """
    if norms := [name for name, m in method.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        raise ValueError(
            f"a network with batch norm can't be private ({norms[0]} and {len(norms) - 1} more): it mixes the images "
            "of a batch; expected group norm (option norm: group of a segmenter)"
        )
    resting = [m for m in method.modules() if m.training and type(m).__name__.startswith("Drop")]
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    settings = dict(augmentation="none", size=method.input_size, progress=0.0)

    def compute(rows: slice) -> Tensor:
        extra = {} if labels is None else {"labels": labels[rows]}
        rng = seeds.RowGenerator(seeds.rng(0, "compare-gradients"), len(images), rows)
        return method.losses(images[rows], rng=rng, **settings, **extra).sum()

    for module in resting:
        module.eval()
    try:
        losses = [compute(slice(row, row + 1)) for row in range(len(images))]
        alone = [torch.autograd.grad(loss, list(trained.values()), allow_unused=True) for loss in losses]
        hooked = PerExampleGradients(method, loss_reduction="sum")
        hooked.backward(compute(slice(None)))
        together = [p.grad_sample for p in trained.values()]
        hooked.close()
    except (RuntimeError, AttributeError, ValueError) as error:  # opacus' validator writes a page
        reason = str(error).splitlines()[0][:160]
        raise ValueError(f"this network gives no per-example gradients, so it can't be private ({reason})") from None
    finally:
        for module in resting:
            module.train()
        for p in trained.values():
            p.grad = None
    norms = torch.stack([sum(g.square().sum() for g in one if g is not None) for one in alone]).sqrt()  # (B,)
    unused, wrong = [], []
    for name, made, *one in zip(trained, together, *alone, strict=True):
        if made is None and all(g is None for g in one):
            unused.append(name)
            continue
        expected = torch.stack([torch.zeros_like(trained[name]) if g is None else g for g in one])
        if made is None or made.shape != expected.shape:
            wrong.append(name)
        elif ((made - expected).flatten(1).norm(dim=1) > TOLERANCE * norms).any():
            wrong.append(name)
    if wrong:
        raise ValueError(
            f"this network can't be private: per-example gradients of {len(wrong)} of {len(trained)} parameters differ "
            f"from those of each image alone: {', '.join(wrong)[:160]}"
        )
    return unused


class PrivateSteps:
    """Takes the optimizer steps of a private training.

    Args:
        method: in training mode, with ``losses(images, ...) -> (B,)``; one that can't be private is a ValueError.
        plan: of ``accounting.plan_privacy``.
        images: (N, 3, H, W) uint8, the members; ``labels`` (N, H, W) for segmenters.
        seed: of batches, noise, masks and augmentation.
    """

    def __init__(
        self, method: nn.Module, optimizer: torch.optim.Optimizer, plan: dict, *, images: Tensor,
        labels: Tensor | None = None, seed: int = 0,
    ):  # fmt: skip
        self.method, self.images, self.labels, self.seed = method, images, labels, seed
        self.sample_rate = plan["sample_rate"]
        for module in method.modules():  # an activation that overwrites its input breaks opacus' hooks
            if getattr(module, "inplace", False):
                module.inplace = False
        for name in require_private(method, images[:2], None if labels is None else labels[:2]):
            method.get_parameter(name).requires_grad_(False)  # never used, for example stages behind encoder_depth
        self._hooked = PerExampleGradients(method, loss_reduction="sum")
        self.close = self._hooked.close
        noise = {key: plan[key] for key in ("noise_multiplier", "max_grad_norm")}
        noise |= dict(expected_batch_size=self.sample_rate * len(images), generator=torch.Generator(images.device))
        self.optimizer = DPOptimizer(optimizer, **noise)
        n_weights = sum(p.numel() for p in self.optimizer.params)
        self.chunk = max(1, int((GPU_CHUNK_BYTES if images.device.type == "cuda" else CHUNK_BYTES) / (4 * n_weights)))

    def draw_batch(self, step: int) -> np.ndarray:
        """Draw a Poisson batch: every image is in it with probability ``sample_rate``; it may be empty."""
        chance = seeds.rng(self.seed, "private-batch", step).random(len(self.images))
        return np.flatnonzero(chance < self.sample_rate)

    def take_on(self, batch: np.ndarray, step: int, **settings) -> Tensor:
        """Step on the images ``batch`` by clipped gradients, summed, noised, divided by q N; returns the mean loss."""
        rng = seeds.rng(self.seed, "train-views", step, 0)
        self.optimizer.generator.manual_seed(seeds.derive(self.seed, "private-noise", step))
        parts = np.array_split(batch, max(1, -(-len(batch) // self.chunk)))
        total = torch.zeros((), device=self.images.device)
        for index, part in enumerate(parts):
            self.optimizer.zero_grad(set_to_none=True)  # between parts their clipped sum stays
            if len(part):
                extra = {} if self.labels is None else {"labels": self.labels[part]}
                losses = self.method.losses(self.images[part], rng=rng, **settings, **extra)
                self._hooked.backward(losses.sum())
                total += losses.detach().sum()
            else:  # no image was drawn: the step is noise alone, and it counts
                for p in self.optimizer.params:
                    p.grad_sample = p.new_zeros((0, *p.shape))
            self.optimizer.signal_skip_step(do_skip=index + 1 < len(parts))
            self.optimizer.step()
        return total / max(len(batch), 1)
