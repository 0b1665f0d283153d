"""The attacker network of PartCrop, shared by every attack that learns from features.

Source: PartCrop (arXiv 2404.02462), released code a5078d6; the v2 variant: arXiv 2505.10351.
A perceptron F-512-256-128-1 with ReLU, weights N(0, 0.01), zero biases, trained with binary cross-entropy, Adam 1e-3,
weight decay 5e-4, batches of 100 members and 100 non-members. v2 divides the input and the output of every hidden
linear layer by its root mean square and uses Tanh.

Differences from the paper: the epoch is chosen on validation data that are never reported on (the released code takes
the best epoch on the report set), and training looks at validation every 10 steps and stops when 10 looks brought
nothing better. The paper's 100 epochs of 5,000 + 5,000 images are 5,000 steps (20 s on one core); on a few hundred
members the network overfits long before. Pilot on sorted synthetic curves like PartCrop's energies (205 members,
level hidden by a nuisance factor): v1 and v2 leave the initial plateau within 10 to 30 steps on raw features, and
validation peaks between step 20 and 320. The report AUC at the chosen step (of 500, no patience) was .903 / .688 raw
and .902 / .704 standardized (v1; strong / weak signal), .907 / .703 and .892 / .695 (v2), against .911 / .702 of a
logistic regression: no reason to leave the paper's raw features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from torch import nn
from torch.nn import functional as F

from mia_utils import seeds

# hidden layers of the paper's ablation
WIDTHS = {
    "base": (512, 256, 128),
    "wide": (1024, 512, 256),
    "narrow": (256, 128, 64),
    "deep": (512, 256, 256, 128),
    "shallow": (512, 128),
}
VERSIONS = ("v1", "v2")


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) over the last axis, without parameters (PartCrop-v2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, F)."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def make_network(
    n_features: int, *, widths: Sequence[int] = WIDTHS["base"], version: str = "v1", seed: int = 0
) -> nn.Sequential:
    """Build the attacker perceptron with its initialization.

    Args:
        n_features: F, the input size.
        widths: hidden layer sizes.
        version: "v1" (linear, ReLU) or "v2" (norm, then linear, norm, Tanh per hidden layer).
        seed: seed of the private initialization stream.

    Returns:
        Module (N, F) -> (N, 1): logits, higher = more likely a member.

    Raises:
        ValueError: unknown version or an empty layer.
    """
    if version not in VERSIONS:
        raise ValueError(f"expected version in {VERSIONS}, got {version!r}")
    if not widths or any(int(w) < 1 for w in widths):
        raise ValueError(f"expected positive hidden widths, got {tuple(widths)}")
    generator = seeds.generator(seed, "classifier.init")
    layers: list[nn.Module] = [RootMeanSquareNorm()] if version == "v2" else []
    sizes = [n_features, *map(int, widths), 1]
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        # skip_init: the default initialization would draw from the global generator
        linear = nn.utils.skip_init(nn.Linear, n_in, n_out)
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i < len(widths):
            layers += [RootMeanSquareNorm(), nn.Tanh()] if version == "v2" else [nn.ReLU()]
    return nn.Sequential(*layers)


class Attacker:
    """A fitted attacker.

    Attributes:
        network: (N, F) -> (N, 1) logits, with the weights of the best epoch, in float64.
        history: DataFrame ``epoch, steps, loss, validation_loss, validation_auc``; epoch counts from 1.
        best_epoch: epoch with the highest validation AUC, ties by validation loss.
        threshold: highest balanced accuracy on validation; ``score >= threshold`` means member.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        shift: np.ndarray,
        scale: np.ndarray,
        history: pd.DataFrame,
        best_epoch: int,
        threshold: float,
    ) -> None:
        self.network = network
        self.history = history
        self.best_epoch = best_epoch
        self.threshold = threshold
        self._shift, self._scale = shift, scale

    def score(self, features: np.ndarray | torch.Tensor) -> np.ndarray:
        """Score images.

        Args:
            features: (N, F) as in ``fit``.

        Returns:
            (N,) float64 logits, higher = more likely a member; an image's score does not depend on its batch mates.
        """
        x = _check_features(features, "features")
        if x.shape[1] != len(self._shift):
            raise ValueError(f"expected features of shape (N, {len(self._shift)}), got {x.shape}")
        # float64: matrix products of other batch sizes then agree to about 1e-14, far below any score difference
        z = torch.from_numpy((x.astype(np.float64) - self._shift) / self._scale)
        with torch.inference_mode():
            return torch.cat([self.network(part)[:, 0] for part in z.split(4096)]).numpy()


