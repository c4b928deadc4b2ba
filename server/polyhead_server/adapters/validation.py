"""Checks that readers of all adapter types share: configuration keys and values; tensors' types, shapes, numbers."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from polyhead_core.adapter_directory import AdapterDirectory
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, AdapterTooLarge
from polyhead_core.sites import Site

_FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shown(text: str) -> str:
    """A name out of an untrusted file, fit for a message: quoted, escaped and not too long."""
    return ascii(text if len(text) <= 200 else text[:200] + "...")


def nearest(word: str, known: Iterable[str]) -> str:
    return difflib.get_close_matches(word[:200], list(known), n=1, cutoff=0.0)[0]


def check_config_keys(adapter: AdapterDirectory, known: Sequence[str]) -> None:
    """An unknown key that is null or false says that something a later PEFT can do was not done, and may stay."""
    for key, value in adapter.config.items():
        if key not in known and value is not None and value is not False:
            raise AdapterFormatError(
                f"adapter {adapter.name!r}: adapter_config.json has the unknown key {shown(key)}; the nearest known "
                f"key is {nearest(key, known)!r}",
                details={"adapter": adapter.name, "key": shown(key)},
            )


def refuse_value(adapter: AdapterDirectory, key: str, value: object, expected: str) -> NoReturn:
    given = ascii(value)[:200]
    raise AdapterFormatError(
        f"adapter {adapter.name!r}: adapter_config.json has {key} = {given}; expected {expected}",
        details={"adapter": adapter.name, "key": key, "given": given, "expected": expected},
    )


def is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_finite_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def check_rank(adapter: AdapterDirectory, site: Site, rank: int, max_rank: int) -> None:
    if rank > max_rank:
        raise AdapterTooLarge(
            f"adapter {adapter.name!r} has rank {rank} at {site.path}; this server takes ranks up to {max_rank} "
            "(max_adapter_rank)",
            details={"adapter": adapter.name, "site": site.path, "rank": rank, "max_rank": max_rank},
        )


def check_dtypes(adapter: AdapterDirectory) -> None:
    if not adapter.tensors:
        raise AdapterFormatError(
            f"adapter {adapter.name!r} holds no tensors at all; save it again", details={"adapter": adapter.name}
        )
    for key, tensor in adapter.tensors.items():
        if tensor.dtype not in _FLOAT_DTYPES:
            raise AdapterFormatError(
                f"adapter {adapter.name!r}: {shown(key)} has type {tensor.dtype}; expected float32, float16 or "
                "bfloat16",
                details={"adapter": adapter.name, "tensor": shown(key), "given": tensor.dtype},
            )


def check_shape(adapter: AdapterDirectory, key: str, tensor: Tensor, site: Site, expected: tuple[int, ...]) -> None:
    given = tuple(tensor.shape)
    if given != expected:
        raise AdapterMismatch(
            f"adapter {adapter.name!r}: {key} has shape {given}, but {site.path} needs {expected}; it was made for "
            "another backbone, or its adapter_config.json is not the one it was saved with",
            details={"adapter": adapter.name, "site": site.path, "tensor": key, "given": given, "expected": expected},
        )


def check_finite(adapter: AdapterDirectory, key: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterFormatError(
            f"adapter {adapter.name!r}: {shown(key)} holds NaN or infinity; its training has diverged, take an earlier "
            "checkpoint",
            details={"adapter": adapter.name, "tensor": shown(key)},
        )
