"""The attacker network of PartCrop, and the early-stopping loop that every trained attacker shares.

Source: PartCrop (arXiv 2404.02462), released code a5078d6; the v2 variant: arXiv 2505.10351. A perceptron
F-512-256-128-1 with ReLU, weights N(0, 0.01), zero biases, binary cross-entropy, Adam 1e-3, weight decay 5e-4, batches
of 100 members and 100 non-members. v2 divides the input and the output of every hidden linear layer by its root mean
square and uses Tanh.

Ours: the epoch is chosen on attack-validation images (the released code takes the best epoch on the evaluation set),
every 10 steps, and training stops when 10 looks brought nothing better. The paper's 100 epochs of 5,000 + 5,000 images
are 5,000 steps; on a few hundred members validation peaks between step 20 and 320. Features stay raw: standardizing
them changed the AUC of a pilot by .00 to .02.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_curve
from torch import nn
from torch.nn import functional as F

from mia_utils import seeds

# hidden layers of the paper's ablation
WIDTHS = {"base": (512, 256, 128), "wide": (1024, 512, 256), "narrow": (256, 128, 64)}
WIDTHS |= {"deep": (512, 256, 256, 128), "shallow": (512, 128)}
VERSIONS = ("v1", "v2")
# Eight times cheaper than the paper's at the same AUC (.844 against .849, .629 against .631): evaluate(..., **CHEAP)
CHEAP = {"widths": (128, 64), "patience": 5, "epochs": 50}


class RootMeanSquareNorm(nn.Module):
    """x / sqrt(mean x^2 + 1e-6) over the last axis, without parameters (PartCrop-v2)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, F) -> (N, F)."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def make_network(
    n_features: int, *, widths: Sequence[int] = WIDTHS["base"], version: str = "v1", seed: int = 0
) -> nn.Sequential:
    """Build the attacker perceptron (N, F) -> (N, 1): logits, higher = more likely a member.

    Args:
        n_features: F, the input size.
        widths: hidden layer sizes.
        version: "v1" (linear, ReLU) or "v2" (norm, then linear, norm, Tanh per hidden layer).
        seed: seed of the private initialization stream.
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

    def __init__(self, network: nn.Module, *, shift: np.ndarray, scale: np.ndarray) -> None:
        self.network, self._shift, self._scale = network, shift, scale
        self.history, self.best_epoch, self.threshold = pd.DataFrame(), 0, np.nan

    def score(self, features: np.ndarray | torch.Tensor) -> np.ndarray:
        """Score images: (N, F) as in ``fit`` -> (N,) float64 logits, higher = more likely a member."""
        x = check_features(features, "features")
        if x.shape[1] != len(self._shift):
            raise ValueError(f"expected features of shape (N, {len(self._shift)}), got {x.shape}")
        # float64: matrix products of other batch sizes then agree to about 1e-14, so batch mates do not matter
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
    """Fit the attacker perceptron on labeled features and choose its epoch on validation data.

    Source: PartCrop (arXiv 2404.02462), released defaults; ``steps_per_epoch`` and ``patience`` are ours. The paper's
    own schedule: ``steps_per_epoch=50, patience=None``.

    Args:
        features: (N, F) float, finite.
        is_member: (N,) bool.
        validation: ``(features (M, F), is_member (M,))``, disjoint from the fit set and from every evaluated image.
        widths, version: see :func:`make_network`.
        epochs: upper bound of looks at the validation set.
        batch_size: members and as many non-members per step; the smaller class where it has fewer.
        lr, weight_decay: of Adam.
        steps_per_epoch: optimizer steps between two looks.
        patience: stop after so many looks without a better validation AUC; None trains all epochs.
        standardize: first bring every column to mean 0 and standard deviation 1 of the fit set (not in the paper).
        seed: seed of the private initialization and batch streams.
    """
    n_features = check_features(features, "fit features").shape[1]
    options = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, standardize=standardize)
    options |= dict(validation=validation, steps_per_epoch=steps_per_epoch, patience=patience, seed=seed)
    return train(make_network(n_features, widths=widths, version=version, seed=seed), features, is_member, **options)


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
    """Train any network (N, F) float32 -> (N, 1) logits on balanced batches, in place; options as in :func:`fit`.

    ``max_norm`` bounds the norm of a step's gradient (None: no bound).
    """
    x, y = check_pair(features, is_member, "fit")
    x_val, y_val = check_pair(*validation, "validation")
    if x.shape[1] != x_val.shape[1]:
        raise ValueError(f"expected validation features of shape (M, {x.shape[1]}), got {x_val.shape}")
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    shift, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardize:
        shift, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        scale[scale == 0] = 1.0
    x = torch.from_numpy(((x - shift) / scale).astype(np.float32))
    x_val = torch.from_numpy(((x_val - shift) / scale).astype(np.float32))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batches = draw_batches(y, batch_size, seeds.generator(seed, "classifier.batches"))

    def take_step() -> float:
        idx, target = next(batches)
        loss = F.binary_cross_entropy_with_logits(network(x[idx])[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()
        return loss.item()

    def look() -> dict[str, float]:
        logit = network(x_val)[:, 0].double().numpy()
        loss = np.logaddexp(0, np.where(y_val, -logit, logit))
        balanced = (loss[y_val].mean() + loss[~y_val].mean()) / 2  # both classes weigh the same
        return {"validation_loss": float(balanced), "validation_auc": compute_auc(logit, y_val)}

    attacker = Attacker(network, shift=shift, scale=scale)
    attacker.history, attacker.best_epoch = stop_early(
        network, take_step, look, epochs=epochs, steps_per_epoch=steps_per_epoch, patience=patience
    )
    network.double()
    attacker.threshold = pick_threshold(attacker.score(validation[0]), y_val)
    return attacker


def stop_early(
    network: nn.Module,
    take_step: Callable[[], float],
    look: Callable[[], dict[str, float]],
    *,
    epochs: int,
    steps_per_epoch: int,
    patience: int | None,
) -> tuple[pd.DataFrame, int]:
    """Train until validation stops improving; the network keeps the weights of its best epoch, frozen, in eval mode.

    Args:
        network: trained in place.
        take_step: () -> loss of one optimizer step.
        look: () -> ``validation_auc`` and, if ties of it are to be broken, ``validation_loss``; called in eval mode.
        epochs, steps_per_epoch, patience: as in :func:`fit`.

    Returns:
        history (``epoch, steps, loss`` and what ``look`` returned) and the best epoch, counted from 1.
    """
    if min(epochs, steps_per_epoch) < 1 or (patience is not None and patience < 1):
        given = f"{epochs}, {steps_per_epoch}, {patience}"
        raise ValueError(f"expected epochs, steps_per_epoch and patience >= 1, got {given}")
    rows, best, best_epoch, best_state = [], None, 0, None
    for epoch in range(1, epochs + 1):
        network.train()
        total = sum(take_step() for _ in range(steps_per_epoch))
        network.eval()
        with torch.inference_mode():
            seen = look()
        rows.append({"epoch": epoch, "steps": epoch * steps_per_epoch, "loss": total / steps_per_epoch} | seen)
        key = seen["validation_auc"], -seen.get("validation_loss", 0.0)
        if best is None or key > best:
            best, best_epoch = key, epoch
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        if patience is not None and epoch - best_epoch >= patience:
            break
    network.load_state_dict(best_state)
    network.eval().requires_grad_(False)
    return pd.DataFrame(rows), best_epoch


def compute_auc(score: np.ndarray, is_member: np.ndarray) -> float:
    """AUC by the rank sum (Mann-Whitney; ties count half): scikit-learn's number in a twentieth of its time."""
    n_members = int(is_member.sum())
    rank_sum = rankdata(score)[is_member].sum() - n_members * (n_members + 1) / 2
    return float(rank_sum / (n_members * (len(is_member) - n_members)))


