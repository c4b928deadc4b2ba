"""Random decoder layers of the common form, with adapters, and steps for them: what the kernels' tests run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from kernel_cases import joined_tables, normal, random_layer, random_tables, seeded
from polyhead_core.kernels import reference
from polyhead_core.kernels.decoder import Activation, DecoderLayer, DecoderShape, DecoderStack, DecoderStep, Int8Group
from polyhead_server.engine.common_layer import side_by_side

BLOCKS, BLOCK = 12, 8
INNER = 41


@dataclass(frozen=True)
class DecoderCase:
    shape: DecoderShape
    layers: list[DecoderLayer]
    x_TH: torch.Tensor
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor
    step: DecoderStep

    def by_reference(self) -> torch.Tensor:
        """Writes keys and values into the layers' pages."""
        x_TH = self.x_TH
        for layer in self.layers:
            x_TH = reference.decoder_layer(self.shape, layer, x_TH, self.cos_TR, self.sin_TR, self.step)
        return x_TH

    def by(self, stack: DecoderStack) -> torch.Tensor:
        """As by_reference."""
        for layer in self.layers:
            stack.add_layer(layer)
        x_TH = self.x_TH.clone()
        stack.forward(0, len(self.layers), x_TH, self.cos_TR, self.sin_TR, self.step)
        return x_TH

    def assert_same_as(self, other: DecoderCase, got_TH: torch.Tensor, expected_TH: torch.Tensor) -> None:
        """Up to rounding, which moves a value to the next int8 level now and then; a wrong formula makes about 1."""
        assert (got_TH - expected_TH).norm() < 0.01 * (expected_TH - self.x_TH).norm()
        mine, theirs = self.keys_and_values(), other.keys_and_values()
        assert (mine - theirs).norm() < 0.01 * theirs.norm()

    def keys_and_values(self) -> torch.Tensor:
        return torch.stack([pages for one in self.layers for pages in (one.key_pages_NGBD, one.value_pages_NGBD)])


def decoder_case(
    seed: int,
    device: torch.device,
    *,
    num_layers: int = 1,
    adapters: bool = True,
    head_norms: bool = False,
    pages: torch.dtype = torch.float32,
    transposed_keys: bool = False,
) -> DecoderCase:
    """Three sequences: one in the middle, of which three tokens are computed, and two at their next token; two begin
    within their first block."""
    generator = seeded(seed)
    heads, kv_heads, width = ((4, 2, 16), (3, 1, 32), (6, 6, 16))[seed % 3]
    shape = DecoderShape(
        hidden=65, heads=heads, kv_heads=kv_heads, head_width=width, eps=1e-5, activation=Activation(seed % 2)
    )
    widths = (heads * width, kv_heads * width, kv_heads * width, shape.hidden, INNER, INNER, shape.hidden)
    inputs = (*[shape.hidden] * 3, heads * width, *[shape.hidden] * 2, INNER)
    layers = [_layer(generator, shape, widths, inputs, n, device, head_norms, pages) for n in range(num_layers)]
    if transposed_keys:
        layers = [_with_transposed_keys(layer) for layer in layers]
    each = [random_tables(seed + n, i, w, torch.float32, device=device) for n, (i, w) in enumerate(
        zip(inputs * num_layers, widths * num_layers, strict=True)
    )]  # fmt: skip
    tables = joined_tables(each)
    lengths, counts = (7, 3, 20), (3, 1, 1)
    positions = [at for length, count in zip(lengths, counts, strict=True) for at in range(length, length + count)]
    sequence = [index for index, count in enumerate(counts) for _ in range(count)]
    blocks = torch.randperm(BLOCKS, generator=generator).view(3, BLOCKS // 3)
    offsets = (5, 0, 2)
    places = [offsets[s] + at for s, at in zip(sequence, positions, strict=True)]
    slots = torch.tensor([2, 2, 2, -1, 3] if adapters else [-1] * 5, dtype=torch.int32)
    step = SimpleNamespace(
        positions=torch.tensor(positions, device=device),
        sequence=torch.tensor(sequence, dtype=torch.int32, device=device),
        block_tables=blocks.to(device, torch.int32),
        key_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        slot_mapping=torch.tensor(
            [int(blocks[s, at // BLOCK]) * BLOCK + at % BLOCK for s, at in zip(sequence, places, strict=True)],
            device=device,
        ),
        adapter_slots=slots.to(device),
        active_sites=frozenset(range(1, 14 * num_layers, 2)) if adapters else frozenset(),
        tables=tables,
    )
    angle = torch.randn(len(positions), width // 2, generator=generator).repeat(1, 2)
    x_TH = torch.randn(len(positions), shape.hidden, generator=generator)
    return DecoderCase(shape, layers, *(t.to(device) for t in (x_TH, angle.cos(), angle.sin())), step)


def _layer(
    generator: torch.Generator, shape: DecoderShape, widths: tuple[int, ...], inputs: tuple[int, ...], index: int,
    device: torch.device, head_norms: bool, dtype: torch.dtype,
) -> DecoderLayer:  # fmt: skip
    def norm(size: int) -> torch.Tensor:
        return (torch.rand(size, generator=generator) + 0.5).to(device)

    def group(*which: int) -> Int8Group:
        return side_by_side([random_layer(generator, inputs[one], widths[one], device) for one in which])

    def pages() -> torch.Tensor:
        shape_NGBD = (BLOCKS, shape.kv_heads, BLOCK, shape.head_width)
        return normal(generator, *shape_NGBD, dtype=dtype).to(device)

    return DecoderLayer(
        input_norm_H=norm(shape.hidden),
        post_norm_H=norm(shape.hidden),
        q_norm_D=norm(shape.head_width if head_norms else 0),
        k_norm_D=norm(shape.head_width if head_norms else 0),
        qkv=group(0, 1, 2),
        output=group(3),
        gate_up=group(4, 5),
        down=group(6),
        key_pages_NGBD=pages(),
        value_pages_NGBD=pages(),
        scale=shape.head_width**-0.5,
        sliding_window=(0, 11)[index % 2],
        softcap=0.0,
        sites=tuple(range(14 * index + 1, 14 * (index + 1), 2)),
    )


def _with_transposed_keys(layer: DecoderLayer) -> DecoderLayer:
    keys = layer.key_pages_NGBD.transpose(2, 3).contiguous().transpose(2, 3)
    return dataclasses.replace(layer, key_pages_NGBD=keys)
