"""Defenses: what the owner of a model can do against membership inference.

Three kinds. What a model *answers* is changed by :func:`perturb`, which wraps a trained encoder, autoencoder or
segmenter and keeps its face: noise, rounding, top-k, temperature, argmax, gauss. How it is *trained* is changed by
differentially private SGD (arithmetic, refusals and checks are here, the step is ``pretrain.private``) and by plain
regularizers, which are options of ``pretrain.fit``. What it *sees* is changed by the range of its crops (augmentation
``crop:LOW-HIGH``).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mia_utils import datasets, seeds
from mia_utils.models.encoders import Encoder
from mia_utils.models.segmenters import Segmenter
from mia_utils.runner import profiles

# ------------------------------------------------------------------------------------------------ outputs
# Each takes an answer, the strength, and a callable that draws standard normal noise of the answer's shape.

Noise = Callable[[], Tensor]


def _add_noise(answer: Tensor, sigma: float, noise: Noise) -> Tensor:
    return answer + sigma * noise()


def _round(answer: Tensor, step: float, noise: Noise) -> Tensor:
    return (answer / step).round() * step


def _keep_largest(answer: Tensor, k: int, noise: Noise) -> Tensor:
    """Keep the k largest magnitudes of each vector (last axis), zero the others."""
    kept = answer.abs().topk(k, dim=-1).indices
    return torch.zeros_like(answer).scatter(-1, kept, answer.gather(-1, kept))


def _add_noise_to_scores(posteriors: Tensor, sigma: float, noise: Noise) -> Tensor:
    """Noise on the logits: a shift common to all classes is no part of them, so log posteriors will do."""
    return (posteriors.log() + sigma * noise()).softmax(1)


def _add_noise_to_posteriors(posteriors: Tensor, sigma: float, noise: Noise) -> Tensor:
    """Source: Segmentations-Leak (arXiv 1912.09685), defense Gauss: add, clip at 1e-6, renormalize."""
    return _normalize((posteriors + sigma * noise()).clamp_min(1e-6))


def _round_posteriors(posteriors: Tensor, step: float, noise: Noise) -> Tensor:
    """Round and renormalize; a pixel whose classes all round to zero says nothing: uniform."""
    rounded = _round(posteriors, step, noise)
    return _normalize(torch.where(rounded.sum(1, keepdim=True) > 0, rounded, torch.ones_like(rounded)))


def _keep_likeliest(posteriors: Tensor, k: int, noise: Noise) -> Tensor:
    kept = posteriors.topk(k, dim=1)
    return _normalize(torch.zeros_like(posteriors).scatter(1, kept.indices, kept.values))


def _soften(posteriors: Tensor, temperature: float, noise: Noise) -> Tensor:
    return (posteriors.log() / temperature).softmax(1)


def _harden(posteriors: Tensor, strength: None, noise: Noise) -> Tensor:
    return torch.zeros_like(posteriors).scatter_(1, posteriors.argmax(1, keepdim=True), 1.0)


def _normalize(x: Tensor) -> Tensor:
    return x / x.sum(1, keepdim=True)


# output defense -> kind of model -> what it does; the strength is a sd, a step, k, a temperature, nothing, a sd
OUTPUTS: dict[str, dict[str, Callable[[Tensor, float | None, Noise], Tensor]]] = {
    "noise": {"encoder": _add_noise, "autoencoder": _add_noise, "segmenter": _add_noise_to_scores},
    "rounding": {"encoder": _round, "autoencoder": _round, "segmenter": _round_posteriors},
    "top-k": {"encoder": _keep_largest, "segmenter": _keep_likeliest},
    "temperature": {"segmenter": _soften},
    "argmax": {"segmenter": _harden},
    "gauss": {"segmenter": _add_noise_to_posteriors},
}
# strengths at which nothing is changed: the answer is returned as it is, bit by bit
_NEUTRAL = {"noise": 0.0, "rounding": 0.0, "gauss": 0.0, "temperature": 1.0}


def perturb(model: object, defense: str, strength: float | None = None, *, seed: int = 0) -> object:
    """Put an output defense before a model; the weights are shared, the model itself stays as it is.

    An image gets the same answer alone, in any batch and asked twice: its noise comes from a stream keyed by the seed
    and the image's own pixels. So asking again averages nothing away, and the global random state is not used.

    Args:
        model: ``Encoder``, ``Segmenter``, or an autoencoder with ``reconstruct`` and ``n_tokens``.
        defense: a key of ``OUTPUTS``.
        strength: ``noise``: sd, in units of tokens and embeddings (see :func:`measure_scale`), of reconstructed pixels
            in [0, 1], or of a segmenter's logits; ``gauss``: sd on posteriors; ``rounding``: step; ``top-k``: values
            kept of each vector, classes kept of each pixel; ``temperature``: of the posteriors, above 1 is softer;
            ``argmax``: none. Strength 0 of noise, gauss and rounding, and temperature 1, change no bit.
        seed: of the noise.

    Returns:
        A model with the same face, and ``defense = (name, strength, seed)``.

    Raises:
        ValueError: unknown defense, a strength outside its range, a model that the defense does not fit.
    """
    kind = _tell_kind(model)
    if defense not in OUTPUTS:
        raise ValueError(f"unknown output defense {defense!r}: expected one of {', '.join(OUTPUTS)}")
    if kind not in OUTPUTS[defense]:
        fitting = ", ".join(name for name, kinds in OUTPUTS.items() if kind in kinds)
        article = "a" if kind == "segmenter" else "an"
        raise ValueError(f"defense {defense!r} does not fit {article} {kind}: expected one of {fitting}")
    if getattr(model, "defense", None) is not None:
        raise ValueError(f"expected a model without output defense, got one behind {model.defense[0]!r}")
    width = {"encoder": "dim", "segmenter": "n_classes"}.get(kind)
    strength = _check_strength(defense, strength, getattr(model, width) if width else 0)
    change = OUTPUTS[defense][kind]
    if defense in _NEUTRAL and strength == _NEUTRAL[defense]:
        change = _change_nothing
    wrapper = {"encoder": _DefendedEncoder, "segmenter": _DefendedSegmenter, "autoencoder": _DefendedAutoencoder}[kind]
    return wrapper(model, change, (defense, strength, int(seed)))


def _change_nothing(answer: Tensor, strength: float, noise: Noise) -> Tensor:
    return answer


def _tell_kind(model: object) -> str:
    if isinstance(model, Segmenter):
        return "segmenter"
    if isinstance(model, Encoder):
        return "encoder"
    if callable(getattr(model, "reconstruct", None)) and hasattr(model, "n_tokens"):
        return "autoencoder"
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
    """Measure how widely an encoder's answers vary, to express the sigma of noise in standard deviations.

    Args:
        encoder: offers ``output``.
        images: (N, H, W, 3) uint8, at least 2.
        output: ``"embed"`` or ``"tokens"``.
        pooling: of ``embed``.

    Returns:
        float: the standard deviation over the images, root mean square over the dimensions.
    """
    if output not in ("embed", "tokens") or len(images) < 2:
        raise ValueError(f"expected output 'embed' or 'tokens' and 2 images, got {output!r} and {len(images)}")
    ask = encoder.tokens if output == "tokens" else lambda x: encoder.embed(x, pooling)
    with torch.inference_mode():
        parts = [
            ask(datasets.to_float(images[start : start + batch_size])).flatten(0, -2).double().cpu()
            for start in range(0, len(images), batch_size)
        ]
    return float(torch.cat(parts).var(dim=0).mean().sqrt())


# ------------------------------------------------------------------------------------------------ wrapped models


def _hash_rows(batch: Tensor) -> list[str]:
    """Return one key per row (image or mask): equal values, equal key."""
    rows = batch.detach().cpu().contiguous().numpy()
    return [hashlib.blake2b(row.tobytes(), digest_size=16).hexdigest() for row in rows]


class _Defended:
    """What the three wrappers share: the model behind them, and noise keyed by its input."""

    def _keep(self, model: object, change: Callable, defense: tuple) -> None:
        vars(self).update({"_behind": model, "_change": change, "defense": defense})

    def _answer(self, answer: Tensor, images: Tensor, output: str, masks: Tensor | None = None) -> Tensor:
        """Change the answers (N, ...) to images (N, ...), or (N M, ...) to every image under its M masks (N M, L)."""
        name, strength, seed = self.defense

        def draw() -> Tensor:
            keys = _hash_rows(images.float())
            if masks is not None:
                keys = [key for key in keys for _ in range(len(masks) // len(images))]
                keys = [key + hidden for key, hidden in zip(keys, _hash_rows(masks), strict=True)]
            made = np.empty(answer.shape, np.float32)
            for row, key in zip(made, keys, strict=True):
                seeds.rng(seed, "defense", name, output, key).standard_normal(out=row, dtype=np.float32)
            return torch.from_numpy(made).to(answer.device)

        return self._change(answer, strength, draw)

    def to(self, device: str | torch.device):
        """Move the model behind the defense; returns self."""
        self._behind.to(device)
        self.device = torch.device(device)
        return self


class _DefendedEncoder(_Defended, Encoder):
    def __init__(self, encoder: Encoder, change: Callable, defense: tuple):
        vars(self).update(vars(encoder))
        self._keep(encoder, change, defense)

    def tokens(self, images: Tensor) -> Tensor:
        return self._answer(self._behind.tokens(images), images, "tokens")

    def embed(self, images: Tensor, pooling: str | None = None) -> Tensor:
        answer = self._behind.embed(images, pooling)
        return self._answer(answer, images, f"embed-{self.pooling if pooling in (None, 'auto') else pooling}")


class _DefendedSegmenter(_Defended, Segmenter):
    def __init__(self, segmenter: Segmenter, change: Callable, defense: tuple):
        vars(self).update(vars(segmenter))
        self._keep(segmenter, change, defense)

    def posteriors(self, images: Tensor) -> Tensor:
        return self._answer(self._behind.posteriors(images), images, "posteriors")


class _DefendedAutoencoder(_Defended, nn.Module):
    """Perturbs reconstructions; everything else is that of the autoencoder behind it."""

    def __init__(self, autoencoder: object, change: Callable, defense: tuple):
        nn.Module.__init__(self)
        if isinstance(autoencoder, nn.Module):
            self.module = autoencoder  # its weights are this module's: device, eval mode and fingerprint see them
        self._keep(autoencoder, change, defense)

    def __getattr__(self, name: str):
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "_behind" not in vars(self):
                raise
            return getattr(vars(self)["_behind"], name)

    def reconstruct(self, images: Tensor, masks: Tensor) -> Tensor:
        """Reconstruct images (N, 3, H, W) from masks (N, L) or (L,)."""
        masks = masks.expand(len(images), -1) if masks.ndim == 1 else masks
        return self._answer(self._behind.reconstruct(images, masks), images, "pixels", masks)

    def reconstruct_from(self, tokens: Tensor, masks: Tensor, *, images: Tensor) -> Tensor:
        """Reconstruct every image from every mask (M, L): (N, M, 3, H, W)."""
        made = self._behind.reconstruct_from(tokens, masks, images=images)
        repeated = masks.repeat(len(images), 1)
        return self._answer(made.flatten(0, 1), images, "pixels", repeated).view_as(made)

    def to(self, *args, **kwargs):
        """As ``nn.Module.to``."""
        return nn.Module.to(self, *args, **kwargs)


# ------------------------------------------------------------------------------------------------ differential privacy

ACCOUNTANT = "rdp"  # looser than "prv" by some percent, but stable for every noise and number of steps
GRADIENT_TOLERANCE = 1e-3  # float32 sums in another order reach 2e-5; a wrong gradient is off by its own size
_CONTRASTIVE = "its loss compares the images of a batch, so clipping one image's gradient bounds nothing"
_COUPLED = {name: _CONTRASTIVE for name in ("simclr", "moco", "moco-v1", "moco-v2")}
_COUPLED["dino"] = "the center of its teacher is a mean over the batch, so clipping one image's gradient bounds nothing"
# opacus gives no gradients, or wrong ones, for these where they are expanded along the batch: they keep their start
_TOKENS = ("cls_token", "reg_token", "mask_token", "pos_embed")


def refuse_coupled(method: str, cls: type, options: dict | None = None) -> None:
    """Raise a one-line error for a training whose images can't be told apart in the gradient."""
    if method in _COUPLED:
        raise ValueError(f"{method} can't be trained with privacy: {_COUPLED[method]}")
    if not hasattr(cls, "losses"):
        raise ValueError(
            f"{method} can't be trained with privacy here: it has no loss per image (method losses) that was checked; "
            f"expected one of {', '.join(profiles.PRIVATE_METHODS)}"
        )
    for name, reason in (
        ("mixup", "mixes two images"),
        ("distill", "trains a teacher that would not be private"),
        ("minmax", "compares images"),
    ):
        if (options or {}).get(name):
            raise ValueError(f"option {name} can't be combined with privacy: it {reason}")


