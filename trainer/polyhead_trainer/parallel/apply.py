"""Puts a tuned model onto its ranks: replicated (DDP) or in shards (FSDP2), and takes it back for publication."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from polyhead_core.errors import ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_trainer.backbones import BY_BITSANDBYTES
from polyhead_trainer.config import ParallelSection, RunConfig
from polyhead_trainer.decoder_layers import transformer_layers
from polyhead_trainer.parallel.integer_shards import integers_shardable
from polyhead_trainer.parallel.ranks import Ranks

NOT_ON_SHARDS = {
    "adamw-8bit": "bitsandbytes' kernels take whole parameters alone",
    "paged-adamw-8bit": "bitsandbytes' kernels take whole parameters alone",
    "adafactor": "torch cannot compute its row and column means over shards",
}
"""Optimizers that cannot step where a parameter is in parts."""


class Replica(DistributedDataParallel):
    """DDP that shows what the model inside has (its config, its base model), as a model in shards does by itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


@dataclass(frozen=True)
class Parallel:
    """A model on its ranks."""

    ranks: Ranks
    model: nn.Module
    """What a loss is computed with: the tuned model itself, or DDP around it."""

    @property
    def device(self) -> torch.device:
        return self.ranks.device if self.ranks.size > 1 else next(self.model.parameters()).device

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around a micro-batch: with DDP, gradients meet those of the other ranks in the last one of a step."""
        waiting = (
            self.model.no_sync() if isinstance(self.model, DistributedDataParallel) and not last else nullcontext()
        )
        with waiting, _keeping_what_is_trained(self.model):
            yield


def check_possible(config: RunConfig, ranks: Ranks) -> None:
    """Raises ConfigError for settings that cannot be had on several ranks."""
    settings = config.parallel
    if ranks.size == 1 or settings.strategy == "ddp":
        return
    if config.training.optimizer in NOT_ON_SHARDS:
        raise ConfigError(
            f"parallel.strategy = fsdp with training.optimizer = {config.training.optimizer}: "
            f"{NOT_ON_SHARDS[config.training.optimizer]}; set training.optimizer = adamw or sgd, whose states are in "
            "shards too, or parallel.strategy = ddp"
        )
    if config.backbone.quantization in BY_BITSANDBYTES:
        raise ConfigError(
            f"parallel.strategy = fsdp with backbone.quantization = {config.backbone.quantization}: bitsandbytes keeps "
            "state on its weights that shards do not have ('Parameter' object has no attribute 'CB'); set "
            "backbone.quantization = int8, which can be sharded, or parallel.strategy = ddp"
        )
    if settings.cpu_offload and ranks.device.type == "cpu":
        raise ConfigError("parallel.cpu_offload = true needs backbone.device = cuda: on the CPU nothing is elsewhere")


def parallelize(model: nn.Module, settings: ParallelSection, ranks: Ranks) -> Parallel:
    """In place, after the method has put its parameters in and before an optimizer sees them. Raises ConfigError."""
    if ranks.size == 1:
        return Parallel(ranks, model)
    # The same numbers made the same initial weights on every rank; from here on each rank drops out what it will.
    torch.manual_seed((torch.initial_seed() + 1_000_003 * ranks.rank) % 2**63)
    if settings.strategy == "fsdp":
        _shard(model, settings, ranks)
        return Parallel(ranks, model)
    # transformers' own `to` refuses models in LLM.int8, which are on their device already.
    nn.Module.to(model, ranks.device)
    replicated = Replica(model, broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False)
    return Parallel(ranks, replicated)


def _shard(model: nn.Module, settings: ParallelSection, ranks: Ranks) -> None:
    """Each decoder layer is gathered when it computes and given up after, forward and backward; what is outside of
    layers (embedding, last norm, head, prompts) is the root's, and stays gathered from forward to backward.

    Frozen weights are sharded like trained ones, int8 in int8. Buffers are not parameters: an Int8Linear's scales and
    outlier columns are replicated, about 1 % of its weight.
    """
    layers = layers_to_shard(model, settings.wrap)
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=_dtype(settings.param_dtype), reduce_dtype=_dtype(settings.reduce_dtype))
    offload = CPUOffloadPolicy() if settings.cpu_offload else OffloadPolicy()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            # A packed copy of every layer would be the whole model again, and outlive the gathered weight it is of.
            module.keeps_packed = False
            module.forget_packed()
    outermost = dataclasses.replace(policy, output_dtype=_dtype(settings.output_dtype))
    with integers_shardable():
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, offload_policy=offload)
        fully_shard(model, mesh=mesh, mp_policy=outermost, offload_policy=offload)
    if hasattr(model, "generate"):
        # peft's generate goes past the root's own forward, whose hooks gather the embedding and the head.
        register_fsdp_forward_method(model, "generate")
    # FSDP takes the types to sum and to keep gradients in from what is trained at its first forward pass: in a run that
    # is one of the backbone alone, whose adapter peft has frozen by then.
    cast(FSDPModule, model)._get_fsdp_state()._lazy_init()


def layers_to_shard(model: nn.Module, wrap: str | None = None) -> list[nn.Module]:
    """Those of `layer_class`; an encoder-decoder's two stacks, where their classes differ, both. Raises ConfigError."""
    classes = {layer_class(model, wrap)}
    if wrap is None:
        classes.update(map(type, transformer_layers(model)))
    return [module for module in model.modules() if type(module) in classes]


