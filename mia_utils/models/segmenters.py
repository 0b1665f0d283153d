"""One face for every segmenter: ``posteriors`` of images in [0, 1]; and the four networks the book trains.

U-Net, UPerNet, PSPNet and DeepLabV3+ come from segmentation-models-pytorch on convolutional encoders (trained by
``pretrain.segmentation``); anything else that gives logits or posteriors is wrapped.
"""

import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils.datasets import to_float
from mia_utils.models import checkpoints, layouts, wrapping
from mia_utils.models.backbones import first_line
from mia_utils.models.encoders import HALF, NONE, ONE, Encoder, check_pixels

VOID = 255
MULTIPLE = 32  # the networks halve an image five times: others are padded at the right and bottom, outputs cut back
OUTPUTS = ("auto", "logits", "posteriors")
ENCODER = "mobilenet_v2"  # 34 training images of 96 x 128 a second and thread with U-Net; opacus can make it private
# class of segmentation-models-pytorch, and where a small machine differs from its defaults
ARCHS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("Unet", {}),
    "upernet": ("UPerNet", {"decoder_channels": 64}),  # with its 256 it costs 2 to 4 times a U-Net
    "pspnet": ("PSPNet", {}),
    "deeplabv3plus": ("DeepLabV3Plus", {}),
}


class Segmenter:
    """A segmenter as the attacks see it.

    Attributes:
        method, arch: network (a key of ``ARCHS``) and encoder, ``None`` when unknown.
        size: (height, width) it was trained at, or ``None``; images of any size may be queried.
        outputs: ``"logits"`` or ``"posteriors"``: what the wrapped model gives (``"auto"`` until the first answer).
        module: the torch module, or ``None`` for a wrapped callable.
    """

    offers = {"posteriors"}

    def __init__(
        self, forward: Callable[[Tensor], Any], *, n_classes: int, name: str, mean: Sequence[float],
        std: Sequence[float], outputs: str = "logits", multiple: int = 1, method: str | None = None,
        arch: str | None = None, size: tuple[int, int] | None = None, module: nn.Module | None = None,
        options: dict[str, Any] | None = None,
    ):  # fmt: skip
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
        """Class posteriors of every pixel of images (N, 3, H, W) in [0, 1] of any size.

        Returns (N, C, H, W) float32, sums to one over C; outputs on a coarser grid are scaled up (bilinear).
        """
        check_pixels(images)
        x = pad((images.to(self.device) - self._mean.to(self.device)) / self._std.to(self.device), self._multiple)
        answer, expected = self._forward(x), f"(N, C, H, W) = ({len(x)}, {self.n_classes}, ...)"
        try:
            out = wrapping.unpack_tensor(answer, ("out", "logits")).float()
        except ValueError:
            raise ValueError(f"{self.name}: expected a tensor (N, C, H, W), got {type(answer).__name__}") from None
        if out.ndim != 4 or out.shape[:2] != (len(x), self.n_classes):
            raise ValueError(f"{self.name}: expected {expected}, got {tuple(out.shape)}")
        if not torch.isfinite(out).all():
            raise ValueError(f"{self.name} gave values that are not finite for images of {tuple(images.shape)}")
        if out.shape[2:] != x.shape[2:]:
            out = F.interpolate(out, size=x.shape[2:], mode="bilinear", align_corners=False)
        out = out[:, :, : images.shape[2], : images.shape[3]]
        looks_normalized = bool((out >= -1e-4).all() and ((out.sum(1) - 1).abs() < 1e-2).all())
        if self.outputs == "auto" and len(out):
            self.outputs = "posteriors" if looks_normalized else "logits"  # decided once, then kept
        if self.outputs != "posteriors":
            return out.softmax(1)
        if not looks_normalized:
            got = f"values from {float(out.min()):.3g} to {float(out.max()):.3g}: wrap it with outputs='logits'"
            raise ValueError(f"{self.name}: expected posteriors that sum to one, got {got}")
        return out.clamp_min(0) / out.clamp_min(0).sum(1, keepdim=True)

    to = Encoder.to

    def __repr__(self) -> str:
        trained = f", {self.size[0]} x {self.size[1]} px" if self.size else ""
        return f"Segmenter({self.name}: {self.method or 'unknown network'}, {self.arch}, C={self.n_classes}{trained})"