def pick_threshold(score: np.ndarray, is_member: np.ndarray) -> float:
    """Pick the threshold of ``score >= threshold`` with the highest balanced accuracy, on scores not evaluated.

    It lies halfway to the next lower score, so that it does not sit on one image.
    """
    fpr, tpr, thresholds = roc_curve(is_member, score, drop_intermediate=False)
    at = int(np.argmax(tpr - fpr))
    if not np.isfinite(thresholds[at]):
        at = 1  # nothing beats "no image is a member": still return a finite threshold
    lower = np.asarray(score)[np.asarray(score) < thresholds[at]]
    return float(thresholds[at] if not len(lower) else (thresholds[at] + lower.max()) / 2)


def draw_batches(
    is_member: np.ndarray, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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


def check_features(features: Any, name: str, *, maps: bool = False) -> np.ndarray:
    """Return finite features as an array: (N, F), or with ``maps`` float (N, C, H, W)."""
    x = features.detach().cpu().numpy() if isinstance(features, torch.Tensor) else np.asarray(features)
    if x.ndim != (4 if maps else 2) or (maps and x.dtype.kind != "f"):
        expected = "as float maps (N, C, H, W)" if maps else "of shape (N, F)"
        raise ValueError(f"expected {name} {expected}, got {x.shape} {x.dtype}")
    bad = int((~np.isfinite(x)).any(axis=tuple(range(1, x.ndim))).sum())
    if bad:
        raise ValueError(f"expected finite {name}, got NaN or infinite values in {bad} of {len(x)} rows")
    return x


def check_pair(features: Any, is_member: Any, name: str, *, maps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return checked features and labels (N,) bool of both classes."""
    x, y = check_features(features, f"{name} features", maps=maps), np.asarray(is_member).astype(bool)
    if y.shape != x.shape[:1]:
        raise ValueError(f"expected {name} labels of shape ({len(x)},), got {y.shape}")
    if not 0 < y.sum() < len(y):
        raise ValueError(f"expected members and non-members to {name}, got {int(y.sum())} members of {len(y)}")
    return x, y
