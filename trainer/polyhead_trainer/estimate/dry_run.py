"""Runs training code on tensors without data, and counts the bytes that it would hold at its fullest moment.

torch's FakeTensorMode computes shapes alone. What decides about shapes (token ids, masks, positions) stays real, so
that code which looks at it runs as it is, and is counted as well: attention may keep a mask of floats in every layer. A
tensor without data is 0 to those who ask for its number.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_aten = torch.ops.aten
Kind = Literal["activations", "gradients", "gathered"]
"""What tensors are made for. Activations: whatever nobody has called otherwise."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes by kind."""

    activations: int = 0
    gradients: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.gathered


class DryRun(TorchDispatchMode):
    """As a context: operators on the tensors of an emptied module compute nothing, and what they make is counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = Held()
        """The most that was held since `restart`."""
        self._held: dict[Kind, int] = {"activations": 0, "gradients": 0, "gathered": 0}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, tuple[Kind, int]] = {}
        """(kind, bytes) by the id of a storage that lives."""

    @property
    def held(self) -> Held:
        """Of what was made inside and is still there."""
        return Held(**self._held)

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.held

    def empty(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Replaces parameters and buffers by tensors without data, which are not counted, on the CPU. What is shared
        stays shared. `dtype`: of parameters in floating point; None: their own."""
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                wanted = dtype if parameter.is_floating_point() else None
                fake = self.uncounted(parameter.shape, wanted or parameter.dtype)
                replacement = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made.setdefault(id(parameter), replacement)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = self.uncounted(buffer.shape, buffer.dtype)

    def uncounted(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without data that counts as no bytes."""
        with self._fake:
            tensor = torch.empty(shape, dtype=dtype)
        self._count(tensor.untyped_storage())
        kind, num_bytes = self._storages[id(tensor.untyped_storage())]
        self._held[kind] -= num_bytes
        self._storages[id(tensor.untyped_storage())] = kind, 0
        return tensor

    def hold(self, num_bytes: int, kind: Kind) -> None:
        """Counts what no operator here makes; less than 0: what is given up again."""
        self._held[kind] += num_bytes
        if sum(self._held.values()) > self.peak.total:
            self.peak = self.held

    def count_as(self, tensor: Tensor, kind: Kind) -> None:
        """From now on."""
        key = id(tensor.untyped_storage())
        before, num_bytes = self._storages[key]
        self._held[before] -= num_bytes
        self._held[kind] += num_bytes
        self._storages[key] = kind, num_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_iter((args, kwargs))):
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        elif func is _aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        else:
            if func in (_aten.index.Tensor, _aten._unsafe_index.Tensor):
                args = (args[0], _places(args[1]))
            with self._fake:
                result = func(*args, **kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._storages:  # of a view, or of what was changed in place
            return
        self._storages[id(storage)] = "activations", storage.nbytes()
        self.hold(storage.nbytes(), "activations")
        weakref.finalize(storage, self._forget, id(storage)).atexit = False

    def _forget(self, key: int) -> None:
        kind, num_bytes = self._storages.pop(key)
        self._held[kind] -= num_bytes


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks as the indices that they stand for, as many as the result will have rows."""
    found: list[Tensor | None] = []
    with unset_fake_temporarily():
        for index in indices:
            if index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor):
                found += index.nonzero(as_tuple=True)
            else:
                found.append(index)
    return found
