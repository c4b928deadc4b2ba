"""FSDP2 played by one process: what is gathered, when, and for how long, around the passes of an emptied model.

Follows the hooks of torch.distributed.fsdp (read in 2.13) event by event. Parameters are gathered into a buffer of the
communication and copied out of it. In forward the buffer stays until the next layer's is there; in backward the next
layer's is filled while a layer computes. A layer's gradients are whole until its part of the backward pass is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_iter, tree_map

from polyhead_trainer.config import ParallelSection
from polyhead_trainer.estimate.dry_run import DryRun
from polyhead_trainer.estimate.ranks import Alone
from polyhead_trainer.methods import trained_parameters
from polyhead_trainer.parallel import layers_to_shard


@dataclass(eq=False, kw_only=True)
class _Group:
    """Parameters that are gathered together: a layer's, or what is outside of layers."""

    trained: list[nn.Parameter]
    num_bytes: int
    """Of all of them, gathered."""
    num_converted: int
    """Of this rank's part of those that are gathered in another type than they are kept in."""
    is_outermost: bool
    is_whole: bool = False
    is_arriving: bool = False
    """In the communication's buffer alone."""
    in_backward: bool = False
    is_reduced: bool = False
    """Its part of the backward pass is over."""
    places: list[int] = field(default_factory=list)
    """In the order of the forward passes, where a backward pass has not used them yet."""


