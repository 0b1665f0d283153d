"""Output defenses: :func:`perturb` changes what a trained model outputs and keeps its interface."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mia_utils import seeds
from mia_utils.models import views
from mia_utils.models.encoders import Encoder
from mia_utils.models.segmenters import Segmenter

# Each change takes an output, the strength, and a callable that draws standard normal noise of the output's shape.
Change = Callable[[Tensor, float | None, Callable[[], Tensor]], Tensor]


def _keep_largest(x: Tensor, k: int, noise: Callable) -> Tensor:
    """Keep the k largest magnitudes of each vector (last axis), zero the others."""
    kept = x.abs().topk(k, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, kept, x.gather(-1, kept))


def _round_posteriors(p: Tensor, step: float, noise: Callable) -> Tensor:
    """Round and renormalize; a pixel whose classes all round to zero becomes uniform."""
    rounded = _round(p, step, noise)
    return _normalize(torch.where(rounded.sum(1, keepdim=True) > 0, rounded, torch.ones_like(rounded)))


def _keep_likeliest(p: Tensor, k: int, noise: Callable) -> Tensor:
    kept = p.topk(k, dim=1)
    return _normalize(torch.zeros_like(p).scatter(1, kept.indices, kept.values))


def _normalize(p: Tensor) -> Tensor:
    return p / p.sum(1, keepdim=True)


def _add_noise(x: Tensor, sigma: float, noise: Callable) -> Tensor:
    return x + sigma * noise()


def _add_noise_to_logits(p: Tensor, sigma: float, noise: Callable) -> Tensor:
    return _add_noise(p.log(), sigma, noise).softmax(1)  # log p is the logits but for a shift common to all classes


def _round(x: Tensor, step: float, noise: Callable) -> Tensor:
    return (x / step).round() * step


OUTPUTS: dict[str, dict[str, Change]] = {  # output defense -> kind of model -> what it does
    "noise": {"encoder": _add_noise, "autoencoder": _add_noise, "segmenter": _add_noise_to_logits},
    "rounding": {"encoder": _round, "autoencoder": _round, "segmenter": _round_posteriors},
    "top-k": {"encoder": _keep_largest, "segmenter": _keep_likeliest},
    "temperature": {"segmenter": lambda p, temperature, noise: (p.log() / temperature).softmax(1)},
    "argmax": {"segmenter": lambda p, _, noise: torch.zeros_like(p).scatter_(1, p.argmax(1, keepdim=True), 1.0)},
    # Source: Segmentations-Leak (arXiv 1912.09685), defense Gauss: add, clip at 1e-6, renormalize
    "gauss": {"segmenter": lambda p, sigma, noise: _normalize(_add_noise(p, sigma, noise).clamp_min(1e-6))},
}
_NEUTRAL = {"noise": 0.0, "rounding": 0.0, "gauss": 0.0, "temperature": 1.0}  # strengths that change no bit


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
    kind, wrapper, width = _tell_kind(model)
    if defense not in OUTPUTS:
        raise ValueError(f"unknown output defense {defense!r}: expected one of {', '.join(OUTPUTS)}")
    if kind not in OUTPUTS[defense]:
        fitting = ", ".join(name for name, kinds in OUTPUTS.items() if kind in kinds)
        article = "a" if kind == "segmenter" else "an"
        raise ValueError(f"defense {defense!r} does not fit {article} {kind}: expected one of {fitting}")
    if getattr(model, "defense", None) is not None:
        raise ValueError(f"expected a model without output defense, got one behind {model.defense[0]!r}")
    strength = _check_strength(defense, strength, width)
    neutral = defense in _NEUTRAL and strength == _NEUTRAL[defense]
    change = (lambda x, _, noise: x) if neutral else OUTPUTS[defense][kind]
    return wrapper(model, change, (defense, strength, int(seed)))


def _tell_kind(model: object) -> tuple[str, type, int]:
    """Return the kind of a model, its wrapper, and how many values of it top-k could keep."""
    if isinstance(model, Segmenter):
        return "segmenter", _DefendedSegmenter, model.n_classes
    if isinstance(model, Encoder):
        return "encoder", _DefendedEncoder, model.dim
    if callable(getattr(model, "reconstruct", None)) and hasattr(model, "n_tokens"):
        return "autoencoder", _DefendedAutoencoder, 0
    raise ValueError(
        "expected an Encoder, a Segmenter or an autoencoder with reconstruct and n_tokens, got "
        f"{type(model).__name__}: encoders.wrap and segmenters.wrap make one of any callable"
    )


def _check_strength(defense: str, strength: float | None, width: int) -> float | int | None:
    """Return the strength as a number of its own type, or raise a one-line error."""
    if defense == "argmax":
        if strength is not None:
            raise ValueError(f"argmax has no strength: expected None, got {strength!r}")
        return None
    name = {"noise": "sigma", "gauss": "sigma", "rounding": "step", "top-k": "k"}.get(defense, defense)
    if isinstance(strength, bool) or not isinstance(strength, (int, float, np.number)) or not math.isfinite(strength):
        raise ValueError(f"{defense} needs a number as strength ({name}), got {strength!r}")
    if defense == "top-k":
        if strength != int(strength) or not 1 <= strength <= width:
            raise ValueError(f"top-k: expected a whole k from 1 to {width}, got {strength!r}")
        return int(strength)
    if strength < 0 or (defense == "temperature" and strength == 0):
        raise ValueError(f"{defense}: expected {name} {'>' if defense == 'temperature' else '>='} 0, got {strength!r}")
    return float(strength)


def measure_scale(
    encoder: Encoder, images: np.ndarray, *, output: str = "embed", pooling: str | None = None, batch_size: int = 256
) -> float:
    """Measure how widely an encoder's outputs vary, to express the sigma of noise in standard deviations.

    Args:
        images: (N, H, W, 3) uint8, at least 2.
        output: ``"embed"`` (pooled by ``pooling``) or ``"tokens"``.

    Returns:
        Standard deviation over the images, root mean square over the dimensions.
    """
    if output not in ("embed", "tokens") or len(images) < 2:
        raise ValueError(f"expected output 'embed' or 'tokens' and 2 images, got {output!r} and {len(images)}")
    query = encoder.tokens if output == "tokens" else lambda x: encoder.embed(x, pooling)
    batches = (slice(start, start + batch_size) for start in range(0, len(images), batch_size))
    with torch.inference_mode():
        pixels = (views.read_pixels(images, rows).contiguous().float().div_(255) for rows in batches)
        parts = [query(x).flatten(0, -2).double().cpu() for x in pixels]
    return float(torch.cat(parts).var(dim=0).mean().sqrt())


def _hash_rows(batch: Tensor) -> list[str]:
    """Return one key per row (image or mask): equal values, equal key."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in batch.detach().cpu().numpy()]