def pad(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until height and width are multiples. (N, 3, H, W) -> (N, 3, H', W')"""
    bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
    return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x


def wrap(
    model: Callable[[Tensor], Any], *, n_classes: int, mean: Sequence[float] = NONE, std: Sequence[float] = ONE,
    outputs: str = "auto", multiple: int = 1, name: str = "wrapped",
) -> Segmenter:  # fmt: skip
    """Make a Segmenter of anything callable; a module is put into eval mode.

    Args:
        model: normalized images (N, 3, H, W) -> (N, C, h, w) logits or posteriors; also ``{"out": ...}``, a tuple
            that begins with them, or an object with ``.logits``.
        mean, std: normalization applied to images in [0, 1] before the call.
        outputs: ``"logits"``, ``"posteriors"``, or ``"auto"``: told from the first answer, then kept.
        multiple: pad images to a multiple of this many pixels (and cut the output back).
    """
    if not callable(model):
        raise ValueError(f"expected a module or function of images, got {type(model).__name__}")
    facts = dict(n_classes=n_classes, name=name, mean=mean, std=std, outputs=outputs, multiple=multiple)
    return Segmenter(model, module=model.eval() if isinstance(model, nn.Module) else None, **facts)


def make_network(
    arch: str, n_classes: int, *, encoder: str = ENCODER, seed: int = 0, norm: str = "batch", **options: Any
) -> nn.Module:
    """Build a network (N, 3, H, W) -> (N, C, H, W) logits of a private random stream; H and W are multiples of 32.

    Args:
        encoder: convolutional encoder: a name of segmentation-models-pytorch, else a timm name.
        norm: ``"batch"``, or ``"group"``: no image sees its batch mates (private training).
        options: keyword arguments of the network, for example ``decoder_channels``.
    """
    import segmentation_models_pytorch as smp  # four seconds of imports, only where a network is built

    if arch not in ARCHS:
        raise ValueError(f"unknown segmenter {arch!r}: expected one of {', '.join(ARCHS)}")
    if norm not in ("batch", "group"):
        raise ValueError(f"expected norm 'batch' or 'group', got {norm!r}")
    network, defaults = getattr(smp, ARCHS[arch][0]), ARCHS[arch][1]
    name = encoder if encoder in smp.encoders.encoders or encoder.startswith("tu-") else f"tu-{encoder}"
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    # the library swallows names it does not know
    ours = {"self", "kwargs", "encoder_name", "encoder_weights", "classes", "in_channels", "activation", "aux_params"}
    known = set(inspect.signature(network.__init__).parameters) - ours
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{arch} takes no option {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    settings = defaults | options | {"encoder_name": name, "encoder_weights": None, "classes": n_classes}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            built = network(**settings)
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            way = f"a convolutional encoder such as {ENCODER} and options of segmentation-models-pytorch"
            raise ValueError(f"no {arch} on encoder {encoder!r} ({first_line(error)}): expected {way}") from None
    if norm == "group":
        from opacus.validators import ModuleValidator  # seconds of imports, only for private training

        built = ModuleValidator.fix(built)
        # timm's holds its activation too
        if left := next((m for m in built.modules() if isinstance(m, nn.BatchNorm2d)), None):
            raise ValueError(f"norm 'group' does not fit this encoder ({type(left).__name__}): expected {ENCODER}")
    return built


def from_module(
    module: nn.Module, *, method: str, arch: str, n_classes: int, name: str | None = None,
    size: Sequence[int] | None = None, options: dict[str, Any] | None = None,
) -> Segmenter:  # fmt: skip
    """Make a Segmenter of a network of :func:`make_network`, in eval mode."""
    return Segmenter(
        module.eval(), n_classes=n_classes, name=name or method, mean=HALF, std=HALF, multiple=MULTIPLE, method=method,
        arch=arch, size=None if size is None else tuple(map(int, size)), module=module, options=options,
    )  # fmt: skip


def make(
    arch: str, n_classes: int, size: Sequence[int] | None = None, *, encoder: str = ENCODER, seed: int = 0,
    **options: Any,
) -> Segmenter:  # fmt: skip
    """Make a segmenter with fresh weights, the control of a trained one. Arguments: :func:`make_network`."""
    module = make_network(arch, n_classes, encoder=encoder, seed=seed, **options)
    facts = dict(n_classes=n_classes, size=size, options=options, name=f"untrained-{arch}")
    return from_module(module, method=arch, arch=encoder, **facts)


_SAVED = ("method", "arch", "n_classes", "size", "options", "name")


def save(segmenter: Segmenter, path: str | Path) -> Path:
    """Write a segmenter of :func:`make` or of a training as safetensors; what it is stands in the header."""
    if segmenter.module is None or segmenter.method not in ARCHS:
        raise ValueError(f"{segmenter.name}: only networks of {', '.join(ARCHS)} can be saved, wrapped ones can not")
    state = {key: value.detach().cpu().contiguous() for key, value in segmenter.module.state_dict().items()}
    save_file(state, str(path), metadata={key: json.dumps(getattr(segmenter, key)) for key in _SAVED})
    return Path(path)


def load(path: str | Path) -> Segmenter:
    """Read what ``save`` wrote (no code is run); a folder stands for the ``segmenter.safetensors`` in it."""
    path = Path(path) / "segmenter.safetensors" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    state, header = checkpoints.read_safetensors(path)
    try:
        facts = {key: json.loads(header[key]) for key in _SAVED}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no readable segmenter file ({error})") from None
    except KeyError as error:
        raise ValueError(f"{path.name} holds no segmenter: its header lacks {error}, expected one of save()") from None
    module = make_network(facts["method"], facts["n_classes"], encoder=facts["arch"], **facts["options"])
    layouts.fill(module, state, path.name, f"{facts['method']} on {facts['arch']}")
    return from_module(module, **facts)


def measure_iou(segmenter: Segmenter, images: np.ndarray, masks: np.ndarray, *, batch_size: int = 16) -> dict[str, Any]:
    """Measure how well a segmenter does its job on images (N, H, W, 3) and masks (N, H, W) uint8, void 255.

    Returns:
        dict: ``miou`` (mean intersection over union of the classes that occur), ``pixel_accuracy``, both in [0, 1], and
        ``iou`` (C,) float, NaN for classes that occur neither in the labels nor in the predictions.
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex  # seconds to import

    if len(images) == 0 or np.shape(masks) != np.shape(images)[:3]:
        raise ValueError(f"expected masks {np.shape(images)[:3]} for the images, got {np.shape(masks)}")
    settings = dict(num_classes=segmenter.n_classes, ignore_index=VOID, validate_args=False)
    settings["sync_on_compute"] = False  # of several processes one alone measures
    jaccard = MulticlassJaccardIndex(average="none", zero_division=float("nan"), **settings)
    accuracy = MulticlassAccuracy(average="micro", **settings)
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            predicted = segmenter.posteriors(to_float(images[rows])).argmax(1).cpu()
            truth = torch.from_numpy(np.asarray(masks[rows])).long()
            jaccard.update(predicted, truth)
            accuracy.update(predicted, truth)
    iou = jaccard.compute().numpy().astype(float)
    present = iou[~np.isnan(iou)]
    miou = float(present.mean()) if len(present) else float("nan")
    return {"miou": miou, "pixel_accuracy": float(accuracy.compute()), "iou": iou}
