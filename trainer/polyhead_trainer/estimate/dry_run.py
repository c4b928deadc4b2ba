"""Runs training code on tensors without data, and counts the bytes that it would hold at its fullest moment.

torch's FakeTensorMode computes shapes alone. What decides about shapes (token ids, masks, positions) is small and stays
real, so that code which looks at it runs as it is. A tensor without data is 0 to those who ask for its number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

_aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Held:
    num_bytes: int
    gradients: int
    """Bytes of the trained parameters' gradients among them."""


class DryRun(TorchDispatchMode):
    """As a context: operators on the tensors of an emptied module compute nothing, and what they make is counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        """Bytes of what was made inside and is still there."""
        self.gradients = 0
        """Bytes of the trained parameters' gradients among them."""
        self.peak = Held(num_bytes=0, gradients=0)
        """The most that was held since `restart`."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._sizes: dict[int, int] = {}
        """Bytes by the id of a storage that lives."""

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = Held(num_bytes=self.held, gradients=self.gradients)

    def empty(self, model: nn.Module) -> None:
        """Replaces parameters and buffers by tensors without data, which are not counted, on the CPU. What is shared
        stays shared."""
        made: dict[int, nn.Parameter] = {}
        with self._fake:
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    fake = self._uncounted(torch.empty(parameter.shape, dtype=parameter.dtype))
                    replacement = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                    module._parameters[name] = made.setdefault(id(parameter), replacement)
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = self._uncounted(torch.empty(buffer.shape, dtype=buffer.dtype))

    def count_gradients(self, parameters: Iterable[nn.Parameter], num_shards: int = 1) -> None:
        """From the backward pass on, theirs are told apart, and held in shards."""

        def after_accumulation(parameter: Tensor) -> None:
            assert parameter.grad is not None
            key = id(parameter.grad.untyped_storage())
            share = parameter.grad.untyped_storage().nbytes() // num_shards
            self.held += share - self._sizes[key]
            self._sizes[key] = share
            if key not in seen:
                seen.add(key)
                self.gradients += share
                _when_gone(parameter.grad.untyped_storage(), forget, key, share)

        def forget(key: int, share: int) -> None:
            seen.discard(key)
            self.gradients -= share

        seen: set[int] = set()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(after_accumulation)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_iter((args, kwargs))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func in (_aten.index.Tensor, _aten._unsafe_index.Tensor):
            args = (args[0], _places(args[1]))
        with self._fake:
            result = func(*args, **kwargs)
        for leaf in tree_iter(result):
            if isinstance(leaf, FakeTensor):
                self._count(leaf.untyped_storage())
        return result

    def _uncounted(self, tensor: Tensor) -> Tensor:
        self._follow(tensor.untyped_storage(), 0)
        return tensor

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._sizes:  # of a view, or of what was changed in place
            return
        self._follow(storage, storage.nbytes())
        if self.held > self.peak.num_bytes:
            self.peak = Held(num_bytes=self.held, gradients=self.gradients)

    def _follow(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        self._sizes[id(storage)] = num_bytes
        self.held += num_bytes
        _when_gone(storage, self._forget, id(storage))

    def _forget(self, key: int) -> None:
        self.held -= self._sizes.pop(key)


def _when_gone(storage: torch.UntypedStorage, callback: Callable[..., None], *args: Any) -> None:
    weakref.finalize(storage, callback, *args).atexit = False


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
