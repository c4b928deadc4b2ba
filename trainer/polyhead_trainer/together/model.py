"""One backbone's tree and the adapters over it, which are put on one at a time or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from polyhead_core.backbone import Backbone
from polyhead_core.errors import ConfigError
from polyhead_trainer import methods
from polyhead_trainer.batching import pack
from polyhead_trainer.config import LoraSettings
from polyhead_trainer.data import EncodedExample
from polyhead_trainer.methods import Tuned
from polyhead_trainer.objectives.chunked_loss import chunk_rows, chunked_loss_sums
from polyhead_trainer.objectives.label_logits import label_logits
from polyhead_trainer.packing import prepare_packing
from polyhead_trainer.parallel import Ranks, micro_batches
from polyhead_trainer.together.layers import GeneratorDropout, JointLinear, Layout


@dataclass(frozen=True, kw_only=True)
class Member:
    """One adapter. `tuned.model` is whole inside `SharedBackbone.only` alone."""

    number: int
    name: str
    tuned: Tuned
    layers: dict[str, LoraLinear]
    """By their paths in the backbone's tree."""
    dropout: torch.Generator
    """Where its dropout takes its random numbers from."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What an adapter learns from in one step."""

    member: Member
    examples: Sequence[EncodedExample]
    micro_batch_size: int


@dataclass(frozen=True, kw_only=True)
class _Site:
    """A linear layer of the backbone that some adapter acts on."""

    parent: nn.Module
    name: str
    base_layer: nn.Module


