"""Layers that several adapters share: the backbone's product once, then each adapter on its own tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from polyhead_core.errors import ConfigError


class Layout:
    """Which tokens of the pass that runs now belong to which adapter: neighbours in the one row of all of them."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        """Of the adapters, in the order of their tokens."""
        self.sizes: list[int] = []
        """Their numbers of tokens."""

    @contextmanager
    def set_to(self, numbers: Sequence[int], sizes: Sequence[int]) -> Iterator[None]:
        """Around a forward pass and its backward pass, in which checkpointed layers compute again."""
        self.numbers, self.sizes = list(numbers), list(sizes)
        try:
            yield
        finally:
            self.numbers, self.sizes = [], []


class JointLinear(nn.Module):
    """A linear layer W of the backbone with the LoRA layers that adapters put on it.

    y[tokens of a] = (W x)[tokens of a] + scaling_a B_a A_a dropout_a(x[tokens of a]): W x is computed for all at once.
    """

    def __init__(self, base_layer: nn.Module, adapters: Mapping[int, LoraLinear], layout: Layout) -> None:
        """`adapters`: peft's layers by the adapter's number, each with one adapter (peft's name for it: "default")."""
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict({str(number): layer for number, layer in adapters.items()})
        self._layout = layout

    def forward(self, x_1NI: Tensor) -> Tensor:
        """[1, N, in] -> [1, N, out]. Raises ConfigError where the backbone does not bring all tokens in their order."""
        y_1NO: Tensor = self.base_layer(x_1NI)
        sizes = self._layout.sizes
        if x_1NI.shape[:-1] != (1, sum(sizes)):
            raise ConfigError(
                f"[[adapters]]: an adapted layer of the backbone ({type(self.base_layer).__name__}) sees "
                f"{tuple(x_1NI.shape[:-1])} of {sum(sizes)} tokens, as experts do: choose other target_modules, or "
                "train the adapters one by one"
            )
        pieces = list(y_1NO.split(sizes, dim=1))
        for at, (number, x_part) in enumerate(zip(self._layout.numbers, x_1NI.split(sizes, dim=1), strict=True)):
            if str(number) in self.adapters:
                pieces[at] = _with_update(pieces[at], x_part, self.adapters[str(number)])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _with_update(y_1NO: Tensor, x_1NI: Tensor, layer: nn.Module) -> Tensor:
    """As peft's own forward computes it, in the types that it computes in."""
    assert isinstance(layer, LoraLinear)
    down, up, dropout = layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"]
    dtype = next(down.parameters()).dtype
    update_1NO: Tensor = up(down(dropout(x_1NI.to(dtype)))) * layer.scaling["default"]
    return (y_1NO + update_1NO).to(y_1NO.dtype)


class GeneratorDropout(nn.Module):
    """torch's dropout with random numbers of its own: other adapters' draws do not change this one's."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p = p
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * kept.div_(1 - self.p)
