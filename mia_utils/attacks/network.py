"""The attacker network of PartCrop, and the early-stopping loop that every trained attacker shares.

Source: PartCrop (arXiv 2404.02462), released code a5078d6; v2: arXiv 2505.10351. Ours: the epoch is chosen on
attack-validation images (the released code takes the best epoch on the evaluation set), every 10 steps, and training
stops when 10 looks brought nothing better; the paper's own schedule is ``steps_per_epoch=50, patience=None``.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from mia_utils import seeds


def make_network(n_features: int, *, widths: Sequence[int], seed: int, normalized: bool = False) -> nn.Sequential:
    """Build PartCrop's perceptron (N, F) -> (N, 1) logits; v2 is ``normalized``: root mean square norms and Tanh."""
    norm = functools.partial(nn.RMSNorm, eps=1e-6, elementwise_affine=False)
    generator, sizes = seeds.generator(seed, "classifier.init"), [n_features, *map(int, widths), 1]
    layers: list[nn.Module] = [norm(n_features)] if normalized else []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        # skip_init: the default initialization would draw from the global generator
        layers.append(nn.utils.skip_init(nn.Linear, n_in, n_out))
        nn.init.normal_(layers[-1].weight, std=0.01, generator=generator)
        nn.init.zeros_(layers[-1].bias)
        layers += [norm(n_out), nn.Tanh()] if normalized else [nn.ReLU()]
    return nn.Sequential(*layers[: -2 if normalized else -1])  # nothing follows the logit


@dataclass
class Attacker:
    """A fitted attacker: ``network`` maps (N, F) to logits (N, 1) in float64 with the weights of its best epoch."""

    network: nn.Module
    n_features: int

    def score(self, features: np.ndarray | Tensor) -> np.ndarray:
        """Score images: (N, F) as in ``fit`` -> (N,) float64 logits, higher = more likely a member."""
        x = check_features(features, "features")
        if x.shape[1] != self.n_features:
            raise ValueError(f"expected features of shape (N, {self.n_features}), got {x.shape}")
        # float64: matrix products of other batch sizes then agree to about 1e-14, so batch mates do not matter
        with torch.inference_mode():
            parts = torch.from_numpy(x.astype(np.float64)).split(4096)
            return torch.cat([self.network(part)[:, 0] for part in parts]).numpy()


