"""MIM attack: a masked-image model reconstructs its training images better than others.

Source: Li, He, Yu, Zhang (arXiv 2408.06825). Steps: 1 masks, 2 reconstructions, 3 distance to the true pixels, averaged
over the masks; 4 with a reference model, minus its distance. Models are often released without a decoder:
``train_decoder`` trains the attacker's own over the frozen encoder, a much weaker attack. Ours: M seeded masks,
the same for every image: what a mask adds by being hard it adds to members and non-members alike.
Letters: N images, M masks, L patches.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mia_utils import pretrain, seeds
from mia_utils.attacks import query
from mia_utils.models import views
from mia_utils.models.encoders import Encoder
from mia_utils.pretrain import method as training

CHOICES = {"distance": ("mse", "l1", "ssim"), "region": ("masked", "all"), "space": ("auto", "pixels", "normalized")}


def draw_masks(n_masks: int, n_tokens: int, *, mask_ratio: float = 0.75, seed: int = 0) -> Tensor:
    """Draw the masks of the attack (step 1), (M, L) bool, True = hidden; the first of many are those of a smaller M."""
    if n_masks < 1:
        raise ValueError(f"expected n_masks of at least 1, got {n_masks}")
    return training.draw_masks(n_masks, n_tokens, mask_ratio, seeds.rng(seed, "mim.masks"))


def measure_distance(
    made: Tensor, images: Tensor, masks: Tensor, *, distance: str = "mse", region: str = "masked", space: str = "pixels"
) -> Tensor:
    """Measure how far reconstructions (N, M, 3, H, W) are from images (N, 3, H, W) in [0, 1] (step 3): (N, M).

    Args:
        masks: (M, L) bool, True = hidden; ``region="masked"`` averages over hidden pixels, ``"all"`` over the image.
        distance: ``"mse"`` (the paper's), ``"l1"``, or ``"ssim"`` for 1 - SSIM (Gaussian window of 11 pixels).
        space: ``"pixels"``, or ``"normalized"``: in units of the true patch's standard deviation, as a model with
            ``norm_pix_loss`` is trained.
    """
    (m, n_tokens), (height, width) = masks.shape, images.shape[-2:]
    side = round(n_tokens**0.5)
    truth = images.unsqueeze(1)  # (N, 1, 3, H, W)
    if distance == "ssim":
        # here: torchmetrics takes a second to import, and only this distance needs it
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        pair = made.flatten(0, 1), truth.expand_as(made).flatten(0, 1)
        error = 1 - ssim(*pair, data_range=1.0, reduction=None, return_full_image=True)[1].view_as(made)
    else:
        error = made - truth
        if space == "normalized":
            grid = images.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # (N, 3, side, p, side, p)
            # the models work on [-1, 1], where a variance is four times that of [0, 1]; their epsilon is 1e-6 there
            sd = (grid.var((1, 3, 5), keepdim=True) + 1e-6 / 4).sqrt().expand_as(grid)
            error = error / sd.reshape(images.shape).unsqueeze(1)
        error = error.square_() if distance == "mse" else error.abs_()
    if region == "all":
        return error.mean((2, 3, 4))
    hidden = masks.view(m, 1, side, side).repeat_interleave(height // side, 2).repeat_interleave(width // side, 3)
    return error.mul_(hidden).sum((2, 3, 4)) / (3 * hidden.sum((1, 2, 3)))


def _pick_space(autoencoder: object, *, distance: str, region: str, space: str) -> str:
    """Check the names; ``"auto"`` is ``"normalized"`` for a model trained with ``norm_pix_loss`` (SSIM: pixels)."""
    for name, value in (("distance", distance), ("region", region), ("space", space)):
        if value not in CHOICES[name]:
            raise ValueError(f"expected {name} {', '.join(CHOICES[name])}, got {value!r}")
    if distance == "ssim" and space == "normalized":
        raise ValueError("distance 'ssim' is defined on pixels: expected space 'auto' or 'pixels', got 'normalized'")
    normalized = getattr(autoencoder, "norm_pix_loss", False) and distance != "ssim"
    return space if space != "auto" else "normalized" if normalized else "pixels"


def _check_model(autoencoder: object) -> None:
    """Refuse what can't reconstruct, and name the way out."""
    if not (callable(getattr(autoencoder, "reconstruct", None)) and hasattr(autoencoder, "n_tokens")):
        got = "None (this method has no decoder)" if autoencoder is None else type(autoencoder).__name__
        if isinstance(autoencoder, Encoder):
            patches = hasattr(autoencoder.module, "patch_embed")
            way = "train a decoder over it with attacks.mim.train_decoder" if patches else "it has no patches to mask"
            got = f"the encoder {autoencoder.name!r} alone: {way}"
        raise ValueError(f"expected an autoencoder with reconstruct(images, masks) and n_tokens, got {got}")
    if round(autoencoder.n_tokens**0.5) ** 2 != autoencoder.n_tokens:
        raise ValueError(f"expected a square grid of patches, got n_tokens={autoencoder.n_tokens}")


@torch.inference_mode()
def compute_distances(
    autoencoder: torch.nn.Module, images: np.ndarray, *, n_masks: int = 16, mask_ratio: float = 0.75,
    distance: str = "mse", region: str = "masked", space: str = "auto", seed: int = 0, batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Distance (N, M) float64 of every image to its reconstruction from every mask (steps 1-3), larger = worse.

    Args:
        autoencoder: has ``reconstruct(images, masks)`` and ``n_tokens``; it is put into eval mode.
        images: (N, H, W, 3) uint8; resized to the model's ``input_size``.
        batch_size: *pairs* of image and mask per forward; None fits it to memory.
    """
    space = _pick_space(autoencoder, distance=distance, region=region, space=space)
    _check_model(autoencoder)
    images = views.check_images(images)
    size = getattr(autoencoder, "input_size", None)  # None: takes the images as they are
    height, width = (size, size) if size else images.shape[1:3]
    if height % (side := round(autoencoder.n_tokens**0.5)) or width % side:
        raise ValueError(f"images of {height} x {width} pixels can't be cut into {side} x {side} patches")
    device = torch.device("cpu")
    if isinstance(autoencoder, torch.nn.Module):
        autoencoder.eval()  # dropout would make a score random
        device = next((p.device for p in autoencoder.parameters()), device)
    masks = draw_masks(n_masks, autoencoder.n_tokens, mask_ratio=mask_ratio, seed=seed).to(device)
    backbone = getattr(autoencoder, "backbone", None)
    n_patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", None) or autoencoder.n_tokens
    pair_bytes = 4 * (16 * getattr(backbone, "embed_dim", 768) * n_patches + 10 * 3 * height * width)
    pairs = batch_size or query.fit_chunk(device, pair_bytes, cache=32e6)
    distances = np.empty((len(images), n_masks))
    for rows in query.iterate_chunks(len(images), max(1, pairs // n_masks), label="reconstruct", progress=progress):
        x = views.read_pixels(images, rows).to(device)
        if x.shape[-2:] != (height, width):
            x = views.make_views(x, [""] * len(x), view="resize", size=size, seed=seed)
        else:
            x = x.float().div_(255.0)
        # the patch embedding is shared by all masks, which are folded into the batch
        tokens = autoencoder.embed_patches(x) if hasattr(autoencoder, "embed_patches") else None
        for column in range(0, n_masks, max(1, pairs)):
            some = masks[column : column + pairs]
            if tokens is not None:
                made = autoencoder.reconstruct_from(tokens, some, images=x).float()  # (n, m, 3, H, W)
            else:
                made = autoencoder.reconstruct(x.repeat_interleave(len(some), 0), some.repeat(len(x), 1))
                made = torch.as_tensor(made).unflatten(0, (len(x), len(some))).float()
            if made.shape != (len(x), len(some), 3, height, width):
                raise ValueError(f"expected reconstructions {tuple(x.shape)} per mask, got {tuple(made.shape)}")
            got = measure_distance(made, x, some, distance=distance, region=region, space=space)
            distances[rows, column : column + len(some)] = got.cpu().numpy()
    if wrong := int((~np.isfinite(distances)).any(1).sum()):
        raise ValueError(f"reconstructions of {wrong} of {len(images)} images are not finite: check the weights")
    return distances


def score_reconstruction(autoencoder: torch.nn.Module, images: np.ndarray, **settings) -> np.ndarray:
    """Minus the mean of :func:`compute_distances` (same arguments): (N,) float64, higher = more likely a member."""
    return -compute_distances(autoencoder, images, **settings).mean(axis=1)


def extract_distances(
    model: torch.nn.Module, images: np.ndarray, *, image_ids: Sequence[str], seed: int,
    reference: torch.nn.Module | None = None, alpha: float = 1.0, n_masks: int = 16, mask_ratio: float = 0.75,
    distance: str = "mse", region: str = "masked", space: str = "auto", batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """Mean distance (N, 1), smaller = more likely a member; with a ``reference`` d(x) - alpha d_ref(x) (step 4)."""
    images = views.check_images(images, image_ids)
    space = _pick_space(model, distance=distance, region=region, space=space)
    settings = dict(n_masks=n_masks, mask_ratio=mask_ratio, distance=distance, region=region, space=space, seed=seed)
    settings |= dict(batch_size=batch_size, progress=progress)
    d = compute_distances(model, images, **settings).mean(axis=1)
    if reference is not None:
        d = d - alpha * compute_distances(reference, images, **settings).mean(axis=1)
    return d[:, None]


def score_distances(features: np.ndarray) -> np.ndarray:
    """Distances (N, 1) -> scores (N,): higher = more likely a member."""
    return -np.asarray(features, np.float64)[:, 0]


def compute_log_likeness(features: np.ndarray) -> np.ndarray:
    """s = -log d (N,): what reference models calibrate, because a hard image is hard by a factor."""
    return -np.log(np.asarray(features, np.float64)[:, 0])


def extract_gradient_norm(
    model: torch.nn.Module, images: np.ndarray, *, image_ids: Sequence[str], seed: int, n_masks: int = 16,
    progress: bool = False,
) -> np.ndarray:  # fmt: skip
    """White box: log norm (N, 1) of the training loss's gradient by all weights, smaller = more likely a member.

    For whoever holds the weights: a yardstick for the MIM attack's plain queries. Source of gradients as a
    membership signal: Nasr, Shokri, Houmansadr (arXiv 1812.00910). The masks are the MIM attack's.
    """
    if not callable(getattr(model, "loss", None)):
        raise ValueError(f"expected a masked-image model with its training loss, got {type(model).__name__}")
    images = views.check_images(images, image_ids)
    weights = [w for w in model.parameters() if w.requires_grad]
    fixed = dict(augmentation="none", size=model.input_size, progress=1.0)
    norms = []
    for rows in query.iterate_chunks(len(images), 1, label="gradients", progress=progress):
        repeated = views.read_pixels(images, rows).to(weights[0].device).expand(n_masks, -1, -1, -1)
        with torch.enable_grad():
            loss = model.loss(repeated, rng=seeds.rng(seed, "mim.masks"), **fixed)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        norms.append(torch.stack([g.norm() for g in gradients if g is not None]).norm().item())
    return np.log(np.asarray(norms, np.float64))[:, None]


def train_decoder(
    encoder: Encoder, images: np.ndarray, *, epochs: int, seed: int = 0, method: str | None = None, **settings: object
) -> "pretrain.Run":  # not evaluated: audits run without what trains
    """Train the attacker's decoder over a frozen encoder; ``.decoder`` of the run is an autoencoder.

    The encoder is a timm ViT of any training or a Swin; images (N, H, W, 3) uint8 are the attacker's own. ``method``
    None is ``"simmim"`` for encoders trained so and for Swin, else ``"mae"``; ``settings`` go to ``pretrain.fit``.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"expected an Encoder to train a decoder over, got {type(encoder).__name__}")
    if method is None:
        is_swin = hasattr(encoder.module, "patch_embed") and not hasattr(encoder.module, "blocks")
        method = "simmim" if is_swin or encoder.method == "simmim" else "mae"
    return pretrain.fit(method, images, encoder=encoder, epochs=epochs, seed=seed, **settings)