def plan_privacy(
    *,
    n_images: int,
    batch_size: int,
    steps: int,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    delta: float = 1e-5,
    max_grad_norm: float = 1.2,
) -> dict[str, float | int | str]:
    """Choose the noise of a private training for its budget, and account for it.

    Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; accountant of opacus (Renyi, Mironov et al. 2019).

    Args:
        n_images: images trained on.
        batch_size: expected size of a Poisson batch: every image is in it with probability batch_size / n_images.
        steps: optimizer steps.
        epsilon: budget; the noise is chosen for it. Exactly one of this and ``noise_multiplier``.
        noise_multiplier: sd of the noise in units of ``max_grad_norm``; 0 gives no privacy.
        delta: probability of what epsilon does not cover (usual: below 1 / n_images).
        max_grad_norm: norm C that each image's gradient is clipped to (PartCrop's authors: 1.2).

    Returns:
        dict: epsilon (that is reached; inf without noise), delta, max_grad_norm, noise_multiplier, sample_rate, steps,
        accountant.

    Raises:
        ValueError: a value outside its range, or a budget that no noise reaches.
    """
    given = {"delta": delta, "max_grad_norm": max_grad_norm, "epsilon": epsilon, "noise_multiplier": noise_multiplier}
    given = {key: value for key, value in given.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"privacy: expected a finite number as {key}, got {value!r}")
        if value < 0 or (value == 0 and key != "noise_multiplier"):
            raise ValueError(f"privacy: expected {key} {'>=' if key == 'noise_multiplier' else '>'} 0, got {value!r}")
    if delta >= 1:
        raise ValueError(f"privacy: expected delta below 1, got {delta!r}")
    if ("epsilon" in given) == ("noise_multiplier" in given):
        raise ValueError("privacy: expected epsilon or noise_multiplier, one of the two")
    rate = min(batch_size / n_images, 1.0)
    if noise_multiplier is None:
        noise_multiplier = _find_noise(epsilon, delta=delta, sample_rate=rate, steps=steps)
    reached = measure_epsilon(noise_multiplier=noise_multiplier, sample_rate=rate, steps=steps, delta=delta)
    plan = dict(epsilon=reached, delta=float(delta), max_grad_norm=float(max_grad_norm))
    return plan | dict(
        noise_multiplier=float(noise_multiplier), sample_rate=rate, steps=int(steps), accountant=ACCOUNTANT
    )