def fit(
    features: np.ndarray | Tensor, is_member: np.ndarray, *, validation: tuple[Any, Any],
    make: Callable[..., nn.Module] = make_network, widths: Sequence[int] = (512, 256, 128), epochs: int = 100,
    batch_size: int = 100, lr: float = 1e-3, weight_decay: float = 5e-4, max_norm: float | None = None,
    steps_per_epoch: int = 10, patience: int | None = 10, seed: int = 0,
) -> Attacker:  # fmt: skip
    """Fit an attacker on labeled features (N, F) and choose its epoch on validation data.

    Args:
        validation: ``(features (M, F), is_member (M,) bool)``, disjoint from the fit set and every evaluated image.
        make: ``make(F, widths=widths, seed=seed)`` gives a network (N, F) float32 -> (N, 1) logits.
        epochs: upper bound of looks at the validation set, ``steps_per_epoch`` optimizer steps apart.
        batch_size: members and as many non-members per step; the smaller class where it has fewer.
        max_norm: bound on the norm of a step's gradient.
        patience: stop after so many looks without a better validation AUC; None trains all epochs.
    """
    x, y, x_val, y_val = check_sets(features, is_member, validation)
    if not widths or min(map(int, widths)) < 1:
        raise ValueError(f"expected positive hidden widths, got {tuple(widths)}")
    network = make(x.shape[1], widths=widths, seed=seed)
    x, x_val = (torch.from_numpy(part.astype(np.float32)) for part in (x, x_val))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    batches = draw_batches(y, batch_size, seeds.generator(seed, "classifier.batches"))

    def take_step() -> None:
        idx, target = next(batches)
        loss = F.binary_cross_entropy_with_logits(network(x[idx])[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        optimizer.step()

    def look() -> dict[str, float]:
        logit = network(x_val)[:, 0].double().numpy()
        loss = np.logaddexp(0, np.where(y_val, -logit, logit))
        balanced = (loss[y_val].mean() + loss[~y_val].mean()) / 2  # both classes weigh the same
        return {"validation_loss": float(balanced), "validation_auc": compute_auc(logit, y_val)}

    length = dict(epochs=epochs, steps_per_epoch=steps_per_epoch, patience=patience)
    stop_early(network, take_step, look, **length)
    return Attacker(network.double(), x.shape[1])


def stop_early(
    network: nn.Module, take_step: Callable[[], None], look: Callable[[], dict[str, float]], *, epochs: int,
    steps_per_epoch: int, patience: int | None,
) -> None:  # fmt: skip
    """Train until validation stops improving; the network keeps the weights of its best epoch, frozen, in eval mode.

    ``take_step()`` takes one optimizer step, ``look()`` returns ``validation_auc`` and, to break its ties,
    ``validation_loss``.
    """
    if min(epochs, steps_per_epoch, 1 if patience is None else patience) < 1:
        raise ValueError(f"expected epochs, steps_per_epoch and patience >= 1: {epochs}, {steps_per_epoch}, {patience}")
    best, best_epoch, best_state = None, 0, None
    for epoch in range(1, epochs + 1):
        network.train()
        for _ in range(steps_per_epoch):
            take_step()
        network.eval()
        with torch.inference_mode():
            seen = look()
        key = seen["validation_auc"], -seen.get("validation_loss", 0.0)
        if best is None or key > best:
            best, best_epoch = key, epoch
            best_state = {k: v.detach().clone() for k, v in network.state_dict().items()}
        if patience is not None and epoch - best_epoch >= patience:
            break
    network.load_state_dict(best_state)
    network.eval().requires_grad_(False)


def compute_auc(score: np.ndarray, is_member: np.ndarray) -> float:
    """AUC by the rank sum (Mann-Whitney; ties count half): scikit-learn's number in a twentieth of its time."""
    n_members = int(is_member.sum())
    rank_sum = rankdata(score)[is_member].sum() - n_members * (n_members + 1) / 2
    return float(rank_sum / (n_members * (len(is_member) - n_members)))


def pick_threshold(score: np.ndarray, is_member: np.ndarray) -> float:
    """Threshold of ``score >= threshold`` with the highest balanced accuracy, halfway to the next lower score."""
    fpr, tpr, thresholds = roc_curve(is_member, score, drop_intermediate=False)
    at = int(np.argmax(tpr - fpr)) or 1  # 0 is infinite (no image is a member): still return a finite threshold
    lower = np.asarray(score)[np.asarray(score) < thresholds[at]]
    return float(thresholds[at] if not len(lower) else (thresholds[at] + lower.max()) / 2)


def draw_batches(is_member: np.ndarray, batch_size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield balanced (indices, targets) without end; each class is reshuffled when it is used up."""
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
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
    """Return finite features as an array: (N, F), or maps (N, C, H, W)."""
    x = features.detach().cpu().numpy() if isinstance(features, Tensor) else np.asarray(features)
    if x.ndim != (4 if maps else 2):
        raise ValueError(f"expected {name} of shape {'(N, C, H, W)' if maps else '(N, F)'}, got {x.shape}")
    if bad := int((~np.isfinite(x)).any(axis=tuple(range(1, x.ndim))).sum()):
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


def check_sets(features: Any, is_member: Any, validation: tuple[Any, Any], *, maps: bool = False) -> tuple:
    """Return checked features and labels to fit and to validate."""
    x, y = check_pair(features, is_member, "fit", maps=maps)
    x_val, y_val = check_pair(*validation, "validation", maps=maps)
    if x.shape[1:] != x_val.shape[1:]:
        raise ValueError(f"expected validation features like those to fit, {x.shape[1:]}, got {x_val.shape[1:]}")
    return x, y, x_val, y_val
