"""Runs decoder layers of the common form as one fused call; all others stay as transformers wrote them.

Such layers are found by structure (common_layer.py), and each fused layer is compared with the untouched one on real
hidden states before it takes its place.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polyhead_core.backbone import Backbone
from polyhead_core.kernels import dispatch
from polyhead_core.kernels.decoder import DecoderLayer, DecoderShape, DecoderStack
from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.engine.attention import BATCH_ARGUMENT, AttentionFacts
from polyhead_server.engine.batch import BatchRow, StepBatch, build_batch
from polyhead_server.engine.common_layer import LINEARS, CommonLayer, rms_norm_of, side_by_side, take_apart
from polyhead_server.engine.rotary_table import RotaryTable
from polyhead_server.kvcache.pool import KVPool

logger = logging.getLogger(__name__)

_LARGEST_DIFFERENCE = 0.02
"""Of what a layer adds to its input, in the Euclidean norm. Rounding before int8 makes 0.001; a wrong formula, 1."""
_PROBE_TOKENS = (9, 5)
"""Lengths of the sequences on which fused layers are compared with the untouched ones."""


class FusedDecoder:
    """The fused layers of one backbone and, where they are all its layers, a way through it past the module tree."""

    def __init__(self, stack: DecoderStack, num_layers: int, direct: DirectForward | None) -> None:
        self._stack = stack
        self.num_layers = num_layers
        self.direct = direct

    def take_phase_seconds(self) -> dict[str, float]:
        """See DecoderStack."""
        return self._stack.take_phase_seconds()


def fuse_decoder(backbone: Backbone, attention: Sequence[AttentionFacts], kv: KVPool) -> FusedDecoder | None:
    """Swaps the forwards of the decoder's layers for the fused call; None where no layer allows it.

    The weights of fused layers are handed over to the fused call: nobody else can use them afterwards.
    """
    if backbone.quantization != "int8":
        return None
    path, layers = _decoder_layers(backbone.model, len(attention))
    taken = [take_apart(layer) for layer in layers]
    first = next((one for one in taken if one is not None), None)
    if first is None or any((a.heads, a.kv_heads, a.head_width) != _heads(attention[0]) for a in attention):
        return None
    heads, kv_heads, head_width = _heads(attention[0])
    shape = DecoderShape(
        hidden=len(first.input_norm), heads=heads, kv_heads=kv_heads, head_width=head_width, eps=first.eps,
        activation=first.activation,
    )  # fmt: skip
    stack = dispatch.decoder_stack(shape, backbone.device)
    if stack is None:
        return None
    fusion = _Fusion(backbone, path, layers, attention, kv, stack)
    return fusion.run([one if one is not None and _alike(one, first) else None for one in taken])


def _heads(facts: AttentionFacts) -> tuple[int, int, int]:
    return facts.heads, facts.kv_heads, facts.head_width


def _alike(one: CommonLayer, other: CommonLayer) -> bool:
    return (one.eps, one.activation) == (other.eps, other.activation)


def _decoder_layers(model: nn.Module, num_layers: int) -> tuple[str, list[nn.Module]]:
    """The list of decoder layers and its path; empty where the model has no such list."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and hasattr(module[0], "self_attn"):
            return path, list(module)
    return "", []


