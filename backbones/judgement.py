"""Judge stored weights: what wrapped their names, their types, and whether training made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Parts of names that torch.compile, FSDP and activation checkpointing put anywhere.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARALLEL = "module."  # before every name: DataParallel, DDP and AveragedModel
AVERAGED = "n_averaged"  # how many updates an AveragedModel has seen
UPDATES = "model_ema.num_updates"  # how many updates LDM's averages have seen

# Types that hold a rounded copy of fp32 weights.
ROUNDED = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8 (e4m3fn)",
    torch.float8_e4m3fnuz: "fp8 (e4m3fnuz)",
    torch.float8_e5m2: "fp8 (e5m2)",
    torch.float8_e5m2fnuz: "fp8 (e5m2fnuz)",
}
EXACT = (torch.float32, torch.float64)
NAMED = 3  # how many tensors a message names

Weights = dict[str, Tensor]
Warn = Callable[[str], None]


def unwrap_names(weights: Weights, expected: Iterable[str], file: str, warn: Warn) -> Weights:
    """Remove what wrappers put before or into the names of weights, in any order.

    Args:
        weights: Tensors by name.
        expected: The network's own names, which are left alone.
        file: Name of the file, for messages.
        warn: Hears what was removed.

    Raises:
        ValueError: If the file holds an average that was never updated, or one tensor twice.
    """
    if UPDATES in weights:
        _check_count(UPDATES, weights[UPDATES], file)
    own = set(expected)
    removed: list[str] = []
    while not weights.keys() <= own:
        # An AveragedModel keeps its count beside its weights, and may itself be wrapped.
        if AVERAGED in weights and AVERAGED not in own:
            _check_count(AVERAGED, weights[AVERAGED], file)
            weights = {name: value for name, value in weights.items() if name != AVERAGED}
            removed.append(AVERAGED)
            continue

        prefix, unwrapped = _unwrap_once(list(weights))
        if not prefix:
            break
        if len(set(unwrapped)) < len(unwrapped):
            raise ValueError(f"{file}: some tensors lie there twice, with and without {prefix}")
        weights = dict(zip(unwrapped, weights.values(), strict=True))
        removed.append(prefix)

    if removed:
        listed = ", ".join(removed)
        warn(f"{file}: removed from the names of the weights what wrapped the network: {listed}")
    return weights


def _check_count(name: str, count: Tensor, file: str) -> None:
    """Raise ValueError if an average has seen no update."""
    if count.numel() == 1 and not count.is_meta and count.item() <= 0:
        raise ValueError(
            f"{file}: the average was never updated ({name} is 0); "
            "take the weights of the trained network"
        )


def _unwrap_once(names: list[str]) -> tuple[str, list[str]]:
    """Return one wrapper's prefix, or '' if there is none, and the names without it."""
    for wrapper in WRAPPERS:
        unwrapped = [_without_part(name, wrapper) for name in names]
        if unwrapped != names:
            return f"{wrapper}.", unwrapped
    if names and all(name.startswith(PARALLEL) for name in names):
        return PARALLEL, [name.removeprefix(PARALLEL) for name in names]
    return "", names


def _without_part(name: str, part: str) -> str:
    return ".".join(word for word in name.split(".") if word != part)


def check_progress(average: Weights, trained: Weights, initial: Weights, file: str) -> None:
    """Raise ValueError if a training moved its weights and left their average as it began.

    Args:
        average: Averaged weights by name.
        trained: The weights that were averaged, from the same file.
        initial: The weights with which the training began.
        file: Name of the file, for messages.
    """
    if average.keys() == initial.keys() == trained.keys():
        stayed = all(torch.equal(average[name], initial[name]) for name in initial)
        if stayed and not all(torch.equal(trained[name], initial[name]) for name in initial):
            raise ValueError(
                f"{file}: the average was never updated: it is the network before its training; "
                "train again"
            )


def check_average(average: Weights, trained: Weights, file: str) -> None:
    """Raise ValueError if an average still has the constants of a network that did not train.

    Training moves every tensor that a network begins with as zeros or ones, and an average with it.

    Args:
        average: Averaged weights by name.
        trained: The weights that were averaged, from the same file.
        file: Name of the file, for messages.
    """
    stale = [
        name
        for name, value in average.items()
        if name in trained and _is_constant(value) and not _is_constant(trained[name])
    ]
    if stale:
        listed = ", ".join(stale[:NAMED])
        raise ValueError(
            f"{file}: the average was never updated: {len(stale)} of its tensors are constant, "
            f"where the trained weights beside it are not: {listed}; name the others with --key"
        )


