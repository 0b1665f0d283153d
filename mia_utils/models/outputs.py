"""Output defenses: :func:`perturb` changes what a trained model outputs and keeps its interface."""

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mia_utils import seeds
from mia_utils.datasets import to_float
from mia_utils.models.encoders import Encoder
from mia_utils.models.segmenters import Segmenter

# output defense -> kinds of model it fits
OUTPUTS: dict[str, tuple[str, ...]] = {
    "noise": ("encoder", "autoencoder", "segmenter"), "rounding": ("encoder", "autoencoder", "segmenter"),
    "top-k": ("encoder", "segmenter"), "temperature": ("segmenter",), "argmax": ("segmenter",), "gauss": ("segmenter",),
}  # fmt: skip
# name of the strength; the strength that changes no bit, if there is one
_STRENGTHS: dict[str, tuple[str, float | None]] = {
    "noise": ("sigma", 0.0), "gauss": ("sigma", 0.0), "rounding": ("step", 0.0), "top-k": ("k", None),
    "temperature": ("temperature", 1.0), "argmax": ("strength", None),
}  # fmt: skip


def change_vectors(x: Tensor, defense: str, strength: float, draw: Callable[[], Tensor]) -> Tensor:
    """Change vectors (last axis) or pixels; ``draw`` gives standard normal noise of the same shape."""
    if defense == "noise":
        return x + strength * draw()
    if defense == "rounding":
        return (x / strength).round() * strength
    kept = x.abs().topk(strength, dim=-1).indices  # top-k: of the largest magnitudes
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


def change_posteriors(
    p: Tensor, defense: str, strength: float | None = None, draw: Callable[[], Tensor] | None = None
) -> Tensor:
    """Change posteriors (N, C, H, W); they sum to one before and after. Of equals argmax names the first."""
    if defense == "noise":  # log p is the logits but for a shift common to all classes
        return (p.log() + strength * draw()).softmax(1)
    if defense == "temperature":
        return (p.log() / strength).softmax(1)
    if defense == "argmax":
        return torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0)
    if defense == "gauss":  # Source: Segmentations-Leak (arXiv 1912.09685): add, clip at 1e-6, renormalize
        q = (p + strength * draw()).clamp_min(1e-6)
    elif defense == "rounding":  # a pixel whose classes all round to zero becomes uniform
        q = (p / strength).round() * strength
        q = torch.where(q.sum(1, keepdim=True) > 0, q, torch.ones_like(q))
    else:
        kept = p.topk(strength, dim=1)
        q = torch.zeros_like(p).scatter(1, kept.indices, kept.values)
    return q / q.sum(1, keepdim=True)


def perturb(model: object, defense: str, strength: float | None = None, *, seed: int = 0) -> object:
    """Put an output defense before a model; the weights are shared, the model itself stays as it is.

    An image gets the same output alone, in any batch and when queried twice: its noise comes from a stream keyed by
    the seed and the image's pixels, so repeated queries average nothing away.

    Args:
        model: ``Encoder``, ``Segmenter``, or an autoencoder with ``reconstruct`` and ``n_tokens``.
        defense: a key of ``OUTPUTS``.
        strength: ``noise``: sd in units of tokens and embeddings (see :func:`measure_scale`), of reconstructed pixels
            in [0, 1], or of a segmenter's logits; ``gauss``: sd on posteriors; ``rounding``: step; ``top-k``: values
            kept of each vector, classes kept of each pixel; ``temperature``: above 1 is softer; ``argmax``: none.
            Strength 0 of noise, gauss and rounding, and temperature 1, change no bit.
        seed: of the noise.

    Returns:
        A model with the same interface, and ``defense = (name, strength, seed)``. What does not fit raises ValueError.
    """
    if isinstance(model, Segmenter):
        kind, wrapper, width = "segmenter", _DefendedSegmenter, model.n_classes
    elif isinstance(model, Encoder):
        kind, wrapper, width = "encoder", _DefendedEncoder, model.dim
    elif callable(getattr(model, "reconstruct", None)) and hasattr(model, "n_tokens"):
        kind, wrapper, width = "autoencoder", _DefendedAutoencoder, 0
    else:
        expected = "an Encoder, a Segmenter or an autoencoder with reconstruct and n_tokens"
        way = "encoders.wrap and segmenters.wrap make one of any callable"
        raise ValueError(f"expected {expected}, got {type(model).__name__}: {way}")
    if defense not in OUTPUTS:
        raise ValueError(f"unknown output defense {defense!r}: expected one of {', '.join(OUTPUTS)}")
    if kind not in OUTPUTS[defense]:
        fitting = ", ".join(name for name, kinds in OUTPUTS.items() if kind in kinds)
        article = "a" if kind == "segmenter" else "an"
        raise ValueError(f"defense {defense!r} does not fit {article} {kind}: expected one of {fitting}")
    if getattr(model, "defense", None) is not None:
        raise ValueError(f"expected a model without output defense, got one behind {model.defense[0]!r}")
    return wrapper(model, (defense, _check_strength(defense, strength, width), int(seed)))