class FusedLayers:
    """The layers [first, last) as one forward; stands in the place of the first of them."""

    def __init__(self, stack: DecoderStack, first: int, last: int) -> None:
        self._stack = stack
        self._range = (first, last)

    def __call__(self, hidden_states: Tensor, *_: Any, position_embeddings: Any, **settings: Any) -> Tensor:
        batch: StepBatch = settings[BATCH_ARGUMENT]
        cos, sin = position_embeddings
        x = hidden_states[0].to(torch.float32, copy=True)
        self._stack.forward(*self._range, x, cos[0].float(), sin[0].float(), batch)
        return x.unsqueeze(0).to(hidden_states.dtype)


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in the place of a layer that an earlier one has computed already."""
    return hidden_states


class DirectForward:
    """Embedding, rotary tables, fused layers, final norm of the wanted rows and head, without the calls in between.

    The module tree around the layers costs a millisecond a step; it is replaced only where both give the same logits.
    """

    def __init__(self, model: Any, decoder: Any, layers: FusedLayers, rotary: Any) -> None:
        self._embed, self._rotary, self._norm = decoder.embed_tokens, rotary, decoder.norm
        self._head = model.get_output_embeddings()
        self._layers = layers

    def take_norm_apart(self) -> None:
        """Replaces the final norm, half a dozen small operations, by one where it is an RMS norm: of float32, or on
        CUDA, where torch's last bits depend on the number of rows, and so on what shares a row's batch."""
        parts = rms_norm_of(self._norm)
        if parts is not None and (self._norm.weight.dtype == torch.float32 or self._norm.weight.is_cuda):
            weight, eps = parts
            self._norm = partial(dispatch.rms_norm, weight_I=weight, eps=eps)

    def __call__(self, batch: StepBatch) -> Tensor:
        """Logits [L, vocab] at the batch's logit rows."""
        hidden = self._embed(batch.token_ids.unsqueeze(0))
        tables = self._rotary(hidden, position_ids=batch.positions.unsqueeze(0))
        hidden = self._layers(hidden, position_embeddings=tables, **{BATCH_ARGUMENT: batch})
        logits: Tensor = self._head(self._norm(hidden[0].index_select(0, batch.logit_rows)))
        return logits

    @classmethod
    def find(cls, backbone: Backbone, path: str, layers: FusedLayers, batch: StepBatch) -> DirectForward | None:
        """None where the model has other parts between its layers and its logits, seen by what it computes."""
        model: Any = backbone.model
        decoder = model.get_submodule(path.rpartition(".")[0])
        if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm")):
            return None
        num_positions = min(backbone.max_position_embeddings, batch.kv.num_blocks * batch.kv.shape.block_size)
        hidden = decoder.embed_tokens(batch.token_ids.unsqueeze(0))
        rotary = RotaryTable.of(decoder.rotary_emb, hidden, num_positions) or decoder.rotary_emb
        direct = cls(model, decoder, layers, rotary)
        if torch.allclose(direct(batch), run_tree(backbone, batch), rtol=1e-4, atol=1e-4):
            direct.take_norm_apart()
            return direct
        logger.info("%s does more than its parts say: its module tree is kept", backbone.architecture)
        return None


def run_tree(backbone: Backbone, batch: StepBatch) -> Tensor:
    """Logits [L, vocab] at the batch's logit rows, by the model's own forward."""
    output = backbone.model(
        input_ids=batch.token_ids.unsqueeze(0),
        position_ids=batch.positions.unsqueeze(0),
        use_cache=False,
        logits_to_keep=batch.logit_rows,
        **{BATCH_ARGUMENT: batch},
    )
    logits: Tensor = output.logits[0]
    return logits