def _find_noise(epsilon: float, *, delta: float, sample_rate: float, steps: int) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    settings = dict(sample_rate=sample_rate, steps=steps, accountant=ACCOUNTANT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells at every try that its largest order was the best one
        try:
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon, target_delta=delta, epsilon_tolerance=min(0.01, epsilon / 100), **settings
                )
            )
        except (ValueError, OverflowError, FloatingPointError):
            raise ValueError(
                f"privacy: no noise reaches epsilon {epsilon:g} at delta {delta:g} with sample rate {sample_rate:.3g} "
                f"and {steps} steps: raise epsilon or delta, or train for fewer steps"
            ) from None


def measure_epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Account for a training: the epsilon of Poisson-sampled Gaussian steps at this delta; inf without noise."""
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism=ACCOUNTANT)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=delta))


def describe_privacy(plan: dict) -> str:
    """Say in one line what a private training guarantees, and by what."""
    return (
        f"differential privacy: epsilon {plan['epsilon']:.4g} at delta {plan['delta']:g} ({plan['accountant']}); each "
        f"image's gradient clipped to C = {plan['max_grad_norm']:g}, noise multiplier {plan['noise_multiplier']:.4g}, "
        f"sample rate {plan['sample_rate']:.4g}, {plan['steps']} steps"
    )


def freeze_tokens(method: nn.Module) -> list[str]:
    """Take class, mask and position tokens out of a private training; returns their names."""
    frozen = [name for name, _ in method.named_parameters() if name.split(".")[-1] in _TOKENS]
    for name in frozen:
        method.get_parameter(name).requires_grad_(False)
    return frozen


class _SameForAll:
    """Stands for the generator of a step: all images of a batch get the same draws, alone and in any batch."""

    def __init__(self, seed: int):
        self._rng = seeds.rng(seed, "compare-gradients")

    def random(self, size: Sequence[int], dtype: type = np.float64) -> np.ndarray:
        return np.repeat(self._rng.random((1, *size[1:]), dtype), size[0], axis=0)


def compare_gradients(
    method: nn.Module, images: Tensor, labels: Tensor | None = None, *, seed: int = 0
) -> dict[str, float]:
    """Compare the per-example gradients that opacus computes of a batch with those of each image alone.

    Args:
        method: in training mode, with ``losses``; its weights are not changed, its dropout is put to rest meanwhile.
        images: (B, 3, H, W) uint8.
        labels: (B, H, W) for segmenters.
        seed: of the masks.

    Returns:
        dict: parameter -> the largest difference over the images, relative to the norm of the gradient of one image
        alone (at least a thousandth of the norm over all parameters); nan where a parameter gets no gradient at all.

    Raises:
        ValueError: the network can't give per-example gradients.
    """
    from mia_utils.pretrain.privacy import PerExampleGradients  # opacus takes seconds to import

    resting = [m for m in method.modules() if m.training and type(m).__name__.startswith("Drop")]
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}

    def compute(rows: slice) -> Tensor:
        extra = {} if labels is None else {"labels": labels[rows]}
        settings = dict(augmentation="none", size=method.input_size, progress=0.0)
        return method.losses(images[rows], rng=_SameForAll(seed), **settings, **extra).sum()

    def compute_alone(row: int) -> dict[str, Tensor | None]:
        made = torch.autograd.grad(compute(slice(row, row + 1)), list(trained.values()), allow_unused=True)
        return dict(zip(trained, made, strict=True))

    for module in resting:
        module.eval()
    try:
        alone = [compute_alone(row) for row in range(len(images))]
        hooked = PerExampleGradients(method, loss_reduction="sum")
        hooked.backward(compute(slice(None)))
        together = {name: p.grad_sample for name, p in trained.items()}
        hooked.close()
    except (RuntimeError, AttributeError, ValueError) as error:
        buffers = isinstance(error, NotImplementedError)  # opacus' validator, a page long
        reason = "a trained layer holds buffers" if buffers else str(error).splitlines()[0][:160]
        raise ValueError(f"this network gives no per-example gradients, so it can't be private ({reason})") from None
    finally:
        for module in resting:
            module.train()
        for p in trained.values():
            p.grad = None
    least = [1e-3 * math.sqrt(sum(float(g.square().sum()) for g in one.values() if g is not None)) for one in alone]
    return {name: _compare([one[name] for one in alone], together[name], least) for name in trained}


def _compare(alone: list[Tensor | None], together: Tensor | list | None, least: list[float]) -> float:
    """Largest relative difference of one parameter's gradients; what is no (B, ...) tensor is wrong altogether."""
    if together is None:
        return math.nan if all(one is None for one in alone) else math.inf
    if not isinstance(together, Tensor) or len(together) != len(alone):
        return math.inf
    worst = 0.0
    for mine, one, floor in zip(together, alone, least, strict=True):
        expected = torch.zeros_like(mine) if one is None else one
        scale = max(float(expected.norm()), floor)
        worst = max(worst, float((mine - expected).norm()) / scale if scale else float(mine.norm() > 0))
    return worst


def require_private(method: nn.Module, images: Tensor, labels: Tensor | None = None) -> list[str]:
    """Refuse a network whose images are not told apart exactly; returns parameters that no image ever moves.

    Args: as in :func:`compare_gradients`; two or three images suffice.

    Raises:
        ValueError: one line with the reason: batch norm, no per-example gradients, or wrong ones.
    """
    norms = [name for name, m in method.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        raise ValueError(
            f"a network with batch norm can't be private ({norms[0]} and {len(norms) - 1} more): it mixes the images "
            "of a batch; expected group norm (option norm: group of a segmenter)"
        )
    errors = compare_gradients(method, images, labels)
    wrong = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
    if wrong:
        name = max(wrong, key=wrong.get)
        raise ValueError(
            f"this network can't be private: per-example gradients of {len(wrong)} of {len(errors)} parameters differ "
            f"from those of each image alone, most of all {name} (by {wrong[name]:.2g} of its size)"
        )
    return [name for name, error in errors.items() if math.isnan(error)]