def _is_constant(value: Tensor) -> bool:
    """Tell whether all of several numbers are the same; a tensor without numbers is not."""
    if _unusual_storage(value) or value.is_complex() or value.numel() < 2:
        return False
    first = value.flatten()[0].float()
    return bool((value.float() == first).all())


def convert_stored(weights: Weights, file: str, warn: Warn) -> Weights:
    """Return weights in fp32 where the file keeps a rounded copy.

    Integers, which some networks keep as buffers, pass; `check_values` judges them.

    Args:
        weights: Tensors by name.
        file: Name of the file, for messages.
        warn: Hears of rounded types.

    Raises:
        ValueError: For tensors without data, sparse tensors and quantised ones.
    """
    for name, value in weights.items():
        kind = _unusual_storage(value)
        if kind:
            raise ValueError(f"{file}: {name} is {kind}; save dense fp32 tensors")

    rounded = Counter(value.dtype for value in weights.values() if value.dtype in ROUNDED)
    for dtype, number in rounded.items():
        warn(
            f"{file}: {number} of {len(weights)} tensors are stored in {ROUNDED[dtype]}: they are "
            "rounded, so they are not the fp32 weights that were trained"
        )
    return {
        name: value.float() if value.dtype in ROUNDED else value for name, value in weights.items()
    }


def _unusual_storage(value: Tensor) -> str:
    """Return in words how a tensor is stored if it is not as plain numbers, else ''."""
    if value.is_meta:
        return "a meta tensor, which holds no numbers"
    if value.is_quantized:
        return f"quantised ({value.dtype})"
    if value.layout != torch.strided:
        return f"sparse ({value.layout})"
    return ""


def check_values(model: nn.Module, weights: Weights, file: str) -> None:
    """Raise ValueError unless weights can be those of a trained network.

    Args:
        model: The network, whose names and shapes the weights have.
        weights: Tensors by name.
        file: Name of the file, for messages.
    """
    # A tensor has the network's type, or one that becomes it without loss of meaning.
    for name, own in model.state_dict().items():
        dtype = weights[name].dtype
        if dtype != own.dtype and not (dtype in EXACT and own.is_floating_point()):
            raise ValueError(
                f"{file}: {name} is stored as {_word(dtype)}, not as {_word(own.dtype)}; its scale "
                "or meaning is not in the file; save fp32 tensors"
            )

    # A mask is infinite in the network too, and the file must hold the same one.
    masks = {name: own for name, own in model.named_buffers() if not _is_finite(own)}
    broken = [
        name
        for name, value in weights.items()
        if not _is_finite(value) and not (name in masks and torch.equal(value, masks[name]))
    ]
    if broken:
        listed = ", ".join(broken[:NAMED])
        raise ValueError(
            f"{file}: {len(broken)} of {len(weights)} tensors are not finite (NaN or infinity): "
            f"{listed}; the training diverged, or the type was too narrow"
        )

    # Biases and modulations may be zero, but not every matrix.
    # A frozen network counts as a whole.
    parameters = dict(model.named_parameters())
    trained = [name for name, value in parameters.items() if value.requires_grad] or parameters
    matrices = [weights[name] for name in trained if weights[name].dim() > 1]
    if matrices and not any(matrix.any() for matrix in matrices):
        raise ValueError(
            f"{file}: all trained matrices are zero; the average was never updated, "
            "or the file was never filled"
        )


def load_exactly(model: nn.Module, weights: Weights, kind: str, file: str) -> None:
    """Load the weights of a text encoder that its config.json describes.

    Raises:
        ValueError: Names or shapes are not those of the network.
    """
    expected = model.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        names = [f"missing {name}" for name in missing[:2]]
        names += [f"unknown {name}" for name in unknown[:2]]
        raise ValueError(
            f"{file}: no {kind} of its config.json "
            f"({len(missing) + len(unknown)} keys differ): {'; '.join(names)}"
        )
    for name, tensor in expected.items():
        if weights[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: {name} is {tuple(weights[name].shape)} where config.json says "
                f"{tuple(tensor.shape)}; copy both files again"
            )
    model.load_state_dict(weights)


def _is_finite(value: Tensor) -> bool:
    """Tell whether all numbers are finite; a meta tensor holds none."""
    return value.is_meta or bool(value.isfinite().all())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