def _check_strength(defense: str, strength: float | None, width: int) -> float | int | None:
    """Return the strength as a number of its own type, or raise a one-line error."""
    if defense == "argmax":
        if strength is not None:
            raise ValueError(f"argmax has no strength: expected None, got {strength!r}")
        return None
    name = _STRENGTHS[defense][0]
    if isinstance(strength, bool) or not isinstance(strength, (int, float, np.number)) or not math.isfinite(strength):
        raise ValueError(f"{defense} needs a number as strength ({name}), got {strength!r}")
    if defense == "top-k":
        if strength != int(strength) or not 1 <= strength <= width:
            raise ValueError(f"top-k: expected a whole k from 1 to {width}, got {strength!r}")
        return int(strength)
    if strength < 0 or (defense == "temperature" and strength == 0):
        raise ValueError(f"{defense}: expected {name} {'>' if defense == 'temperature' else '>='} 0, got {strength!r}")
    return float(strength)


def measure_scale(encoder: Encoder, images: np.ndarray, *, batch_size: int = 256) -> float:
    """Standard deviation of an encoder's vectors over images (N, H, W, 3) uint8: a unit for the sigma of noise.

    Root mean square over the dimensions.
    """
    if len(images) < 2:
        raise ValueError(f"expected at least 2 images, got {len(images)}")
    batches = (slice(start, start + batch_size) for start in range(0, len(images), batch_size))
    with torch.inference_mode():
        parts = [encoder.embed(to_float(images[rows])).double().cpu() for rows in batches]
    return float(torch.cat(parts).var(dim=0).mean().sqrt())


def _hash_rows(batch: Tensor) -> list[str]:
    """Return one key per row (image or mask): equal values, equal key."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in batch.detach().cpu().numpy()]


class _Defended:
    """What the wrappers share: the model behind them, whose methods they have, and noise keyed by its input."""

    def __init__(self, model: object, defense: tuple[str, float | None, int]):
        vars(self).update(vars(model) | {"_behind": model, "defense": defense})

    def _perturb(self, x: Tensor, images: Tensor, output: str, masks: Tensor | None = None) -> Tensor:
        """Change the outputs (N, ...) for images (N, ...), or (N M, ...) for each image under its M masks (N M, L)."""
        name, strength, seed = self.defense
        if strength is not None and strength == _STRENGTHS[name][1]:
            return x

        def draw() -> Tensor:
            keys = _hash_rows(images.float())
            if masks is not None:
                keys = [key for key in keys for _ in range(len(masks) // len(images))]
                keys = [key + hidden for key, hidden in zip(keys, _hash_rows(masks), strict=True)]
            made = np.empty(x.shape, np.float32)
            for row, key in zip(made, keys, strict=True):
                seeds.rng(seed, "defense", name, output, key).standard_normal(out=row, dtype=np.float32)
            return torch.from_numpy(made).to(x.device)

        change = change_posteriors if output == "posteriors" else change_vectors
        return change(x, name, strength, draw)

    def to(self, device: str | torch.device):
        self._behind.to(device)
        self.device = torch.device(device)
        return self


class _DefendedEncoder(_Defended, Encoder):
    def tokens(self, images: Tensor) -> Tensor:
        return self._perturb(self._behind.tokens(images), images, "tokens")

    def embed(self, images: Tensor, pooling: str | None = None) -> Tensor:
        name = self.pooling if pooling in (None, "auto") else pooling
        return self._perturb(self._behind.embed(images, pooling), images, f"embed-{name}")


class _DefendedSegmenter(_Defended, Segmenter):
    def posteriors(self, images: Tensor) -> Tensor:
        return self._perturb(self._behind.posteriors(images), images, "posteriors")


class _DefendedAutoencoder(_Defended, nn.Module):
    """Perturbs reconstructions; everything else is that of the autoencoder behind it."""

    def __init__(self, autoencoder: object, defense: tuple[str, float | None, int]):
        nn.Module.__init__(self)
        if isinstance(autoencoder, nn.Module):
            self.module = autoencoder  # its weights are this module's: device, eval mode and fingerprint see them
        vars(self).update({"_behind": autoencoder, "defense": defense})

    def __getattr__(self, name: str):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_behind" not in vars(self):
                raise
            return getattr(vars(self)["_behind"], name)

    def reconstruct(self, images: Tensor, masks: Tensor) -> Tensor:
        masks = masks.expand(len(images), -1) if masks.ndim == 1 else masks
        return self._perturb(self._behind.reconstruct(images, masks), images, "pixels", masks)

    def reconstruct_from(self, tokens: Tensor, masks: Tensor, *, images: Tensor) -> Tensor:
        made = self._behind.reconstruct_from(tokens, masks, images=images)
        return self._perturb(made.flatten(0, 1), images, "pixels", masks.repeat(len(images), 1)).view_as(made)

    to = nn.Module.to  # not that of an encoder
