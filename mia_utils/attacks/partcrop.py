"""PartCrop: small crops of an image, embedded, probe the tokens of the whole image.

Source: Zhu, Zha, Li, Wang: PartCrop (CCS 2024, arXiv 2404.02462) and PartCrop-v2 (arXiv 2505.10351). Steps: 1 view and
K part crops, 2 embeddings, 3 responses of every token to every part, 4 energies, 5 sorted feature, 6 attacker
(``network.fit``). Ours: other probes than parts tell what the attack reads; and the token spread needs one query.
Letters: N images, K part crops, L tokens, D embedding, s side of a crop.
"""

import math
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mia_utils import seeds
from mia_utils.attacks import network, query
from mia_utils.models import views

KINDS = ("uniform", "gaussian", "both")
PROBES = ("parts", "random", "other-image")
EPS = 1e-6  # inside the logarithms of the two reference distributions, as released


def compute_responses(parts: Tensor, tokens: Tensor) -> Tensor:
    """Log-response log v_ij = log softmax_j <p_i, X_j>, (N, K, L), of tokens (N, L, D) to parts (N, K, D) (step 3)."""
    if parts.ndim != 3 or tokens.ndim != 3 or parts.shape[::2] != tokens.shape[::2]:
        got = f"{tuple(parts.shape)} and {tuple(tokens.shape)}"
        raise ValueError(f"expected parts (N, K, D) and tokens (N, L, D) of the same N and D, got {got}")
    if tokens.shape[1] < 2:
        raise ValueError(f"expected at least 2 tokens per image, got {tokens.shape[1]}: query a larger view")
    with torch.autocast(parts.device.type, enabled=False):  # energies of bfloat16 products are off by tenths
        s = parts @ tokens.transpose(1, 2)  # (N, K, D) x (N, D, L) -> (N, K, L)
    return torch.log_softmax(s, dim=-1)