def layer_class(model: nn.Module, wrap: str | None = None) -> type[nn.Module]:
    """The class of the layers that hold attention and MLP: of the stack with most parameters, or the one named `wrap`.

    Raises ConfigError.
    """
    if wrap is not None:
        named = {type(module).__name__: type(module) for module in model.modules()}
        if wrap not in named:
            raise ConfigError(
                f"parallel.wrap = {wrap}: the model has no such module; it has {', '.join(sorted(named))}"
            )
        return named[wrap]
    stacks = [
        module for module in model.modules() if isinstance(module, nn.ModuleList) and len({*map(type, module)}) == 1
    ]
    if not stacks:
        raise ConfigError("no stack of equal layers is in the model: name the class to shard by in parallel.wrap")
    return type(max(stacks, key=lambda stack: sum(parameter.numel() for parameter in stack.parameters()))[0])


@contextmanager
def without_backward(model: nn.Module) -> Iterator[None]:
    """Around forward passes that no backward pass follows: as torch.no_grad; after them the model is in shards again.

    FSDP leaves what is outside of layers gathered until a backward pass. Who asks the model for parameters before that
    gets whole copies, which no optimizer steps on and which the next sharding throws away.
    """
    with _keeping_what_is_trained(model):
        with torch.no_grad():
            yield
        reshard(model)


@contextmanager
def _keeping_what_is_trained(model: nn.Module) -> Iterator[None]:
    """Around passes in which an adapter is switched off and on again. The model is in shards before and after them.

    peft freezes what it switches off, and thaws it after. Of what is gathered meanwhile, the shard is frozen and the
    whole copy is thawed, which is thrown away: the shard would be left out of training, checkpoints and output.
    """
    flags = [(one, one.requires_grad) for one in model.parameters()] if isinstance(model, FSDPModule) else []
    yield
    for parameter, is_trained in flags:
        if parameter.requires_grad != is_trained:
            parameter.requires_grad_(is_trained)


def reshard(model: nn.Module) -> None:
    """Gives up what is gathered between two passes; nothing where nothing is in shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def held_as(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every rank has, as this rank holds `parameter`: its shard, where that is in shards."""
    if not isinstance(parameter, DTensor) or isinstance(whole, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather_trained(model: nn.Module, ranks: Ranks, *, frozen_too: bool = False) -> None:
    """Makes the trained parameters whole again, on the main rank's CPU, for saving. The model is not called any more.

    All ranks take part, one parameter after the other. Frozen parameters stay in shards, unless they are saved too.
    """
    reshard(model)
    whole: dict[int, nn.Parameter] = {}
    for module, name, parameter in list(_parameters(model)):
        if not isinstance(parameter, DTensor) or not (parameter.requires_grad or frozen_too):
            continue
        if id(parameter) not in whole:
            full: Tensor = parameter.full_tensor().cpu()
            kept = full if ranks.is_main else torch.empty_like(full, device="meta")
            whole[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        module._parameters[name] = whole[id(parameter)]
        # FSDP's, which take what was loaded for shards; peft loads an adapter to save a PiSSA one.
        module._load_state_dict_post_hooks.clear()


def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float) -> float:
    """As torch.nn.utils.clip_grad_norm_, over shards as well; the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _dtype(name: str | None) -> torch.dtype | None:
    found: torch.dtype | None = None if name is None else getattr(torch, name)
    return found