class _Defended:
    """What the wrappers share: the model behind them, whose methods they have, and noise keyed by its input."""

    def __init__(self, model: object, change: Change, defense: tuple):
        vars(self).update(vars(model) | {"_behind": model, "_change": change, "defense": defense})

    def _perturb(self, x: Tensor, images: Tensor, output: str, masks: Tensor | None = None) -> Tensor:
        """Change the outputs (N, ...) for images (N, ...), or (N M, ...) for each image under its M masks (N M, L)."""
        name, strength, seed = self.defense

        def draw() -> Tensor:
            keys = _hash_rows(images.float())
            if masks is not None:
                keys = [key for key in keys for _ in range(len(masks) // len(images))]
                keys = [key + hidden for key, hidden in zip(keys, _hash_rows(masks), strict=True)]
            made = np.empty(x.shape, np.float32)
            for row, key in zip(made, keys, strict=True):
                seeds.rng(seed, "defense", name, output, key).standard_normal(out=row, dtype=np.float32)
            return torch.from_numpy(made).to(x.device)

        return self._change(x, strength, draw)

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

    def __init__(self, autoencoder: object, change: Change, defense: tuple):
        nn.Module.__init__(self)
        if isinstance(autoencoder, nn.Module):
            self.module = autoencoder  # its weights are this module's: device, eval mode and fingerprint see them
        vars(self).update({"_behind": autoencoder, "_change": change, "defense": defense})

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