class _Fusion:
    """Builds the fused call layer by layer, so that at most one layer's weights are held twice."""

    def __init__(
        self,
        backbone: Backbone,
        path: str,
        layers: Sequence[nn.Module],
        attention: Sequence[AttentionFacts],
        kv: KVPool,
        stack: DecoderStack,
    ) -> None:
        self._backbone = backbone
        self._path = path
        self._layers = layers
        self._attention = attention
        self._kv = kv
        self._stack = stack
        self._num_in_stack = 0

    @torch.no_grad()
    def run(self, taken: Sequence[CommonLayer | None]) -> FusedDecoder | None:
        batch = self._probe_batch()
        hidden, settings = self._first_layer_input(batch)
        places: list[int | None] = []
        for index, (layer, common) in enumerate(zip(self._layers, taken, strict=True)):
            with _in_float32(layer):
                expected = layer(hidden, **settings)
            place = None if common is None else self._add(index, common)
            if place is not None and not self._agrees(place, hidden, expected, settings):
                logger.warning("layer %d of %s is not what the fused call computes", index, self._path)
                place = None
            places.append(place)
            self._release(common, fused=place is not None)
            hidden = expected
        self._swap(places)
        num_fused = sum(place is not None for place in places)
        logger.info("%d of %d decoder layers run as a fused call", num_fused, len(places))
        direct = None
        if num_fused == len(places):
            direct = DirectForward.find(self._backbone, self._path, FusedLayers(self._stack, 0, num_fused), batch)
        for pages in (*self._kv.keys, *self._kv.values):
            pages[: batch.block_tables.max() + 1].zero_()
        return FusedDecoder(self._stack, num_fused, direct) if num_fused else None

    def _probe_batch(self) -> StepBatch:
        """Of all its tokens logits are wanted: a device may sum up a row otherwise where there are fewer rows, and the
        way past the tree, whose norm meets the wanted rows alone, would seem to compute something else."""
        generator = torch.Generator().manual_seed(0)
        block_size, rows, next_block = self._kv.shape.block_size, [], 0
        for length in _PROBE_TOKENS:
            blocks = range(next_block, next_block + -(-length // block_size))
            if blocks.stop > self._kv.num_blocks:
                break
            ids = torch.randint(0, self._backbone.vocab_size, (length,), generator=generator).tolist()
            rows.append(BatchRow(token_ids=ids, start=0, block_ids=tuple(blocks), slot=-1, num_logits=length))
            next_block = blocks.stop
        if not rows:
            rows.append(BatchRow(token_ids=[0], start=0, block_ids=(0,), slot=-1))
        none = AdapterTables.without_adapters(len(self._backbone.sites), self._backbone.device)
        return build_batch(rows, none, self._kv).to(self._backbone.device)

    def _first_layer_input(self, batch: StepBatch) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states and keywords with which the model calls its first layer, in float32."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        class Seen(Exception):
            pass

        def hook(_: nn.Module, arguments: tuple[Tensor, ...], settings: dict[str, Any]) -> None:
            seen.append((arguments[0], settings))
            raise Seen

        handle = self._layers[0].register_forward_pre_hook(hook, with_kwargs=True)
        try:
            run_tree(self._backbone, batch)
        except Seen:
            hidden, settings = seen[0]
            return hidden.float(), {name: _as_float32(value) for name, value in settings.items()}
        finally:
            handle.remove()
        raise AssertionError("the model did not call its first decoder layer")

    def _add(self, index: int, common: CommonLayer) -> int:
        facts, sites = self._attention[index], self._backbone.sites.by_path
        q, k, v, o, gate, up, down = common.linears
        self._stack.add_layer(
            DecoderLayer(
                input_norm_H=common.input_norm,
                post_norm_H=common.post_norm,
                q_norm_D=common.q_norm,
                k_norm_D=common.k_norm,
                qkv=side_by_side((q, k, v)),
                output=side_by_side((o,)),
                gate_up=side_by_side((gate, up)),
                down=side_by_side((down,)),
                key_pages_NGBD=self._kv.keys[index],
                value_pages_NGBD=self._kv.values[index],
                scale=facts.scale,
                sliding_window=facts.sliding_window,
                softcap=facts.softcap,
                sites=tuple(sites[f"{self._path}.{index}.{name}"].index for name in LINEARS),
            )
        )
        self._num_in_stack += 1
        return self._num_in_stack - 1

    def _agrees(self, place: int, hidden: Tensor, expected: Any, settings: dict[str, Any]) -> bool:
        embeddings = settings.get("position_embeddings")
        if not (isinstance(expected, Tensor) and isinstance(embeddings, tuple) and len(embeddings) == 2):
            return False
        got = FusedLayers(self._stack, place, place + 1)(hidden, **settings)
        difference = float((got - expected).norm() / (expected - hidden).norm())
        return difference <= _LARGEST_DIFFERENCE

    def _release(self, common: CommonLayer | None, *, fused: bool) -> None:
        for linear in common.linears if common is not None else ():
            linear.forget_packed()
            if fused:
                linear.release_weight()

    def _swap(self, places: Sequence[int | None]) -> None:
        """Runs of neighbours become one call each."""
        start = 0
        while start < len(places):
            end = start + 1
            if places[start] is not None:
                while end < len(places) and places[end] is not None:
                    self._layers[end].forward = _pass_on
                    end += 1
                first = places[start]
                assert first is not None
                self._layers[start].forward = FusedLayers(self._stack, first, first + end - start)
            start = end


@contextlib.contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Float parameters of the layer are float32 meanwhile: in bfloat16 rounding would hide what a layer computes."""
    narrow = [one for one in layer.parameters() if one.is_floating_point() and one.dtype != torch.float32]
    before = [parameter.data for parameter in narrow]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in zip(narrow, before, strict=True):
            parameter.data = data


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return tuple(map(_as_float32, value)) if isinstance(value, tuple) else value
