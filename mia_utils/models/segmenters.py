"""One face for every segmenter: ``posteriors`` of images in [0, 1]; and the four networks the book trains.

U-Net, UPerNet, PSPNet and DeepLabV3+ come from segmentation-models-pytorch on convolutional encoders; anything else
that gives logits or posteriors is wrapped. Training goes through the one loop of ``pretrain``: ``METHODS`` holds one
method for each network.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds
from mia_utils.models import views
from mia_utils.models.encoders import HALF

VOID = 255
MULTIPLE = 32  # the networks halve a picture five times: others are padded at the right and bottom, outputs cut back
OUTPUTS = ("auto", "logits", "posteriors")
ENCODER = "mobilenet_v2"  # 34 training images of 96 x 128 a second and thread with U-Net; opacus can make it private
# class of segmentation-models-pytorch, and where a small machine differs from its defaults
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("Unet", {}),
    "upernet": ("UPerNet", {"decoder_channels": 64}),  # with its 256 it costs 2 to 4 times a U-Net
    "pspnet": ("PSPNet", {}),
    "deeplabv3plus": ("DeepLabV3Plus", {}),
}
DEFAULTS = dict(lr=1e-3, weight_decay=1e-4, batch_size=8, augmentation="none")


class Segmenter:
    """A segmenter as the attacks see it.

    Attributes:
        name: what to call it in tables.
        n_classes: C.
        method, arch: network (a key of ``ARCHS``) and encoder, ``None`` when unknown.
        size: (height, width) it was trained at, or ``None``; pictures of any size may be asked about.
        outputs: ``"logits"`` or ``"posteriors"``: what the wrapped model gives (``"auto"`` until the first answer).
        module: the torch module, or ``None`` for a wrapped callable.
    """

    offers = {"posteriors"}

    def __init__(
        self,
        forward: Callable[[Tensor], Any],
        *,
        n_classes: int,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        outputs: str = "logits",
        multiple: int = 1,
        method: str | None = None,
        arch: str | None = None,
        size: tuple[int, int] | None = None,
        module: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ):
        if outputs not in OUTPUTS:
            raise ValueError(f"expected outputs {', '.join(OUTPUTS)}, got {outputs!r}")
        if isinstance(n_classes, bool) or not isinstance(n_classes, (int, np.integer)) or not 2 <= n_classes <= VOID:
            raise ValueError(f"expected n_classes from 2 to {VOID}, got {n_classes!r}")
        self._forward, self._multiple, self.outputs = forward, multiple, outputs
        self.name, self.n_classes, self.method, self.arch = name, int(n_classes), method, arch
        self.size, self.module, self.options = size, module, dict(options or {})
        self._mean, self._std = torch.tensor(mean).view(1, 3, 1, 1), torch.tensor(std).view(1, 3, 1, 1)
        weights = next(module.parameters(), None) if module is not None else None
        self.device = torch.device("cpu") if weights is None else weights.device

    def posteriors(self, images: Tensor) -> Tensor:
        """Class posteriors of every pixel.

        Args:
            images: (N, 3, H, W) float in [0, 1], any H and W.

        Returns:
            (N, C, H, W) float32, sums to one over C. A model that answers on a coarser grid is scaled up (bilinear).

        Raises:
            ValueError: wrong input, another number of classes, or values that are no logits and no posteriors.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"expected float images (N, 3, H, W) in [0, 1], got {tuple(images.shape)} {images.dtype}")
        x = (images.to(self.device) - self._mean.to(self.device)) / self._std.to(self.device)
        out = _unpack(self._forward(_pad(x, self._multiple)), self.name)
        if out.ndim != 4 or len(out) != len(x) or out.shape[1] != self.n_classes:
            raise ValueError(
                f"{self.name}: expected (N, C, H, W) = ({len(x)}, {self.n_classes}, ...), got {tuple(out.shape)}"
            )
        out = out.float()
        if not torch.isfinite(out).all():
            raise ValueError(f"{self.name} gave values that are not finite for images of {tuple(images.shape)}")
        padded = [-(-side // self._multiple) * self._multiple for side in x.shape[2:]]
        if list(out.shape[2:]) != padded:
            out = F.interpolate(out, size=padded, mode="bilinear", align_corners=False)
        out = out[:, :, : x.shape[2], : x.shape[3]]
        looks_normalized = bool((out >= -1e-4).all() and ((out.sum(1) - 1).abs() < 1e-2).all())
        if self.outputs == "auto" and len(out):
            self.outputs = "posteriors" if looks_normalized else "logits"  # decided once, then kept
        if self.outputs != "posteriors":
            return out.softmax(1)
        if not looks_normalized:
            raise ValueError(
                f"{self.name}: expected posteriors that sum to one, got values from {float(out.min()):.3g} to "
                f"{float(out.max()):.3g}: wrap it with outputs='logits'"
            )
        return out.clamp_min(0) / out.clamp_min(0).sum(1, keepdim=True)

    def to(self, device: str | torch.device) -> Segmenter:
        """Move the module to a device; returns self."""
        if self.module is not None:
            self.module.to(device)
            self.device = torch.device(device)
        return self

    def __repr__(self) -> str:
        trained = f", {self.size[0]} x {self.size[1]} px" if self.size else ""
        return f"Segmenter({self.name}: {self.method or 'unknown network'}, {self.arch}, C={self.n_classes}{trained})"


def _unpack(answer: Any, name: str) -> Tensor:
    """Find the tensor in what common libraries return: a tensor, (tensor, ...), {"out": tensor}, or .logits."""
    if isinstance(answer, dict):
        answer = next((answer[key] for key in ("out", "logits") if key in answer), answer)
    elif isinstance(answer, (tuple, list)) and answer:
        answer = answer[0]
    answer = getattr(answer, "logits", answer)
    if not isinstance(answer, Tensor):
        raise ValueError(f"{name}: expected a tensor (N, C, H, W), got {type(answer).__name__}")
    return answer


def _pad(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples. (N, 3, H, W) -> (N, 3, H', W')"""
    bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def wrap(
    model: Callable[[Tensor], Any],
    *,
    n_classes: int,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    outputs: str = "auto",
    multiple: int = 1,
    name: str = "wrapped",
) -> Segmenter:
    """Make a Segmenter of anything callable; a module is put into eval mode.

    Args:
        model: normalized images (N, 3, H, W) -> (N, C, h, w) logits or posteriors; also ``{"out": ...}``, a tuple
            that begins with them, or an object with ``.logits``.
        n_classes: C.
        mean, std: normalization applied to images in [0, 1] before the call.
        outputs: ``"logits"``, ``"posteriors"``, or ``"auto"``: told from the first answer, then kept.
        multiple: pad pictures to a multiple of this many pixels (and cut the answer back).
        name: what to call it in tables.
    """
    if not callable(model):
        raise ValueError(f"expected a module or function of images, got {type(model).__name__}")
    module = model.eval() if isinstance(model, nn.Module) else None
    return Segmenter(
        model, n_classes=n_classes, name=name, mean=mean, std=std, outputs=outputs, multiple=multiple, module=module
    )


def make_network(
    arch: str, n_classes: int, *, encoder: str = ENCODER, seed: int = 0, norm: str = "batch", **options: Any
) -> nn.Module:
    """Build a network with fresh weights from a private random stream.

    Args:
        arch: a key of ``ARCHS``.
        n_classes: C.
        encoder: convolutional encoder: a name of segmentation-models-pytorch, else a timm name.
        seed: of the weights.
        norm: ``"batch"``, or ``"group"``: every batch norm replaced, so that no image sees its batch mates (private
            training).
        options: keyword arguments of the network, for example ``decoder_channels``.

    Returns:
        Module (N, 3, H, W) -> (N, C, H, W) logits; H and W multiples of 32.
    """
    import segmentation_models_pytorch as smp  # four seconds of imports, only where a network is built

    if arch not in ARCHS:
        raise ValueError(f"unknown segmenter {arch!r}: expected one of {', '.join(ARCHS)}")
    if norm not in ("batch", "group"):
        raise ValueError(f"expected norm 'batch' or 'group', got {norm!r}")
    class_name, defaults = ARCHS[arch]
    name = encoder if encoder in smp.encoders.encoders or encoder.startswith("tu-") else f"tu-{encoder}"
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    # the library swallows names it does not know
    ours = {"self", "kwargs", "encoder_name", "encoder_weights", "classes", "in_channels", "activation", "aux_params"}
    known = set(inspect.signature(getattr(smp, class_name).__init__).parameters) - ours
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{arch} takes no option {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    settings = defaults | options | {"encoder_name": name, "encoder_weights": None, "classes": n_classes}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            network = getattr(smp, class_name)(**settings)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise ValueError(
                f"no {arch} on encoder {encoder!r} ({reason}): expected a convolutional encoder such as {ENCODER} and "
                "options of segmentation-models-pytorch"
            ) from None
    return _replace_batch_norm(network) if norm == "group" else network


def _replace_batch_norm(network: nn.Module) -> nn.Module:
    """Put group norm where batch norm was, in groups as opacus' ``ModuleValidator.fix`` chooses them."""
    for name, module in network.named_children():
        if type(module) is nn.BatchNorm2d:
            width = module.num_features
            setattr(network, name, nn.GroupNorm(math.gcd(32, width), width, affine=module.affine))
        elif isinstance(module, nn.BatchNorm2d):  # timm's holds its activation too
            raise ValueError(f"norm 'group' does not fit this encoder ({type(module).__name__}): expected {ENCODER}")
        else:
            _replace_batch_norm(module)
    return network


def from_module(
    module: nn.Module,
    *,
    method: str,
    arch: str,
    n_classes: int,
    name: str | None = None,
    size: Sequence[int] | None = None,
    options: dict[str, Any] | None = None,
) -> Segmenter:
    """Make a Segmenter of a network of :func:`make_network`, in eval mode."""
    return Segmenter(
        module.eval(),
        n_classes=n_classes,
        name=name or method,
        mean=HALF,
        std=HALF,
        multiple=MULTIPLE,
        method=method,
        arch=arch,
        size=tuple(map(int, size)) if size is not None else None,
        module=module,
        options=options,
    )


def make(
    arch: str,
    n_classes: int,
    size: Sequence[int] | None = None,
    *,
    encoder: str = ENCODER,
    seed: int = 0,
    **options: Any,
) -> Segmenter:
    """Make a segmenter with fresh weights: the untrained twin of a trained one. Arguments: :func:`make_network`."""
    module = make_network(arch, n_classes, encoder=encoder, seed=seed, **options)
    return from_module(
        module,
        method=arch,
        arch=encoder,
        n_classes=n_classes,
        name=f"untrained-{arch}",
        size=size,
        options=options,
    )


# ---------------------------------------------------------------------------------------------- weights on disk


def save(segmenter: Segmenter, path: str | Path) -> Path:
    """Write a segmenter of :func:`make` or of a training as safetensors; what it is stands in the header."""
    if segmenter.module is None or segmenter.method not in ARCHS:
        raise ValueError(f"{segmenter.name}: only networks of {', '.join(ARCHS)} can be saved, wrapped ones can not")
    state = {key: value.detach().cpu().contiguous() for key, value in segmenter.module.state_dict().items()}
    facts = {"method": segmenter.method, "arch": segmenter.arch, "n_classes": segmenter.n_classes}
    facts |= {"size": segmenter.size, "options": segmenter.options, "name": segmenter.name}
    save_file(state, str(path), metadata={key: json.dumps(value) for key, value in facts.items()})
    return Path(path)


def load(path: str | Path) -> Segmenter:
    """Read what ``save`` wrote (no code is run); a folder stands for the ``segmenter.safetensors`` in it.

    Raises:
        FileNotFoundError, ValueError: one line that names the file and what does not fit.
    """
    path = Path(path) / "segmenter.safetensors" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        with safe_open(str(path), framework="pt") as handle:
            header = {key: json.loads(value) for key, value in (handle.metadata() or {}).items()}
            state = {key: handle.get_tensor(key) for key in handle.keys()}
        facts = {key: header[key] for key in ("method", "arch", "n_classes", "size", "options", "name")}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} is no readable segmenter file ({str(error).splitlines()[0]})") from None
    except KeyError as error:
        raise ValueError(f"{path.name} holds no segmenter: its header lacks {error}, expected one of save()") from None
    module = make_network(facts["method"], facts["n_classes"], encoder=facts["arch"], **facts["options"])
    own = module.state_dict()
    wrong = [key for key in own if key not in state or own[key].shape != state[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ValueError(
            f"{path.name} does not fit {facts['method']} on {facts['arch']}: {len(wrong)} of {len(own)} weights "
            f"differ, first {wrong[0]}"
        )
    module.load_state_dict(state)
    return from_module(module, **facts)


# ---------------------------------------------------------------------------------------------- training


def augment_pair(
    images: Tensor,
    masks: Tensor,
    *,
    size: Sequence[int] | None = None,
    rng: np.random.Generator,
    scale: Sequence[float] | None = None,
    flip: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Augment images and their label maps together, in batch on their device.

    Args:
        images: (B, 3, H, W) uint8.
        masks: (B, H, W) integer labels.
        size: (height, width) of the output; None: H and W.
        rng: numpy generator of this step.
        scale: area range of a random crop of the picture's own shape, scaled to ``size``; None: no crop.
        flip: probability of mirroring.

    Returns:
        (B, 3, h, w) float32 in [0, 1] (bilinear) and (B, h, w) int64 (nearest: no label is ever mixed).
    """
    if images.ndim != 4 or masks.shape != (len(images), *images.shape[2:]):
        raise ValueError(
            f"expected images (B, 3, H, W) and masks (B, H, W), got {tuple(images.shape)} and {tuple(masks.shape)}"
        )
    height, width = images.shape[2:] if size is None else (int(side) for side in size)
    u = torch.from_numpy(rng.random((len(images), 4), dtype=np.float32)).to(images.device)
    x, y = images.float().div_(255), masks.unsqueeze(1).float()  # labels up to 255 are exact
    mirrored = u[:, 0] < flip
    if scale is not None:
        side = (scale[0] + (scale[1] - scale[0]) * u[:, 1]).sqrt()  # of the crop, as a share of H and of W
        shift = (1 - side[:, None]) * (2 * u[:, 2:] - 1)  # its center in [-1, 1] coordinates: inside the picture
        theta = torch.zeros(len(x), 2, 3, device=x.device)
        theta[:, 0, 0], theta[:, 1, 1] = torch.where(mirrored, -side, side), side
        theta[:, :, 2] = shift
        grid = F.affine_grid(theta, [len(x), 3, height, width], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        y = F.grid_sample(y, grid, mode="nearest", padding_mode="border", align_corners=False)
    else:
        if (height, width) != tuple(images.shape[2:]):
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
            y = F.interpolate(y, size=(height, width), mode="nearest-exact")
        x = torch.where(mirrored[:, None, None, None], x.flip(3), x)
        y = torch.where(mirrored[:, None, None, None], y.flip(3), y)
    return x, y[:, 0].round().long()


TRAINING_OPTIONS = ("dropout", "label_smoothing", "mixup", "distill", "minmax")  # not of the network that is kept


def _drop_features(decoder: nn.Module, inputs: tuple[Sequence[Tensor], ...]) -> tuple[list[Tensor], ...]:
    """Drop channels of what the encoder hands over, except the picture itself, which comes first."""
    picture, *features = inputs[0]
    return ([picture, *(decoder.feature_dropout(x) for x in features)], *inputs[1:])


class _Reversal(torch.autograd.Function):
    """Hands values on as they are, and gradients with the other sign, times ``weight``."""

    @staticmethod
    def forward(context, x: Tensor, weight: float) -> Tensor:
        context.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.weight * gradient, None


def _make_adversary(n_classes: int) -> nn.Module:
    """Membership classifier over posteriors beside one-hot labels, (B, 2C, H, W) -> (B, 1) logits."""
    layers, width = [], 2 * n_classes
    for next_width in (16, 32, 32):
        layers += [nn.Conv2d(width, next_width, 3, stride=2, padding=1), nn.ReLU()]
        width = next_width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))


class Segmentation(nn.Module):
    """Supervised segmentation as a method of the training loop: cross-entropy over valid pixels.

    Args:
        backbone: network of :func:`make_network`, (B, 3, H, W) -> (B, C, H, W) logits.
        input_size: (height, width) it is trained at; None: the pictures' own.
        n_classes: C.
        dropout: share of channels dropped, in training, of every feature map that the encoder hands to the decoder.
        label_smoothing: share of the label that is spread over all classes.
        mixup: alpha of the Beta(alpha, alpha) that every image and its labels are mixed with another one's by
            (Zhang et al. 2018, arXiv 1710.09412); 0: not mixed.
        distill: temperature of a distillation: the backbone never sees a label, only the softened posteriors of
            ``teacher``, which is trained beside it on the labels (Hinton et al. 2015, arXiv 1503.02531); 0: none.
        teacher: network of the same kind, for ``distill``; not part of the segmenter that is kept.
        minmax: weight of a membership attacker in the loss, who is trained beside the segmenter to tell its answers on
            training pictures from those on ``reference`` pictures (min-max game: Nasr, Shokri, Houmansadr 2018,
            arXiv 1807.05852; here with a reversed gradient); 0: none.
    """

    needs_labels = True  # label maps (N, H, W), void 255, passed as ``labels``
    network = "unet"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        input_size: Sequence[int] | None = None,
        n_classes: int,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        distill: float = 0.0,
        teacher: nn.Module | None = None,
        minmax: float = 0.0,
    ):
        super().__init__()
        self.backbone, self.n_classes = backbone, n_classes
        self.input_size = None if input_size is None else tuple(map(int, input_size))
        self.arch, self.options = ENCODER, {}
        for name, value in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0 <= value < 1:
                raise ValueError(f"expected {name} from 0 to below 1, got {value!r}")
        if mixup < 0 or distill < 0 or (mixup and distill):
            raise ValueError(f"expected mixup or distill above 0, one of the two, got {mixup!r} and {distill!r}")
        if minmax < 0 or (minmax and (mixup or distill)):
            raise ValueError(f"expected minmax above 0 and neither mixup nor distill beside it, got {minmax!r}")
        self.label_smoothing, self.mixup, self.distill, self.minmax = label_smoothing, mixup, distill, minmax
        self.adversary = _make_adversary(n_classes) if minmax else None
        self.reference: tuple[Tensor, Tensor] | None = None
        self.teacher = teacher if distill else None
        if dropout:
            backbone.decoder.feature_dropout = nn.Dropout2d(dropout)  # holds no weights; eval mode puts it to rest
            backbone.decoder.register_forward_pre_hook(_drop_features)

    @classmethod
    def build(
        cls, arch: str, *, n_classes: int, seed: int = 0, input_size: Sequence[int] | None = None, **options: Any
    ) -> Segmentation:
        """Build the method with fresh weights; ``arch`` is the encoder, ``options`` are those of the training
        (``TRAINING_OPTIONS``) and of :func:`make_network`."""
        training = {key: options.pop(key) for key in TRAINING_OPTIONS if key in options}
        make_one = functools.partial(make_network, cls.network, n_classes, encoder=arch, **options)
        if training.get("distill"):
            training["teacher"] = make_one(seed=seeds.derive(seed, "teacher") % 2**31)
        method = cls(make_one(seed=seed), input_size=input_size, n_classes=n_classes, **training)
        method.arch, method.options = arch, options
        return method

    @classmethod
    def restore(cls, state: dict[str, Tensor], *, arch: str, name: str, n_classes: int, **options: Any) -> Segmenter:
        """Open the segmenter that a checkpoint of the loop holds (``backbone.*``)."""
        options = {key: value for key, value in options.items() if key not in TRAINING_OPTIONS}
        method = cls.build(arch, n_classes=n_classes, **options)
        method.load_state_dict(state)
        return method.as_segmenter(name)

    def as_segmenter(self, name: str | None = None) -> Segmenter:
        """Return the network as the attacks see it (the same weights, now in eval mode)."""
        return from_module(
            self.backbone,
            method=self.network,
            arch=self.arch,
            n_classes=self.n_classes,
            name=name or self.network,
            size=self.input_size,
            options=self.options,
        )

    def loss(
        self,
        images: Tensor,
        *,
        labels: Tensor,
        augmentation: str,
        size: Sequence[int] | None,
        rng: np.random.Generator,
        progress: float,
    ) -> Tensor:
        """Mean cross-entropy over the valid pixels of a batch (B, 3, H, W) uint8 with labels (B, H, W).

        Void is ignored; a batch of nothing else has loss 0 and no gradient.
        """
        x, y = self._augment(images, labels, augmentation=augmentation, size=size, rng=rng)
        if self.training and self.mixup:
            return self._mix(x, y, rng)
        if self.training and self.minmax:
            return self._play(x, y, augmentation=augmentation, size=size, rng=rng)
        logits, n_valid = self._predict(self.backbone, x), (y != VOID).sum().clamp_min(1)
        if self.training and self.teacher is not None:
            taught = self._predict(self.teacher, x)
            loss = F.cross_entropy(taught, y, ignore_index=VOID, reduction="sum") / n_valid
            soft, answer = ((z / self.distill).log_softmax(1) for z in (taught.detach(), logits))
            gap = F.kl_div(answer, soft, log_target=True, reduction="none").sum(1)  # (B, H, W)
            return loss + self.distill**2 * (gap * (y != VOID)).sum() / n_valid
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, y, ignore_index=VOID, reduction="sum", label_smoothing=smoothing) / n_valid

    def losses(
        self,
        images: Tensor,
        *,
        labels: Tensor,
        augmentation: str,
        size: Sequence[int] | None,
        rng: np.random.Generator,
        progress: float,
    ) -> Tensor:
        """Mean cross-entropy over the valid pixels of each image (B,): no image counts more for having more of them.

        Private training needs it: with the mean over the pixels of a batch, an image's weight depends on the others.
        """
        x, y = self._augment(images, labels, augmentation=augmentation, size=size, rng=rng)
        return self._compare(self._predict(self.backbone, x), y) / (y != VOID).sum((1, 2)).clamp_min(1)

    def _compare(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy summed over the valid pixels of each image, (B,)."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, y, ignore_index=VOID, reduction="none", label_smoothing=smoothing).sum((1, 2))

    def _mix(self, x: Tensor, y: Tensor, rng: np.random.Generator) -> Tensor:
        """Loss of images (B, 3, H, W) mixed with others of the batch, each with a share of its own."""
        share = torch.from_numpy(rng.beta(self.mixup, self.mixup, len(x)).astype(np.float32)).to(x.device)
        other = torch.from_numpy(rng.permutation(len(x))).to(x.device)
        part = share.view(-1, 1, 1, 1)
        logits = self._predict(self.backbone, part * x + (1 - part) * x[other])
        total = share * self._compare(logits, y) + (1 - share) * self._compare(logits, y[other])
        valid = (y != VOID).sum((1, 2))
        return total.sum() / (share * valid + (1 - share) * valid[other]).sum().clamp_min(1)

    def _play(self, x: Tensor, y: Tensor, **augmentation: Any) -> Tensor:
        """Loss of members (B, 3, H, W) and of the attacker who tells them from as many reference pictures.

        Both pass the network in one batch, so that batch norm treats them alike. The attacker's gradient is reversed
        where it reaches the network's answers on members; those on reference pictures are not moved by it.
        """
        if self.reference is None:
            raise ValueError("minmax needs pictures that are not trained on: pass reference= and reference_labels=")
        images, labels = self.reference
        drawn = augmentation["rng"].choice(len(images), len(x), replace=len(images) < len(x))
        x_reference, y_reference = self._augment(images[drawn], labels[drawn], **augmentation)
        logits, logits_reference = self._predict(self.backbone, torch.cat([x, x_reference])).chunk(2)
        loss = self._compare(logits, y).sum() / (y != VOID).sum().clamp_min(1)
        answers = torch.cat([_Reversal.apply(logits.softmax(1), self.minmax), logits_reference.softmax(1).detach()])
        truth = F.one_hot(torch.cat([y, y_reference]).clamp_max(self.n_classes), self.n_classes + 1)
        truth = truth[..., :-1].permute(0, 3, 1, 2).to(answers)  # void is no class
        is_member = torch.cat([torch.ones(len(x), 1), torch.zeros(len(x), 1)]).to(answers)
        return loss + F.binary_cross_entropy_with_logits(self.adversary(torch.cat([answers, truth], 1)), is_member)

    def _augment(
        self, images: Tensor, labels: Tensor, *, augmentation: str, size: Sequence[int] | None, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """Augment a batch and check its labels: (B, 3, h, w) in [0, 1] and (B, h, w) int64."""
        settings = views.parse_augmentation(augmentation)
        if set(settings) - {"scale", "flip"}:
            raise ValueError(
                f"augmentation {augmentation!r} changes colors, segmenters take none, flip, crop, crop-weak, "
                "crop:LOW-HIGH"
            )
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 grids would move pixels and labels
            x, y = augment_pair(images, labels, size=size, rng=rng, **settings)
        valid = y != VOID
        if bool((valid & (y >= self.n_classes)).any()):
            wrong = int(y[valid].max())
            raise ValueError(f"labels hold the id {wrong}, expected 0 to {self.n_classes - 1}, or {VOID} for void")
        return x, y

    def _predict(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits (B, C, H, W) of images (B, 3, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        return network(_pad((x - 0.5) / 0.5, MULTIPLE))[:, :, :height, :width].float()

    def after_step(self, progress: float) -> None:
        """Nothing to update."""


class UNet(Segmentation):
    """U-Net (Ronneberger et al. 2015)."""

    network = "unet"


class UPerNet(Segmentation):
    """UPerNet (Xiao et al. 2018), the victim of the paper's demo."""

    network = "upernet"


class PSPNet(Segmentation):
    """PSPNet (Zhao et al. 2017)."""

    network = "pspnet"


class DeepLabV3Plus(Segmentation):
    """DeepLabV3+ (Chen et al. 2018)."""

    network = "deeplabv3plus"


METHODS: dict[str, tuple[type[Segmentation], dict]] = {
    cls.network: (cls, DEFAULTS) for cls in (UNet, UPerNet, PSPNet, DeepLabV3Plus)
}


def measure_iou(segmenter: Segmenter, images: np.ndarray, masks: np.ndarray, *, batch_size: int = 16) -> dict[str, Any]:
    """Measure how well a segmenter does its job.

    Args:
        segmenter: has ``posteriors`` and ``n_classes``.
        images: (N, H, W, 3) uint8.
        masks: (N, H, W) uint8, void 255.

    Returns:
        dict: ``miou`` (mean intersection over union of the classes that occur), ``pixel_accuracy``, both in [0, 1], and
        ``iou`` (C,) float, NaN for classes that occur neither in the labels nor in the predictions.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    if len(images) == 0 or np.shape(masks) != np.shape(images)[:3]:
        raise ValueError(f"expected masks {np.shape(images)[:3]} for the images, got {np.shape(masks)}")
    settings = dict(num_classes=segmenter.n_classes, ignore_index=VOID, validate_args=False)
    settings["sync_on_compute"] = False  # of several processes one alone measures
    jaccard = MulticlassJaccardIndex(average="none", zero_division=float("nan"), **settings)
    accuracy = MulticlassAccuracy(average="micro", **settings)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            x = views.read_pixels(images, rows).contiguous().float().div_(255)
            predicted = segmenter.posteriors(x).argmax(1).cpu()
            truth = torch.from_numpy(np.asarray(masks[rows])).long()
            jaccard.update(predicted, truth)
            accuracy.update(predicted, truth)
    iou = jaccard.compute().numpy().astype(float)
    present = iou[~np.isnan(iou)]
    return {
        "miou": float(present.mean()) if len(present) else float("nan"),
        "pixel_accuracy": float(accuracy.compute()),
        "iou": iou,
    }
