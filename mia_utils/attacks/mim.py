"""MIM attack: a masked-image model reconstructs its training images better than others.

Source: Li, He, Yu, Zhang (arXiv 2408.06825); difficulty calibration after Shafran et al. (a reference model's error
tells how hard an image is). The attack replays the training: 1 masks, 2 reconstructions, 3 distance to the true pixels,
averaged over the masks; 4 with a reference, minus its distance. Small distance = member; a threshold comes from a
shadow model. Models are often released without a decoder: ``fit_decoder`` trains the attacker's decoder over the frozen
encoder, which is a much weaker attack; ``decoder_of`` tells the two apart.

Ours: M seeded masks, the same for every image. What a mask adds by being hard it adds to members and non-members alike.
Letters: N images, M masks, L patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mia_utils import pretrain, seeds
from mia_utils.attacks import query
from mia_utils.models import views
from mia_utils.models.encoders import Encoder
from mia_utils.pretrain import mae

CHOICES = {"distance": ("mse", "l1", "ssim"), "region": ("masked", "all"), "space": ("auto", "pixels", "normalized")}


def draw_masks(n_masks: int, n_tokens: int, *, mask_ratio: float = 0.75, seed: int = 0) -> Tensor:
    """Draw the masks of the attack (step 1); the first M of many masks are the masks of a smaller M.

    Returns:
        (M, L) bool, True = hidden; each hides the same number of patches, some but not all.
    """
    if n_masks < 1:
        raise ValueError(f"expected n_masks of at least 1, got {n_masks}")
    return mae.draw_masks(n_masks, n_tokens, mask_ratio, seeds.rng(seed, "mim.masks"))


def measure_distance(
    made: Tensor, images: Tensor, masks: Tensor, *, distance: str = "mse", region: str = "masked", space: str = "pixels"
) -> Tensor:
    """Measure how far each reconstruction is from its image (step 3).

    Args:
        made: (N, M, 3, H, W) reconstructions, about [0, 1]; not clipped.
        images: (N, 3, H, W) in [0, 1].
        masks: (M, L) bool, True = hidden.
        distance: ``"mse"`` (the paper's), ``"l1"``, or ``"ssim"`` for 1 - SSIM (Gaussian window of 11 pixels).
        region: mean over the ``"masked"`` pixels, or over ``"all"``.
        space: ``"pixels"``, or ``"normalized"``: differences in units of the true patch's standard deviation, which is
            what a model with ``norm_pix_loss`` is trained on.

    Returns:
        (N, M), larger = worse reconstructed.
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
    """Check the three names and return the space that ``"auto"`` means for this model."""
    for name, value in (("distance", distance), ("region", region), ("space", space)):
        if value not in CHOICES[name]:
            raise ValueError(f"expected {name} {', '.join(CHOICES[name])}, got {value!r}")
    if distance == "ssim" and space == "normalized":
        raise ValueError("distance 'ssim' is defined on pixels: expected space 'auto' or 'pixels', got 'normalized'")
    if space != "auto":
        return space
    return "normalized" if getattr(autoencoder, "norm_pix_loss", False) and distance != "ssim" else "pixels"


def _check_model(autoencoder: object) -> None:
    """Raise a one-line error for what can't reconstruct, with the way out."""
    if callable(getattr(autoencoder, "reconstruct", None)) and hasattr(autoencoder, "n_tokens"):
        if round(autoencoder.n_tokens**0.5) ** 2 != autoencoder.n_tokens:
            raise ValueError(f"expected a square grid of patches, got n_tokens={autoencoder.n_tokens}")
    elif isinstance(autoencoder, Encoder):
        way = "train a decoder over it with attacks.mim.fit_decoder"
        if not hasattr(autoencoder.module, "patch_embed"):
            way = "it has no patches to mask, so no decoder can be trained over it either"
        raise ValueError(f"the MIM attack needs a decoder, got the encoder {autoencoder.name!r} alone: {way}")
    else:
        got = "None (this method has no decoder)" if autoencoder is None else type(autoencoder).__name__
        raise ValueError(f"expected an autoencoder with reconstruct(images, masks) and n_tokens, got {got}")


def _take_images(images: np.ndarray | Tensor, rows: slice) -> Tensor:
    """Return some images as (n, 3, H, W), uint8 or float32 in [0, 1]; streamed ones are decoded here."""
    part = images[rows] if len(images.shape) == 4 else images
    part = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part, order="C"))
    if part.ndim == 4 and part.dtype == torch.uint8 and part.shape[3] == 3:
        return part.permute(0, 3, 1, 2)
    if part.ndim != 4 or not part.is_floating_point() or part.shape[1] != 3:
        got = f"{tuple(images.shape)} {part.dtype}"
        raise ValueError(f"images: expected (N, H, W, 3) uint8 or (N, 3, H, W) float in [0, 1], got {got}")
    # NaN fails both comparisons
    if not ((part >= 0) & (part <= 1)).all():
        raise ValueError("images: expected finite values in [0, 1], got others: divide 8-bit values by 255")
    return part.float()