class SharedBackbone:
    """Owns the tree. Between its context managers it is the bare backbone."""

    def __init__(self, backbone: Backbone, logit_chunk: int = 0) -> None:
        """`logit_chunk`: most logits held at once, as training.logit_chunk; 0: all. Raises ConfigError."""
        self.backbone = backbone
        self.members: list[Member] = []
        self._model: Any = backbone.model
        self._logit_chunk = logit_chunk
        self._layout = Layout()
        self._sites: dict[str, _Site] = {}
        self._joint: dict[str, JointLinear] = {}
        """At the same paths, made when all adapters are there."""
        self._check_independent_rows()

    def add(self, name: str, settings: LoraSettings, seed: int) -> Member:
        """A fresh adapter, exactly as a run of its own makes it. Raises ConfigError."""
        head = self._model.get_output_embeddings()
        tuned = methods.tune(self.backbone, settings, seed)
        generator = _continue_random_numbers(self.backbone.device)
        found: dict[str, LoraLinear] = {}
        for path, layer in [*self._model.named_modules()]:
            if not isinstance(layer, LoraLayer):
                continue
            if not isinstance(layer, LoraLinear) or layer.get_base_layer() is head:
                raise ConfigError(
                    f"[[adapters]] {name}: adapter.target_modules holds {path}, and only linear layers inside the "
                    "decoder are trained together: leave it out, or train this adapter with a configuration of its own"
                )
            found[path] = layer
            parent, _, leaf = path.rpartition(".")
            site = _Site(parent=self._model.get_submodule(parent), name=leaf, base_layer=layer.get_base_layer())
            self._sites.setdefault(path, site)
            if settings.dropout:
                layer.lora_dropout["default"] = GeneratorDropout(settings.dropout, generator)
        member = Member(number=len(self.members), name=name, tuned=tuned, layers=found, dropout=generator)
        self._take_off()
        self._joint.clear()
        self.members.append(member)
        return member

    def prepare(self, examples: Sequence[EncodedExample]) -> None:
        """Before the first pass. Raises ConfigError for a backbone that would mix examples which share a row."""
        try:
            prepare_packing(self._model, examples, pad_id=0)
        except ConfigError as error:
            raise ConfigError(
                f"[[adapters]] puts examples of several adapters end to end, as packing does, but {error.message}; or "
                "train them one by one, each with a configuration of its own and without packing"
            ) from error

    @contextmanager
    def only(self, member: Member) -> Iterator[None]:
        """Inside, `member.tuned` is what a run of its own would hold."""
        self._put_on(member.layers)
        self._model.peft_config = cast(Any, member.tuned.model).peft_config
        try:
            yield
        finally:
            self._take_off()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, `accumulate_gradients` works, in training mode."""
        if not self._joint:
            self._joint = {path: self._join(path) for path in self._sites}
        self._put_on(self._joint)
        self._model.train()
        try:
            yield
        finally:
            self._take_off()

    def accumulate_gradients(self, shares: Sequence[Share]) -> list[float]:
        """Adds to every adapter's gradient that of the mean loss over its own examples; returns those losses.

        A pass holds at most one micro-batch of each adapter.
        """
        losses = [torch.zeros((), device=self.backbone.device) for _ in shares]
        queues = [
            [part for part, _ in micro_batches(share.examples, share.micro_batch_size, Ranks())] for share in shares
        ]
        num_units = [sum(example.num_labels for example in share.examples) for share in shares]
        for turn in range(max(map(len, queues))):
            taking_part = [at for at, queue in enumerate(queues) if turn < len(queue)]
            parts = {shares[at].member.number: queues[at][turn] for at in taking_part}
            with self._layout.set_to(list(parts), [sum(map(len, part)) for part in parts.values()]):
                sums = self._loss_sums(list(parts.values()))
                means = [loss_sum * (1.0 / num_units[at]) for at, loss_sum in zip(taking_part, sums, strict=True)]
                torch.stack(means).sum().backward()
            for at, mean in zip(taking_part, means, strict=True):
                losses[at] += mean.detach()
        return [loss.item() for loss in losses]

    def _loss_sums(self, parts: Sequence[Sequence[EncodedExample]]) -> list[Tensor]:
        """The loss of each part summed over its label tokens, from one forward pass over all of them."""
        batch = pack([example for part in parts for example in part]).to(self.backbone.device)
        sizes = [sum(sum(example.is_label[1:]) for example in part) for part in parts]
        rows = chunk_rows(self._logit_chunk, batch.num_labels, self._model.config.vocab_size)
        if rows is not None:
            return chunked_loss_sums(self._model, batch, rows, sizes)
        logits_NV = label_logits(self._model, batch)
        runs = zip(logits_NV.split(sizes), batch.targets_N.split(sizes), strict=True)
        return [F.cross_entropy(logits_RV, targets_R, reduction="sum") for logits_RV, targets_R in runs]

    def _join(self, path: str) -> JointLinear:
        adapters = {member.number: member.layers[path] for member in self.members if path in member.layers}
        return JointLinear(self._sites[path].base_layer, adapters, self._layout)

    def _put_on(self, layers: Mapping[str, nn.Module]) -> None:
        for path, layer in layers.items():
            site = self._sites[path]
            site.parent._modules[site.name] = layer

    def _take_off(self) -> None:
        self._put_on({path: site.base_layer for path, site in self._sites.items()})
        if hasattr(self._model, "peft_config"):
            del self._model.peft_config

    def _check_independent_rows(self) -> None:
        if self.backbone.quantization == "llm.int8":
            raise ConfigError(
                "[[adapters]] with backbone.quantization = llm.int8: bitsandbytes chooses outlier columns over all "
                "tokens of a pass, so that one adapter's data would change another's gradients; set "
                "backbone.quantization = int8 or none"
            )
        for path, module in self._model.named_modules():
            if (isinstance(module, nn.Dropout) and module.p > 0) or getattr(module, "attention_dropout", None):
                raise ConfigError(
                    f"[[adapters]]: the backbone drops out activations of its own ({path}), at random for all adapters "
                    "together: train them one by one, each with a configuration of its own"
                )


def _continue_random_numbers(device: torch.device) -> torch.Generator:
    """A generator at the point where the adapter's initial weights left torch's own: what a run of its own draws next.

    On other devices than the CPU it is seeded there, for those have generators of their own.
    """
    if device.type == "cpu":
        return torch.Generator().set_state(torch.get_rng_state())
    return torch.Generator(device).manual_seed(torch.initial_seed())