class Shards(Alone):
    """Parameters, gradients and optimizer states in equal parts, of which this rank has the first, the largest."""

    def __init__(
        self, dry: DryRun, model: nn.Module, settings: ParallelSection, num_ranks: int, *, on_cpu: bool
    ) -> None:
        """Empties `model`, which is on the meta device. Raises ConfigError."""
        self._settings = settings
        self._num_ranks = num_ranks
        # Where gloo gathers and sums in copies of its own.
        self._on_cpu = on_cpu
        kept = {name: parameter.dtype for name, parameter in model.named_parameters()}
        dry.empty(model, _dtype_of(settings.param_dtype))
        super().__init__(dry, list(trained_parameters(model).values()))
        self._shards = {
            id(one): nn.Parameter(dry.uncounted((ceil(one.shape[0] / num_ranks), *one.shape[1:]), kept[name]))
            for name, one in trained_parameters(model).items()
        }
        kept_by_id = {id(one): kept[name] for name, one in model.named_parameters()}
        layers = layers_to_shard(model, settings.wrap)
        inside = {id(one) for layer in layers for one in layer.parameters()}
        outside = [one for one in model.parameters() if id(one) not in inside]
        self._groups: list[_Group] = []
        self._watch(model, outside, kept_by_id, is_outermost=True)
        for layer in layers:
            self._watch(layer, list(layer.parameters()), kept_by_id, is_outermost=False)
        self._order: list[_Group] = []
        """As the forward passes used them, each as often as it was used."""
        self._last_arrived = 0
        """Bytes of the communication's buffer that a forward pass filled last."""
        self._last_reduced = 0
        """Bytes of whole gradients, laid out for the sum over ranks, of which it is not known yet to be over."""

    def after_backward(self) -> None:
        for group in self._groups:
            if not group.is_reduced:
                self._after_backward_of(group)
        for group in self._groups:
            if group.is_arriving:
                self.dry.hold(-group.num_bytes, "gathered")
            group.is_arriving = group.in_backward = group.is_reduced = False
            group.places.clear()
        self._order.clear()
        self._give_up_reduced()

    def after_forward(self) -> None:
        for group in self._groups:
            self._reshard(group)

    def _stepped(self, parameter: nn.Parameter) -> nn.Parameter:
        return self._shards[id(parameter)]

    def _after_accumulation(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.dry.count_as(parameter.grad, "gathered")

    def _watch(
        self, module: nn.Module, parameters: list[nn.Parameter], kept: dict[int, torch.dtype], *, is_outermost: bool
    ) -> None:
        converted = [one for one in parameters if one.dtype != kept[id(one)]]
        group = _Group(
            trained=[one for one in parameters if one.requires_grad],
            num_bytes=sum(self._num_padded(one) * one.itemsize for one in parameters),
            num_converted=sum(self._num_padded(one) * one.itemsize for one in converted) // self._num_ranks,
            is_outermost=is_outermost,
        )
        self._groups.append(group)
        inputs = _dtype_of(self._settings.param_dtype)
        output = _dtype_of(self._settings.output_dtype) if is_outermost else None

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args, kwargs = _converted((args, kwargs), inputs)
            self._gather(group, forward=True)
            return _with_hook_after_backward((args, kwargs), lambda: self._after_backward_of(group))

        def after(_: nn.Module, __: Any, result: Any) -> Any:
            self._after_forward_of(group)
            if torch.is_grad_enabled():
                for tensor in tree_iter(result):
                    if isinstance(tensor, Tensor) and tensor.requires_grad:
                        tensor.register_hook(lambda _: self._before_backward_of(group))
            return _converted(result, output)

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after)

    def _after_forward_of(self, group: _Group) -> None:
        if group.is_outermost:
            self._give_up_arrived()
        else:
            self._reshard(group)
        group.places.append(len(self._order))
        self._order.append(group)

    def _before_backward_of(self, group: _Group) -> None:
        if group.in_backward:
            return
        group.in_backward = True
        self._gather(group, forward=False)
        if group.places and (place := group.places.pop()):
            self._announce(self._order[place - 1])

    def _after_backward_of(self, group: _Group) -> None:
        group.is_reduced = True
        self._reshard(group)
        self._give_up_reduced()
        with_gradient = [one for one in group.trained if one.grad is not None]
        if with_gradient:
            self._reduce(with_gradient)

    def _announce(self, group: _Group) -> None:
        """Begins to gather."""
        if not group.is_whole and not group.is_arriving:
            group.is_arriving = True
            self.dry.hold(group.num_bytes, "gathered")
            self._pass_by(group.num_converted + (group.num_bytes if self._on_cpu else 0))

    def _gather(self, group: _Group, *, forward: bool) -> None:
        self._announce(group)
        if group.is_whole:
            return
        if forward:
            self._give_up_arrived()
        self.dry.hold(group.num_bytes, "gathered")
        group.is_whole, group.is_arriving = True, False
        if forward:
            self._last_arrived = group.num_bytes
        else:
            self.dry.hold(-group.num_bytes, "gathered")

    def _reshard(self, group: _Group) -> None:
        if group.is_whole:
            group.is_whole = False
            self.dry.hold(-group.num_bytes, "gathered")

    def _reduce(self, parameters: list[nn.Parameter]) -> None:
        """Sums the whole gradients over the ranks into shards."""
        reduced = _dtype_of(self._settings.reduce_dtype) or parameters[0].dtype
        self._last_reduced = sum(map(self._num_padded, parameters)) * reduced.itemsize
        self.dry.hold(self._last_reduced, "gathered")
        last = parameters[-1].grad  # a variable in torch's own function keeps it until the sum is there
        for parameter in parameters:
            parameter.grad = None
        shards = [self._shards[id(parameter)] for parameter in parameters]
        summed = self._last_reduced // self._num_ranks
        self._pass_by(self._last_reduced if self._on_cpu else 0, then=summed)
        if shards[0].dtype != reduced:
            self._pass_by(sum(shard.nbytes for shard in shards))
        self.dry.hold(-summed, "gathered")
        del last
        for shard in shards:
            if shard.grad is None:
                shard.grad = torch.empty_like(shard)
                self.dry.count_as(shard.grad, "gradients")

    def _pass_by(self, num_bytes: int, *, then: int = 0) -> None:
        """Holds `num_bytes` for as long as it takes to make what stays."""
        self.dry.hold(num_bytes, "gathered")
        self.dry.hold(then, "gathered")
        self.dry.hold(-num_bytes, "gathered")

    def _give_up_arrived(self) -> None:
        self.dry.hold(-self._last_arrived, "gathered")
        self._last_arrived = 0

    def _give_up_reduced(self) -> None:
        self.dry.hold(-self._last_reduced, "gathered")
        self._last_reduced = 0

    def _num_padded(self, parameter: Tensor) -> int:
        """Elements, of equal parts for all ranks."""
        rows = ceil(parameter.shape[0] / self._num_ranks) * self._num_ranks
        return rows * (parameter.numel() // parameter.shape[0])


class _AfterBackward(torch.autograd.Function):
    """The identity; calls back when the gradients of all its inputs are there."""

    @staticmethod
    def forward(ctx: FunctionCtx, callback: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.callback = callback  # type: ignore[attr-defined]
        return inputs

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.callback()  # type: ignore[attr-defined]
        return None, *grads


def _with_hook_after_backward(arguments: Any, callback: Callable[[], None]) -> Any:
    """`arguments`, with the tensors in them that require gradients, if any, as _AfterBackward gives them."""
    found = [leaf for leaf in tree_iter(arguments) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found or not torch.is_grad_enabled():
        return arguments
    wrapped: tuple[Tensor, ...] = _AfterBackward.apply(callback, *found)  # type: ignore[no-untyped-call]
    replaced = dict(zip(map(id, found), wrapped, strict=True))
    return tree_map(lambda leaf: replaced.get(id(leaf), leaf), arguments)


def _converted(tree: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return tree
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


def _dtype_of(name: str | None) -> torch.dtype | None:
    found: torch.dtype | None = None if name is None else getattr(torch, name)
    return found