def _count_pairs(autoencoder: object, device: torch.device, height: int, width: int) -> int:
    """Pairs of image and mask per forward, so that activations and differences fit memory."""
    backbone = getattr(autoencoder, "backbone", None)
    n_patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", None) or autoencoder.n_tokens
    pair_bytes = 4 * (16 * getattr(backbone, "embed_dim", 768) * n_patches + 10 * 3 * height * width)
    return query.fit_chunk(device, pair_bytes, cache=32e6)


@torch.inference_mode()
def compute_distances(
    autoencoder: torch.nn.Module,
    images: np.ndarray | Tensor,
    *,
    n_masks: int = 16,
    mask_ratio: float = 0.75,
    distance: str = "mse",
    region: str = "masked",
    space: str = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Distance of every image to its reconstruction from every mask (steps 1-3).

    Args:
        autoencoder: has ``reconstruct(images, masks)`` and ``n_tokens`` (``pretrain.Run.decoder``, or anything); it is
            put into eval mode.
        images: (N, H, W, 3) uint8, or (N, 3, H, W) float in [0, 1]. Of another size than the model's ``input_size``
            they are resized by the query transform all attacks use (``views.make_views``, "resize"). Streamed ones
            are decoded a chunk at a time.
        n_masks: masks per image (M), the same for every image.
        mask_ratio: share of hidden patches.
        distance, region: see :func:`measure_distance`.
        space: ``"auto"`` is ``"normalized"`` for a model trained with ``norm_pix_loss`` (SSIM: pixels), else
            ``"pixels"``.
        seed: of the masks.
        batch_size: *pairs* of image and mask per forward; None fits it to memory. Changes nothing but speed.

    Returns:
        (N, M) float64, larger = worse reconstructed; the first columns are those of a smaller M.
    """
    space = _pick_space(autoencoder, distance=distance, region=region, space=space)
    _check_model(autoencoder)
    images = images if hasattr(images, "shape") else np.asarray(images)
    shape = _take_images(images, slice(0)).shape  # no image: shape and type alone are checked
    masks = draw_masks(n_masks, autoencoder.n_tokens, mask_ratio=mask_ratio, seed=seed)
    size = getattr(autoencoder, "input_size", None)  # None: takes the images as they are
    height, width = (size, size) if size else shape[-2:]
    if height % (side := round(autoencoder.n_tokens**0.5)) or width % side:
        raise ValueError(f"images of {height} x {width} pixels can't be cut into {side} x {side} patches")
    device = torch.device("cpu")
    if isinstance(autoencoder, torch.nn.Module):
        autoencoder.eval()  # dropout would make a score random
        device = next((p.device for p in autoencoder.parameters()), device)
    masks = masks.to(device)
    pairs = batch_size or _count_pairs(autoencoder, device, height, width)
    distances = np.empty((len(images), n_masks))
    for rows in query.iterate_chunks(len(images), max(1, pairs // n_masks), label="reconstruct", progress=progress):
        x = _take_images(images, rows).to(device)
        if x.shape[-2:] != (height, width):
            x = views.make_views(x, [""] * len(x), view="resize", size=size, seed=seed)
        elif x.dtype == torch.uint8:
            x = x.float().div_(255.0)
        reconstruct = _prepare(autoencoder, x)
        for column in range(0, n_masks, max(1, pairs)):
            some = masks[column : column + pairs]
            made = reconstruct(some).float()
            if made.shape != (len(x), len(some), 3, height, width):
                raise ValueError(f"expected reconstructions {tuple(x.shape)} per mask, got {tuple(made.shape)}")
            got = measure_distance(made, x, some, distance=distance, region=region, space=space)
            distances[rows, column : column + len(some)] = got.cpu().numpy()
    if wrong := int((~np.isfinite(distances)).any(1).sum()):
        n = len(images)
        raise ValueError(f"reconstructions of {wrong} of {n} images are not finite: check the model's weights")
    return distances


def _prepare(autoencoder: torch.nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return masks (m, L) -> reconstructions (n, m, 3, H, W) of images x, the masks folded into the batch (step 2)."""
    if hasattr(autoencoder, "embed_patches"):  # the patch embedding is shared by all masks
        tokens = autoencoder.embed_patches(x)
        return lambda masks: autoencoder.reconstruct_from(tokens, masks, images=x)
    n = len(x)
    return lambda masks: torch.as_tensor(
        autoencoder.reconstruct(x.repeat_interleave(len(masks), 0), masks.repeat(n, 1))
    ).unflatten(0, (n, len(masks)))


def score_reconstruction(autoencoder: torch.nn.Module, images: np.ndarray | Tensor, **settings) -> np.ndarray:
    """Minus the mean of :func:`compute_distances` (same arguments): (N,) float64, higher = more likely a member."""
    return -compute_distances(autoencoder, images, **settings).mean(axis=1)


def extract_distances(
    model: torch.nn.Module,
    images: np.ndarray,
    *,
    image_ids: Sequence[str],
    seed: int,
    reference: torch.nn.Module | None = None,
    alpha: float = 1.0,
    n_masks: int = 16,
    mask_ratio: float = 0.75,
    distance: str = "mse",
    region: str = "masked",
    space: str = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> np.ndarray:
    """Distance (N, 1) of every image, smaller = more likely a member; further arguments: :func:`compute_distances`.

    Args:
        image_ids: N ids; not used: all images share their masks, so nothing is random per image.
        reference: another autoencoder, trained on other data: what it can't reconstruct either is hard, not a
            non-member; then the distance is d(x) - alpha d_reference(x) (step 4), in the model's ``space``.
        alpha: weight of the reference's distance.
    """
    if len(image_ids) != len(images):
        raise ValueError(f"expected one image id per image, got {len(image_ids)} ids for {len(images)} images")
    space = _pick_space(model, distance=distance, region=region, space=space)
    settings = dict(n_masks=n_masks, mask_ratio=mask_ratio, distance=distance, region=region, space=space, seed=seed)
    settings |= dict(batch_size=batch_size, progress=progress)
    d = compute_distances(model, images, **settings).mean(axis=1)
    if reference is not None:
        d = d - alpha * compute_distances(reference, images, **settings).mean(axis=1)
    return d[:, None]


def score_distances(features: np.ndarray) -> np.ndarray:
    """Turn distances (N, 1) into scores (N,): higher = more likely a member."""
    return -np.asarray(features, np.float64)[:, 0]


def compute_log_likeness(features: np.ndarray) -> np.ndarray:
    """s = -log d (N,): what reference models calibrate, because a hard image is hard by a factor."""
    return -np.log(np.asarray(features, np.float64)[:, 0])


def fit_decoder(encoder: Encoder, images: np.ndarray, *, epochs: int, seed: int = 0, **settings) -> torch.nn.Module:
    """Train the attacker's decoder over a target that was released without one: an autoencoder with ``reconstruct``.

    Arguments as in :func:`train_decoder`. The encoder stays as it is; ``decoder_of`` is ``"attacker"``.
    """
    model = train_decoder(encoder, images, epochs=epochs, seed=seed, **settings).decoder
    model.decoder_of = "attacker"  # evaluate keeps it in the meta of every row
    return model


def train_decoder(
    encoder: Encoder,
    images: np.ndarray,
    *,
    epochs: int,
    seed: int = 0,
    method: str | None = None,
    mask_ratio: float | None = None,
    **settings: object,
) -> pretrain.Run:
    """Train the attacker's decoder and return the whole training, which can be saved and loaded.

    Args:
        encoder: over a timm ViT (any training: MAE, DINO, SimCLR ...) or, with ``"simmim"``, a Swin.
        images: (N, H, W, 3) uint8, the attacker's data: not the target's members.
        epochs: passes over them.
        seed: of the decoder's weights, the order and the masks.
        method: ``"mae"`` or ``"simmim"``; None: ``"simmim"`` for encoders trained so and for Swin, else ``"mae"``.
        mask_ratio: share of hidden patches in this training; None: the method's own.
        settings: further arguments of ``pretrain.fit`` (``batch_size``, ``decoder_dim``, ``progress`` ...).
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"expected an Encoder to train a decoder over, got {type(encoder).__name__}")
    if method is None:
        is_swin = hasattr(encoder.module, "patch_embed") and not hasattr(encoder.module, "blocks")
        method = "simmim" if is_swin or encoder.method == "simmim" else "mae"
    if mask_ratio is not None:
        settings["mask_ratio"] = mask_ratio
    return pretrain.fit(method, images, encoder=encoder, epochs=epochs, seed=seed, **settings)
