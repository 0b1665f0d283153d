"""Accounting of private trainings: which can be private, what noise a budget needs, what a training guarantees.

Source: Abadi et al. 2016 (arXiv 1607.00133), Algorithm 1; Renyi accountant (Mironov et al. 2019, arXiv 1908.10530) of
opacus, which is imported where it is used because that takes seconds.
"""

import math
import warnings

ACCOUNTANT = "rdp"  # looser than "prv" by some percent, but stable for every noise and number of steps
METHODS = ("mae", "simmim", "unet")  # whose per-example gradients were checked
_COUPLING = {"mixup": "mixes two images", "distill": "trains a teacher that would not be private"}
_COUPLING |= {"minmax": "compares images"}
_KEYS = ("epsilon", "noise_multiplier", "delta", "max_grad_norm")


def refuse(method: str, cls: type, privacy: dict, options: dict, *, precision: str, frozen: bool) -> None:
    """Raise a one-line error for a training that can't be private, above all one that couples images."""
    coupling = next((name for name in _COUPLING if options.get(name)), "")
    for wrong, message in (
        (not isinstance(privacy, dict) or set(privacy) - set(_KEYS),
         f"expected privacy a mapping of {', '.join(_KEYS)}, got {privacy!r}"),
        (not hasattr(cls, "losses"),
         f"{method} can't be trained with privacy: it has no loss of each image alone (a contrastive loss compares the "
         "images of a batch, DINO's center is a mean over it, so clipping one image's gradient bounds nothing)"),
        (coupling, f"option {coupling} can't be combined with privacy: it {_COUPLING.get(coupling)}"),
        (frozen, "privacy= goes with a whole training: a decoder over a frozen encoder= is the attacker's own"),
        (precision != "32-true", f"private training needs precision '32-true', got {precision!r}"),
    ):  # fmt: skip
        if wrong:
            raise ValueError(message)


def plan_privacy(
    *, n_images: int, batch_size: int, steps: int, epsilon: float | None = None, noise_multiplier: float | None = None,
    delta: float = 1e-5, max_grad_norm: float = 1.2,
) -> dict[str, float | int | str]:  # fmt: skip
    """Choose the noise of a private training for its budget, and account for it.

    Args:
        n_images, batch_size: an image is in a Poisson batch with probability ``batch_size`` / ``n_images``.
        epsilon: budget; the noise is chosen for it. Exactly one of this and ``noise_multiplier``.
        noise_multiplier: sd of the noise in units of ``max_grad_norm``; 0 gives no privacy.
        delta: probability of what epsilon does not cover (usual: below 1 / n_images).
        max_grad_norm: norm C that each image's gradient is clipped to (PartCrop's authors: 1.2).

    Returns:
        What was given, epsilon (as reached; inf without noise), sample_rate and accountant.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError("privacy: expected epsilon or noise_multiplier, one of the two")
    given = {"delta": delta, "max_grad_norm": max_grad_norm, "epsilon": epsilon, "noise_multiplier": noise_multiplier}
    for key, value in given.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is None or (number and (value > 0 or value == 0 and key == "noise_multiplier")):
            continue
        raise ValueError(f"privacy: expected {key} a number above 0, got {value!r}")
    if delta >= 1:
        raise ValueError(f"privacy: expected delta below 1, got {delta!r}")
    count = dict(sample_rate=min(batch_size / n_images, 1.0), steps=int(steps))
    if noise_multiplier is None:
        from opacus.accountants.utils import get_noise_multiplier

        settings = count | dict(target_epsilon=epsilon, target_delta=delta, epsilon_tolerance=min(0.01, epsilon / 100))
        try:
            with warnings.catch_warnings(action="ignore"):  # at every try: its largest order was the best one
                noise_multiplier = get_noise_multiplier(**settings, accountant=ACCOUNTANT)
        except (ValueError, OverflowError, FloatingPointError):
            raise ValueError(
                f"privacy: no noise reaches epsilon {epsilon:g} at delta {delta:g} with sample rate "
                f"{count['sample_rate']:.3g} and {steps} steps: raise epsilon or delta, or train for fewer steps"
            ) from None
    reached = measure_epsilon(noise_multiplier=noise_multiplier, delta=delta, **count)
    plan = dict(epsilon=reached, delta=float(delta), max_grad_norm=float(max_grad_norm))
    return plan | dict(noise_multiplier=float(noise_multiplier), **count, accountant=ACCOUNTANT)


def measure_epsilon(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """Account for a training: the epsilon of Poisson-sampled Gaussian steps at this delta; inf without noise."""
    if noise_multiplier == 0:
        return math.inf
    from opacus.accountants import create_accountant

    accountant = create_accountant(mechanism=ACCOUNTANT)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings(action="ignore"):
        return float(accountant.get_epsilon(delta=delta))


def describe_privacy(plan: dict) -> str:
    """Say in one line what a private training guarantees, and by what."""
    return (
        f"differential privacy: epsilon {plan['epsilon']:.4g} at delta {plan['delta']:g} ({plan['accountant']}); each "
        f"image's gradient clipped to C = {plan['max_grad_norm']:g}, noise multiplier {plan['noise_multiplier']:.4g}, "
        f"sample rate {plan['sample_rate']:.4g}, {plan['steps']} steps"
    )
