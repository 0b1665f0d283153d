"""What ``encoders.wrap`` needs: modules behind a callable, eval mode around a call, outputs of common libraries."""

import contextlib
import copy
import functools
import inspect
import math
import numbers
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INSTALLED = ("<frozen", *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")))
_LEAVES = (type(None), type, numbers.Number, str, bytes, Tensor, np.ndarray, np.generic, np.ufunc)
_LEAVES += (torch.dtype, torch.device)


def find_modules(*functions: Callable) -> tuple[list[nn.Module], bool]:
    """Modules that callables use, and whether these are all: a dict or an object of another kind may hide more.

    Looked at: the callable, the owner of a method, arguments of a partial, and what its own file's functions refer to.
    """
    left, found, seen, complete = list(functions), {}, set(), True
    home = {getattr(getattr(value, "func", value), "__module__", None) for value in functions}
    for value in left:  # grows, and keeps alive whose id is noted
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, functools.partial):
            left += [value.func, *value.args, *value.keywords.values()]
        elif inspect.ismethod(value):
            owner = value.__self__
            parts = [owner] if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values()
            left += [value.__func__, *parts]
        elif inspect.isfunction(value):
            left += [*vars(value).values(), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
            if value.__module__ in home:
                named = inspect.getclosurevars(value)
                left += [*named.nonlocals.values(), *named.globals.values()]
            else:
                complete &= value.__code__.co_filename.startswith(_INSTALLED)
        elif any(value is function for function in functions):
            left.append(value.__call__)
        else:
            complete &= inspect.isbuiltin(value) or _is_plain(value)
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in inner], complete


def _is_plain(value: Any) -> bool:
    """Whether nothing trained is in a value: numbers, texts, arrays, types, installed modules, containers of them."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    if inspect.ismodule(value):
        return getattr(value, "__file__", _INSTALLED[0]).startswith(_INSTALLED)
    return isinstance(value, _LEAVES) and not isinstance(value, nn.Parameter)


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module], others: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode with the others' weights and buffers inside; every part's own mode and values after it."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    ours, theirs = ([v for m in side for v in (*m.parameters(), *m.buffers())] for side in (modules, others))
    kept = [value.data for value in ours]
    try:
        for module in modules:
            module.eval()
        for value, other in zip(ours, theirs, strict=True):
            value.data = other.data.to(value.device, value.dtype)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for value, data in zip(ours, kept, strict=True):
            value.data = data


def reinitialize(module: nn.Module, *, seed: int = 0) -> nn.Module:
    """Copy a module and give the copy fresh weights, from a private random stream.

    Layers reset themselves; tensors that no layer resets (class token, positions) are drawn from N(0, .02), scales
    become 1 and shifts 0.
    """
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for part in fresh.modules():
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for name, value in part.named_parameters(recurse=False):
                if value.ndim > 1:
                    value.copy_(torch.randn(value.shape) * 0.02)
                else:
                    value.fill_(0.0 if "bias" in name else 1.0)
            for name, value in part.named_buffers(recurse=False):
                if name in ("running_mean", "running_var"):  # of a scripted batch norm
                    value.fill_(float(name == "running_var"))
    return fresh


def check_outputs(function: Callable, modules: Sequence[nn.Module], shape: tuple[int, int], name: str) -> Any:
    """Refuse outputs that are random, or of an image among others; returns the answer for two images."""
    weights = next((p for m in modules for p in m.parameters() if p.is_floating_point()), torch.zeros(0))
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)).to(weights.device, weights.dtype)
    with torch.inference_mode(), evaluating(modules, modules), torch.random.fork_rng():
        answers = [function(x[:rows]) for rows in (2, 2, 1)]
    first, again, alone = (unpack_tensor(answer, (*_VECTORS, *_TOKENS)) for answer in answers)
    if not first.isfinite().all():
        raise ValueError(f"{name}: the output is not finite (NaN or infinity): check the weights and the normalization")
    off = 0.02 * (float(first.float().abs().max()) or 1.0)  # half precision and other kernels stay far below

    def agree(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool(((a - b).float().abs() <= off).all())

    if not agree(first, again):
        raise ValueError(
            f"{name}: two calls on the same images differ: random masking (encode without a mask; encoders.open reads "
            "ViTMAE folders) or dropout (put the module into eval mode)"
        )
    if first.ndim == 0 or not agree(first[:1], alone):
        raise ValueError(
            f"{name}: the output for an image depends on the others of its batch: expected one row for each image; "
            "batch norm in training mode? Put the module into eval mode"
        )
    return answers[0]


_VECTORS = ("pooler_output", "image_embeds", "embeddings", "embedding", "features", "x_norm_clstoken")
_TOKENS = ("last_hidden_state", "x_norm_patchtokens", "feature_maps", "features", "out")


def unpack_tensor(answer: Any, keys: Sequence[str]) -> Tensor:
    """Find the tensor in what common libraries return: a tensor, (tensor, ...), a dict, an output of transformers."""
    named = answer if isinstance(answer, Mapping) else {key: getattr(answer, key, None) for key in keys}
    values = [answer, *map(named.get, keys), *(answer[:1] if isinstance(answer, (tuple, list)) else ())]
    found = next((value for value in values if isinstance(value, Tensor)), None)
    if found is None:
        there = f" with {', '.join(map(str, list(answer)[:6]))}" if isinstance(answer, Mapping) else ""
        raise ValueError(
            f"expected a tensor, or an output with {', '.join(keys[:2])}, got {type(answer).__name__}{there}: pass a "
            "function that returns the tensor, as in encoders.wrap(lambda x: model(x)['features'], size=...)"
        )
    return found


def unpack_vector(answer: Any) -> Tensor:
    """Vectors (N, D): of tokens without a pooled vector the first, of a map its mean."""
    out = unpack_tensor(answer, (*_VECTORS, "last_hidden_state"))
    if out.ndim == 4:
        return out.mean((2, 3))
    if out.ndim == 3 and getattr(answer, "last_hidden_state", None) is not None:
        return out[:, 0]
    if out.ndim != 2:
        raise ValueError(f"expected vectors (N, D), got {tuple(out.shape)}: pass tokens (N, L, D) as tokens=")
    return out


def unpack_tokens(answer: Any, x: Tensor, patch: int | Sequence[int] | None) -> Tensor:
    """Patch tokens (N, L, D); what stands before them in outputs of transformers (class, registers) is dropped."""
    out = unpack_tensor(answer, _TOKENS)
    if out.ndim == 4:
        return out.flatten(2).transpose(1, 2)
    if out.ndim != 3:
        raise ValueError(f"expected tokens (N, L, D) or a map (N, D, h, w), got {tuple(out.shape)}")
    if getattr(answer, "last_hidden_state", None) is None:
        return out
    length = out.shape[1]
    if patch is not None:
        height, width = (patch, patch) if isinstance(patch, int) else patch
        n_before = length - (x.shape[2] // height) * (x.shape[3] // width)
    else:
        n_before = int(math.isqrt(length) ** 2 != length and math.isqrt(length - 1) ** 2 == length - 1)
    return out[:, max(n_before, 0) :]