def fit(
    features: np.ndarray | torch.Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    widths: Sequence[int] = WIDTHS["base"],
    version: str = "v1",
    epochs: int = 100,
    batch_size: int = 100,
    lr: float = 1e-3,
    weight_decay: float = 5e-4,
    steps_per_epoch: int = 10,
    patience: int | None = 10,
    standardize: bool = False,
    seed: int = 0,
) -> Attacker:
    """Fit the attacker on labelled features and choose its epoch on validation data.

    Source: PartCrop (arXiv 2404.02462); ``steps_per_epoch`` and ``patience`` are ours (see the module's text), the
    other defaults are the released code's. The paper's own schedule: ``steps_per_epoch=50, patience=None``.

    Args:
        features: (N, F) float, finite.
        is_member: (N,) bool.
        validation: ``(features (M, F), is_member (M,))``, disjoint from the fit set and from every image reported on.
        widths: hidden layers, see ``WIDTHS``.
        version: "v1" or "v2".
        epochs: upper bound of epochs.
        batch_size: members and as many non-members per step; the smaller class where it has fewer.
        lr, weight_decay: of Adam.
        steps_per_epoch: optimizer steps between two looks at the validation set.
        patience: stop after so many epochs without a better validation AUC; None trains all epochs.
        standardize: first bring every column to mean 0 and standard deviation 1 of the fit set (not in the paper).
        seed: seed of the private initialization and batch streams.

    Returns:
        ``Attacker``.

    Raises:
        ValueError: shapes differ, features are not finite, a class is missing, unknown version.
    """
    n_features = _check_features(features, "fit features").shape[1]
    return train(
        make_network(n_features, widths=widths, version=version, seed=seed),
        features,
        is_member,
        validation=validation,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        steps_per_epoch=steps_per_epoch,
        patience=patience,
        standardize=standardize,
        seed=seed,
    )


def train(
    network: nn.Module,
    features: np.ndarray | torch.Tensor,
    is_member: np.ndarray,
    *,
    validation: tuple[Any, Any],
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    steps_per_epoch: int,
    patience: int | None,
    standardize: bool = False,
    max_norm: float | None = None,
    seed: int = 0,
) -> Attacker:
    """Train any attacker network on balanced batches and keep the weights of its best epoch on validation data.

    Args:
        network: (N, F) float32 -> (N, 1) logits, higher = more likely a member; trained in place.
        max_norm: bound on the norm of a step's gradient; None: none.
        features, is_member, validation, and the other options: as in :func:`fit`, which says what they mean.

    Returns:
        ``Attacker``.

    Raises:
        ValueError: shapes differ, features are not finite, a class is missing.
    """
    x, y = _check_pair(features, is_member, "fit")
    x_val, y_val = _check_pair(*validation, "validation")
    if x.shape[1] != x_val.shape[1]:
        raise ValueError(f"expected validation features of shape (M, {x.shape[1]}), got {x_val.shape}")
    if min(epochs, batch_size, steps_per_epoch) < 1 or (patience is not None and patience < 1):
        given = f"{epochs}, {batch_size}, {steps_per_epoch}, {patience}"
        raise ValueError(f"expected epochs, batch_size, steps_per_epoch and patience >= 1, got {given}")
    shift, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardize:
        shift, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        scale[scale == 0] = 1.0
    x = torch.from_numpy(((x - shift) / scale).astype(np.float32))
    x_val = torch.from_numpy(((x_val - shift) / scale).astype(np.float32))

    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batches = _draw_batches(y, batch_size, seeds.generator(seed, "classifier.batches"))
    rows, best, best_state = [], None, None
    for epoch in range(1, epochs + 1):
        total = 0.0
        network.train()
        for _ in range(steps_per_epoch):
            idx, target = next(batches)
            loss = F.binary_cross_entropy_with_logits(network(x[idx])[:, 0], target)
            optimizer.zero_grad()
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(network.parameters(), max_norm)
            optimizer.step()
            total += loss.item()
        network.eval()
        with torch.inference_mode():
            logit = network(x_val)[:, 0].double().numpy()
        auc, val_loss = float(roc_auc_score(y_val, logit)), _compute_balanced_loss(logit, y_val)
        rows.append((epoch, epoch * steps_per_epoch, total / steps_per_epoch, val_loss, auc))
        if best is None or (auc, -val_loss) > (best[0], -best[1]):
            best = (auc, val_loss, epoch)
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        if patience is not None and epoch - best[2] >= patience:
            break
    network.load_state_dict(best_state)
    attacker = Attacker(
        network.double().eval().requires_grad_(False),
        shift=shift,
        scale=scale,
        history=pd.DataFrame(rows, columns=["epoch", "steps", "loss", "validation_loss", "validation_auc"]),
        best_epoch=best[2],
        threshold=np.nan,
    )
    attacker.threshold = pick_threshold(attacker.score(validation[0]), y_val)
    return attacker


