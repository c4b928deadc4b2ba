"""Runs decoder layers of the common form as one fused call on the CPU; all others stay as transformers wrote them.

The common form: pre-norm, grouped heads, rotary by halves, gated MLP, all linear layers in int8. It is found by
structure, and each fused layer is compared with the untouched one on real hidden states before it takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead_core.backbone import Backbone
from polyhead_core.int8 import Int8Linear
from polyhead_core.kernels import dispatch
from polyhead_core.kernels.tables import UNIT, AdapterTables
from polyhead_server.engine.attention import BATCH_ARGUMENT, AttentionFacts
from polyhead_server.engine.batch import BatchRow, StepBatch, build_batch
from polyhead_server.kvcache.pool import KVPool

logger = logging.getLogger(__name__)

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_LARGEST_DIFFERENCE = 0.02
"""Of what a layer adds to its input, in the Euclidean norm. Rounding before int8 makes 0.001; a wrong formula, 1."""
_PROBE_TOKENS = (9, 5)
"""Lengths of the sequences on which fused layers are compared with the untouched ones."""


@dataclass(frozen=True, kw_only=True)
class CommonLayer:
    """A decoder layer of the common form, taken apart."""

    linears: tuple[Int8Linear, ...]
    """q, k, v, o, gate, up, down."""
    input_norm: Tensor  # [hidden]
    post_norm: Tensor  # [hidden]
    q_norm: Tensor  # [head width], or empty
    k_norm: Tensor
    eps: float
    activation: int


class FusedDecoder:
    """The fused layers of one backbone and, where they are all its layers, a way through it past the module tree."""

    def __init__(self, stack: Any, num_layers: int, direct: DirectForward | None) -> None:
        self._stack = stack
        self.num_layers = num_layers
        self.direct = direct

    def take_phase_seconds(self) -> dict[str, float]:
        """Seconds spent in each phase of the layers since the last call, waits for the other threads included."""
        return dict(self._stack.take_phase_seconds())


def fuse_decoder(backbone: Backbone, attention: Sequence[AttentionFacts], kv: KVPool) -> FusedDecoder | None:
    """Swaps the forwards of the decoder's layers for the fused call; None where no layer allows it.

    The weights of fused layers are handed over to the fused call: nobody else can use them afterwards.
    """
    if backbone.device.type != "cpu" or backbone.quantization != "int8" or backbone.dtype != torch.float32:
        return None
    if not dispatch.is_accelerated(backbone.device):
        return None
    path, layers = _decoder_layers(backbone.model, len(attention))
    taken = [take_apart(layer) for layer in layers]
    first = next((one for one in taken if one is not None), None)
    if first is None or any((a.heads, a.kv_heads, a.head_width) != _heads(attention[0]) for a in attention):
        return None
    fusion = _Fusion(backbone, path, layers, attention, kv, first)
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


def take_apart(layer: nn.Module) -> CommonLayer | None:
    """The layer's parts if it is of the common form and holds nothing else, None if not."""
    parts = {
        path: module for path, module in layer.named_modules() if any(True for _ in module.parameters(recurse=False))
    }
    has_head_norms = set(_HEAD_NORMS) <= set(parts)
    if set(parts) != {*_LINEARS, *_NORMS, *(_HEAD_NORMS if has_head_norms else ())}:
        return None
    linears = [parts[path] for path in _LINEARS]
    if not all(isinstance(linear, Int8Linear) for linear in linears):
        return None
    int8 = [linear for linear in linears if isinstance(linear, Int8Linear)]
    norms = [_norm(parts[path]) for path in (*_NORMS, *(_HEAD_NORMS if has_head_norms else ()))]
    activation = _activation(getattr(getattr(layer, "mlp", None), "act_fn", None))
    found = [norm for norm in norms if norm is not None]
    if len(found) < len(norms) or activation is None or len({eps for _, eps in found}) != 1:
        return None
    if not (_same_input(*int8[:3]) and _same_input(*int8[4:6])):
        return None
    weights = [weight for weight, _ in found] + [torch.empty(0)] * (4 - len(found))
    return CommonLayer(
        linears=tuple(int8),
        input_norm=weights[0],
        post_norm=weights[1],
        q_norm=weights[2],
        k_norm=weights[3],
        eps=found[0][1],
        activation=activation,
    )


def _same_input(*linears: Int8Linear) -> bool:
    """Whether the layers quantise their input in the same way."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))

    first = linears[0]
    return all(
        same(first.input_scale, one.input_scale) and same(first.outlier_columns, one.outlier_columns) for one in linears
    )


def _norm(module: nn.Module) -> tuple[Tensor, float] | None:
    """(weight, eps) of an RMS norm, seen by what it does to a row of ones: some models keep the weight less one."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
    with torch.no_grad():
        seen = module(torch.ones(1, len(weight)))[0] * (1 + eps) ** 0.5
    for candidate in (weight, 1 + weight):
        if torch.allclose(seen, candidate, rtol=1e-5, atol=1e-6):
            return candidate.contiguous(), float(eps)
    return None


def _activation(module: Any) -> int | None:
    """The kernel's code of the activation."""
    if not callable(module):
        return None
    x = torch.linspace(-8, 8, 65)
    with torch.no_grad():
        y = module(x)
    known = (functional.silu(x), functional.gelu(x, approximate="tanh"))  # in the order of the kernel's codes
    return next((code for code, expected in enumerate(known) if torch.allclose(y, expected, atol=1e-6)), None)