def part_energies(
    parts: Tensor, tokens: Tensor, *, kind: str = "both", reference: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Describe every image by how far the responses of its parts are from two reference shapes (steps 3-5).

    Parts (N, K, D) and tokens (N, L, D) -> (N, K), or (N, 2K) for ``"both"``: each energy sorted in descending order,
    then [uniform; gaussian]; larger = sharper responses. ``reference`` (K, L) are standard normals of the Gaussian
    shape; None draws them from ``seed``, one table for all images: what it adds, it adds to members and non-members.
    """
    if kind not in KINDS:
        raise ValueError(f"expected kind {', '.join(KINDS)}, got {kind!r}")
    log_v = compute_responses(parts, tokens)  # (N, K, L)
    n_crops, n_tokens = log_v.shape[1:]
    energies = []
    if kind != "gaussian":  # u_i = sum_j 1/L [log(1/L + eps) - log v_ij]
        energies.append(math.log(1 / n_tokens + EPS) - log_v.mean(-1))  # (N, K)
    if kind != "uniform":
        if reference is None:
            reference = torch.randn(n_crops, n_tokens, generator=seeds.generator(seed, "partcrop-reference"))
        if reference.shape != (n_crops, n_tokens):
            raise ValueError(f"reference: expected (K, L) = {(n_crops, n_tokens)}, got {tuple(reference.shape)}")
        z = reference.to(log_v).sort(-1).values  # (K, L), ascending
        sd = z.std(-1, keepdim=True)  # unbiased
        q = torch.exp(-((z - z.mean(-1, keepdim=True)) ** 2) / (2 * sd**2)) / (math.sqrt(2 * math.pi) * sd)
        q = q / q.sum(-1, keepdim=True)  # (K, L), rows sum to one
        # g_i = sum_j q_ij [log(q_ij + eps) - log v_ij]
        energies.append((q * (torch.log(q + EPS) - log_v)).sum(-1))  # (N, K)
    return torch.cat([e.sort(-1, descending=True).values for e in energies], dim=-1)


def get_crop_size(input_size: int) -> int:
    """Side of a part crop in the paper: 16 of 32 pixels, 16 of 64; half of the view elsewhere."""
    return input_size // 4 if input_size == 64 else max(1, input_size // 2)


def get_chunk(encoder, n_crops: int, crop_size: int) -> int:
    """Images per forward so that crops, resampling and activations of a chunk fit memory."""
    side = max(crop_size, getattr(encoder, "min_size", None) or 0)
    crop_bytes = 4 * 3 * (side**2 + crop_size * encoder.input_size)
    share = min(1.0, side**2 / encoder.input_size**2)  # tokens of a crop against tokens of the view
    return query.fit_views(encoder, n_crops, 2 * crop_bytes, share=share, cache=64e6)


def iterate_parts(
    encoder, images: np.ndarray, *, image_ids: Sequence[str], n_crops: int = 128,
    crop_scale: Sequence[float] = (0.08, 0.2), crop_size: int | None = None, pooling: str = "auto",
    view: str | Sequence[str] = "resize", probes: str = "parts", seed: int = 0, batch_size: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield probes (n, K, D) and tokens (n, L, D) of chunks of images (steps 1, 2); see :func:`extract_features`."""
    if probes not in PROBES:
        raise ValueError(f"expected probes {', '.join(PROBES)}, got {probes!r}")
    images, size, device = views.check_images(images, image_ids), encoder.input_size, query.get_device(encoder)
    view_of, ids_of = np.broadcast_to(np.asarray(view), len(images)), np.asarray(image_ids)
    crop_size = crop_size or get_crop_size(size)
    partner = _pair_up(ids_of, seed) if probes == "other-image" else None
    chunk = batch_size or get_chunk(encoder, n_crops, crop_size)
    for rows in query.iterate_chunks(len(images), chunk, label="part crops", progress=progress):
        ids = ids_of[rows].tolist()
        draws = dict(height=size, width=size, scale=crop_scale, seed=seed, stream="partcrop")
        boxes, flips = views.draw_boxes(ids, n_crops, **draws)  # drawn while a GPU still works on the chunk before
        with torch.inference_mode():  # 1. global view G, then K parts cut from G
            whole = _view_whole(images, rows, ids_of, view_of, size=size, seed=seed, device=device)
            crops = views.resized_crop(whole, boxes, crop_size, flips=flips)  # (n, K, 3, s, s)
            # 2. all parts of the chunk in one forward
            parts = encoder.embed(crops.flatten(0, 1), pooling=pooling).unflatten(0, (len(ids), n_crops))  # (n, K, D)
            if partner is not None:
                whole = _view_whole(images, partner[rows], ids_of, view_of, size=size, seed=seed, device=device)
            tokens = encoder.tokens(whole)
            if probes == "random":  # as large as the image's own parts, in directions that know nothing of them
                streams = [seeds.generator(seed, "partcrop-probes", image_id) for image_id in ids]
                drawn = torch.stack([torch.randn(parts.shape[1:], generator=stream) for stream in streams])
                parts = parts.float().square().mean((1, 2), keepdim=True).sqrt() * drawn.to(parts.device)
        yield parts, tokens


def _view_whole(
    images: Any, rows: slice | np.ndarray, ids: np.ndarray, view_of: np.ndarray, *, size: int, seed: int, device
) -> Tensor:
    """Global views (n, 3, size, size) of some rows, each of its own kind."""
    pixels, kinds, ids = views.read_pixels(images, rows).to(device), view_of[rows], ids[rows]
    whole = torch.empty(len(ids), 3, size, size, device=device)
    for kind in np.unique(kinds):
        same = np.flatnonzero(kinds == kind)
        whole[same] = views.make_views(pixels[same], ids[same].tolist(), view=str(kind), size=size, seed=seed)
    return whole


def _pair_up(ids: np.ndarray, seed: int) -> np.ndarray:
    """Give every image another one of the same call, whatever their order: the next in a cycle of hashed ids."""
    if len(ids) == 1:
        raise ValueError("probes='other-image': expected at least 2 images, got 1")
    order = np.argsort([seeds.derive(seed, "partcrop-other", image_id) for image_id in ids], kind="stable")
    partner = np.empty(len(ids), int)
    partner[order] = np.roll(order, -1)
    return partner


def extract_features(
    encoder, images: np.ndarray, *, image_ids: Sequence[str], n_crops: int = 128,
    crop_scale: Sequence[float] = (0.08, 0.2), crop_size: int | None = None, pooling: str = "auto", kind: str = "both",
    view: str | Sequence[str] = "resize", probes: str = "parts", seed: int = 0, batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:  # fmt: skip
    """Query a frozen encoder with the parts of every image (steps 1-5): :func:`part_energies`, float32 on the CPU.

    Args:
        crop_scale: area range of a part as a share of the view (the paper's best of five); ``n_crops`` is K.
        view: global view, one name or one per image: ``"resize"``, or ``"random_resized_crop"`` as the released code
            has it for members only.
        probes: ``"parts"``; ``"random"``: K normal vectors of the parts' root mean square instead; ``"other-image"``:
            the parts probe the tokens of another of these images (seeded), so nothing of the image's own is left.
    """
    chunks = iterate_parts(
        encoder, images, image_ids=image_ids, n_crops=n_crops, crop_scale=crop_scale, crop_size=crop_size,
        pooling=pooling, view=view, probes=probes, seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    features = [part_energies(parts.float(), tokens.float(), kind=kind, seed=seed) for parts, tokens in chunks]
    return torch.cat(features).cpu() if features else torch.empty(0, n_crops * (2 if kind == "both" else 1))


def responses(encoder, image: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Response maps (P, L) float32 over the tokens of an image (H, W, 3) uint8; ``boxes`` as ``Pool.part_boxes``."""
    boxes, size = np.asarray(boxes, float), encoder.input_size
    present = ~np.isnan(boxes).any(axis=1)
    scale = size / np.array([image.shape[0], image.shape[1]] * 2)
    corners = np.rint(boxes[present] * scale).clip(0, size).astype(int)
    top_left = np.minimum(corners[:, :2], size - 1)
    extent = np.maximum(corners[:, 2:] - top_left, 1)  # a thin part keeps one pixel
    with torch.inference_mode():
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(query.get_device(encoder))
        whole = views.make_views(pixels, [""], size=size, seed=0)
        tokens = encoder.tokens(whole).float()
        maps = np.full((len(boxes), tokens.shape[1]), np.nan, np.float32)
        if present.any():
            box = torch.from_numpy(np.concatenate([top_left, extent], axis=1))[None]
            crops = views.resized_crop(whole, box, get_crop_size(size))[0]
            parts = encoder.embed(crops).float()[None]
            maps[present] = compute_responses(parts, tokens)[0].exp().cpu().numpy()
    return maps


def response_curves(encoder, images: np.ndarray, *, image_ids: Sequence[str], **options) -> np.ndarray:
    """Mean over the parts of v_ij sorted over the tokens, descending: (N, L) float32, the paper's Figure 2."""
    chunks = iterate_parts(encoder, images, image_ids=image_ids, **options)
    maps = (compute_responses(parts.float(), tokens.float()).exp() for parts, tokens in chunks)
    return torch.cat([v.sort(-1, descending=True).values.mean(1).cpu() for v in maps]).numpy()


def measure_tokens(tokens: Tensor) -> Tensor:
    """Logarithms (N, 5) of sizes of tokens X (N, L, D): sqrt(mean_j |X_j - mean X|^2), the spread; |mean X|; mean and
    largest |X_j|; largest |X_j - mean X|. Ours, no paper."""
    mean = tokens.mean(1, keepdim=True)
    away, long = (tokens - mean).norm(dim=-1), tokens.norm(dim=-1)  # (N, L)
    spread = away.square().mean(1).sqrt()
    sizes = [spread, mean.norm(dim=-1)[:, 0], long.mean(1), long.amax(1), away.amax(1)]
    return torch.stack(sizes, dim=1).clamp_min(EPS).log()


def extract_spread(
    encoder, images: np.ndarray, *, image_ids: Sequence[str], view: str | Sequence[str] = "resize", seed: int = 0,
    batch_size: int = 64, progress: bool = False,
) -> Tensor:  # fmt: skip
    """Query a frozen encoder once per image: (N, 5) float32 of :func:`measure_tokens`; arguments as above."""
    images, sizes = query.check_query(encoder, images, image_ids, need="tokens"), [torch.empty(0, 5)]
    view_of, ids = np.broadcast_to(np.asarray(view), len(images)), np.asarray(image_ids)
    where = dict(size=encoder.input_size, seed=seed, device=query.get_device(encoder))
    for rows in query.iterate_chunks(len(images), batch_size, label="tokens", progress=progress):
        with torch.inference_mode():
            sizes.append(measure_tokens(encoder.tokens(_view_whole(images, rows, ids, view_of, **where)).float()).cpu())
    return torch.cat(sizes)


def score_spread(features: np.ndarray | Tensor) -> np.ndarray:
    """Minus the log token spread, nothing is trained: (N, 5) -> (N,) float64, higher = more likely a member."""
    return -network.check_features(features, "features")[:, 0].astype(np.float64)


def fit_spread(
    features: np.ndarray | Tensor, is_member: np.ndarray, *, validation: tuple[Any, Any], seed: int = 0
) -> SimpleNamespace:
    """Logistic regression on the five sizes; ``validation``, ``seed`` are not used: all attackers are called alike."""
    x, y = network.check_pair(features, is_member, "fit")
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)).fit(x, y)
    return SimpleNamespace(score=lambda features: model.decision_function(np.asarray(features)))