def pick_threshold(score: np.ndarray, is_member: np.ndarray) -> float:
    """Pick the threshold with the highest balanced accuracy.

    Args:
        score: (N,) float, higher = more likely a member. Not the scores that are reported.
        is_member: (N,) bool.

    Returns:
        float for ``score >= threshold``, halfway to the next lower score so that it does not sit on one image.
    """
    fpr, tpr, thresholds = roc_curve(is_member, score, drop_intermediate=False)
    at = int(np.argmax(tpr - fpr))
    if not np.isfinite(thresholds[at]):
        at = 1  # nothing beats "nobody is a member": still return a finite threshold
    lower = np.asarray(score)[np.asarray(score) < thresholds[at]]
    return float(thresholds[at] if not len(lower) else (thresholds[at] + lower.max()) / 2)


def _draw_batches(is_member: np.ndarray, batch_size: int, generator: torch.Generator) -> Any:
    """Yield balanced (indices, targets) without end; each class is reshuffled when it is used up."""
    classes = [torch.from_numpy(np.flatnonzero(is_member)), torch.from_numpy(np.flatnonzero(~is_member))]
    size = min(batch_size, *map(len, classes))
    target = torch.cat([torch.ones(size), torch.zeros(size)])
    queues = [idx[:0] for idx in classes]
    while True:
        for c, idx in enumerate(classes):
            if len(queues[c]) < size:
                queues[c] = torch.cat([queues[c], idx[torch.randperm(len(idx), generator=generator)]])
        yield torch.cat([queue[:size] for queue in queues]), target
        queues = [queue[size:] for queue in queues]


def _compute_balanced_loss(logit: np.ndarray, is_member: np.ndarray) -> float:
    """Cross-entropy, both classes weighing the same however many images they have."""
    loss = np.logaddexp(0, np.where(is_member, -logit, logit))
    return float((loss[is_member].mean() + loss[~is_member].mean()) / 2)


def _check_features(features: Any, name: str) -> np.ndarray:
    x = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    if x.ndim != 2:
        raise ValueError(f"expected {name} of shape (N, F), got {x.shape}")
    bad = int((~np.isfinite(x)).any(axis=1).sum())
    if bad:
        raise ValueError(f"expected finite {name}, got NaN or infinite values in {bad} of {len(x)} rows")
    return x


def _check_pair(features: Any, is_member: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _check_features(features, f"{name} features"), np.asarray(is_member).astype(bool)
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected {name} labels of shape ({len(x)},), got {y.shape}")
    if not 0 < y.sum() < len(y):
        raise ValueError(f"expected members and non-members to {name}, got {int(y.sum())} members of {len(y)}")
    return x, y