class FusedLayers:
    """The layers [first, last) as one forward; stands in the place of the first of them."""

    def __init__(self, stack: Any, first: int, last: int) -> None:
        self._stack = stack
        self._range = (first, last)

    def __call__(self, hidden_states: Tensor, *_: Any, position_embeddings: Any, **settings: Any) -> Tensor:
        batch: StepBatch = settings[BATCH_ARGUMENT]
        cos, sin = position_embeddings
        x = hidden_states[0].clone()
        tables = batch.tables
        self._stack.forward(
            *self._range, x, cos[0], sin[0], batch.positions, batch.sequence, batch.block_tables, batch.slot_mapping,
            batch.adapter_slots, tables.arena, tables.num_pages, tables.pages, tables.bias,
        )  # fmt: skip
        return x.unsqueeze(0)


def _pass_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands in the place of a layer that an earlier one has computed already."""
    return hidden_states


class DirectForward:
    """Embedding, rotary tables, fused layers, final norm of the wanted rows and head, without the calls in between.

    The module tree around the layers costs a millisecond a step; it is replaced only where both give the same logits.
    """

    def __init__(self, model: Any, decoder: Any, layers: FusedLayers) -> None:
        self._embed, self._rotary, self._norm = decoder.embed_tokens, decoder.rotary_emb, decoder.norm
        self._head = model.get_output_embeddings()
        self._layers = layers

    def __call__(self, batch: StepBatch) -> Tensor:
        """Logits [L, vocab] at the batch's logit rows."""
        hidden = self._embed(batch.token_ids.unsqueeze(0))
        tables = self._rotary(hidden, position_ids=batch.positions.unsqueeze(0))
        hidden = self._layers(hidden, position_embeddings=tables, **{BATCH_ARGUMENT: batch})
        logits: Tensor = self._head(self._norm(hidden[:, batch.logit_rows]))[0]
        return logits

    @classmethod
    def find(cls, backbone: Backbone, path: str, layers: FusedLayers, batch: StepBatch) -> DirectForward | None:
        """None where the model has other parts between its layers and its logits, seen by what it computes."""
        model: Any = backbone.model
        decoder = model.get_submodule(path.rpartition(".")[0])
        if not all(hasattr(decoder, name) for name in ("embed_tokens", "rotary_emb", "norm")):
            return None
        direct = cls(model, decoder, layers)
        if torch.allclose(direct(batch), run_tree(backbone, batch), rtol=1e-4, atol=1e-4):
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
        common: CommonLayer,
    ) -> None:
        self._backbone = backbone
        self._path = path
        self._layers = layers
        self._attention = attention
        self._kv = kv
        hidden = len(common.input_norm)
        self._stack = torch.classes.polyhead_cpu.DecoderStack(
            hidden, *_heads(attention[0]), common.eps, common.activation
        )
        self._num_in_stack = 0

    @torch.no_grad()
    def run(self, taken: Sequence[CommonLayer | None]) -> FusedDecoder | None:
        batch = self._probe_batch()
        hidden, settings = self._first_layer_input(batch)
        places: list[int | None] = []
        for index, (layer, common) in enumerate(zip(self._layers, taken, strict=True)):
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
        generator = torch.Generator().manual_seed(0)
        block_size, rows, next_block = self._kv.shape.block_size, [], 0
        for length in _PROBE_TOKENS:
            blocks = range(next_block, next_block + -(-length // block_size))
            if blocks.stop > self._kv.num_blocks:
                break
            ids = torch.randint(0, self._backbone.vocab_size, (length,), generator=generator).tolist()
            rows.append(BatchRow(token_ids=ids, start=0, block_ids=tuple(blocks), slot=-1))
            next_block = blocks.stop
        if not rows:
            rows.append(BatchRow(token_ids=[0], start=0, block_ids=(0,), slot=-1))
        num_sites = len(self._backbone.sites)
        none = AdapterTables(
            arena=torch.zeros(UNIT),
            num_pages=torch.zeros(1, num_sites, dtype=torch.int32),
            pages=torch.zeros(1, num_sites, 1, 2, dtype=torch.int32),
            bias=torch.full((1, num_sites), -1, dtype=torch.int32),
        )
        return build_batch(rows, none, self._kv, self._backbone.device)

    def _first_layer_input(self, batch: StepBatch) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states and keywords with which the model calls its first layer."""
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
            return seen[0]
        finally:
            handle.remove()
        raise AssertionError("the model did not call its first decoder layer")

    def _add(self, index: int, common: CommonLayer) -> int | None:
        facts, sites = self._attention[index], self._backbone.sites.by_path
        q, k, v, o, gate, up, down = common.linears
        packed = [pack_together(group) for group in ((q, k, v), (o,), (gate, up), (down,))]
        self._stack.add_layer(
            common.input_norm, common.post_norm, common.q_norm, common.k_norm, *packed, self._kv.keys[index],
            self._kv.values[index], facts.scale, facts.sliding_window, facts.softcap,
            [sites[f"{self._path}.{index}.{name}"].index for name in _LINEARS],
        )  # fmt: skip
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


def pack_together(linears: Sequence[Int8Linear]) -> Any:
    """One packed layer with the outputs of all of them side by side; they quantise their input in the same way."""
    biases: list[Tensor] = [torch.zeros(one.out_features) if one.bias is None else one.bias for one in linears]
    has_bias = any(one.bias is not None for one in linears)
    first = linears[0]
    return dispatch.pack_linear(
        torch.cat(tuple(one.weight.data for one in linears)),
        torch.cat([one.SCB for one in linears]),
        first.input_scale,
        first.outlier_columns,
        torch.cat(biases) if has_bias else None,
        lasting=True,
    )
