"""What several ranks rest on, each part in one process: shares of work, layers to shard, int8 layers without memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_core.int8 import Int8Linear
from polyhead_trainer import backbones, methods
from polyhead_trainer.config import BackboneSection, FullSettings, LoraSettings, ParallelSection, load_config
from polyhead_trainer.errors import RankFailed
from polyhead_trainer.estimate import estimate
from polyhead_trainer.methods import trained_parameters
from polyhead_trainer.out_of_memory import _peak
from polyhead_trainer.parallel import Parallel, Ranks, check_possible, gather_trained, micro_batches, without_backward
from polyhead_trainer.parallel.apply import NOT_ON_SHARDS, _shard, layer_class
from polyhead_trainer.parallel.launch import FIRST_ERROR, _raise_for_killed, _report, _reported, errors_by_reason
from tiny import CONFIGS, save_backbone
from trainer_processes import write_run


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("num_examples", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_ranks_share_every_example_once_in_equally_many_micro_batches(
    num_examples: int, size: int, num_ranks: int
) -> None:
    examples = list(range(num_examples))
    shares = [micro_batches(examples, size, Ranks(rank=rank, size=num_ranks)) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(item for share in shares for part, weight in share if weight for item in part) == examples
    for part, weight in (entry for share in shares for entry in share):
        assert 1 <= len(part) <= size
        assert weight in (0.0, 1.0)


def test_one_rank_cuts_as_it_always_did() -> None:
    assert micro_batches("abcde", 2, Ranks()) == [(["a", "b"], 1.0), (["c", "d"], 1.0), (["e"], 1.0)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_layers_to_shard_are_found(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS[kind])
    found = layer_class(model)
    assert found.__name__ in model._no_split_modules
    assert sum(type(module) is found for module in model.modules()) == CONFIGS[kind].num_hidden_layers


def test_a_model_without_a_stack_asks_for_the_class() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"parallel\.wrap"):
        layer_class(model)
    assert layer_class(model, "Linear") is nn.Linear


def test_an_int8_layer_that_keeps_no_packed_copy_follows_its_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64)
    one, other = (Int8Linear.from_weight(torch.randn(32, 64)) for _ in range(2))
    expected = other(x)
    one.keeps_packed = False
    one(x)
    assert one._packed is None
    one.weight.data, one.SCB = other.weight.data, other.SCB
    assert torch.equal(one(x), expected), "the product must be of the weight that is there now"


@pytest.mark.usefixtures("group_of_one")
def test_int8_is_sharded_in_int8_computes_the_same_and_holds_nothing_back(tmp_path: Path) -> None:
    directory = save_backbone("llama", tmp_path / "model")
    backbone = load_backbone(str(directory), cache_dir=tmp_path / "cache")
    tuned = methods.tune(backbone, LoraSettings(rank=4), seed=0)
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        expected = tuned.model(input_ids=ids).logits  # leaves packed copies behind
        before = {name: tensor.clone() for name, tensor in tuned.trained_state().items()}
        _shard(tuned.model, ParallelSection(), Ranks())
        layers = [module for module in tuned.model.modules() if isinstance(module, Int8Linear)]
        assert {layer.weight.dtype for layer in layers} == {torch.int8}
        assert all(isinstance(layer.weight, DTensor) for layer in layers)
        torch.testing.assert_close(tuned.model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
        assert all(layer._packed is None for layer in layers)
        generated = tuned.model.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, ids.shape[1] + 2)
    gather_trained(tuned.model, Ranks())
    after = tuned.trained_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("group_of_one")
def test_parameters_are_shards_again_after_passes_without_a_backward(tmp_path: Path) -> None:
    directory = save_backbone("llama", tmp_path / "model")
    backbone = load_backbone(str(directory), quantization="none", cache_dir=tmp_path / "cache")
    model = methods.tune(backbone, FullSettings(method="full"), seed=0).model
    _shard(model, ParallelSection(), Ranks())
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        model(input_ids=ids)
    whole = [name for name, parameter in trained_parameters(model).items() if not isinstance(parameter, DTensor)]
    assert "model.embed_tokens.weight" in whole, "FSDP shards the root by itself now: without_backward can go"
    for passes in (model, model.generate):
        with without_backward(model):
            assert not torch.is_grad_enabled()
            passes(input_ids=ids)
        assert all(isinstance(parameter, DTensor) for parameter in trained_parameters(model).values())


@pytest.mark.usefixtures("group_of_one")
def test_an_adapter_outside_of_layers_is_trained_after_passes_without_it(tmp_path: Path) -> None:
    """peft freezes what it switches off, which between two gatherings is another tensor than what it thaws."""
    directory = save_backbone("llama", tmp_path / "model")
    backbone = load_backbone(str(directory), quantization="none", cache_dir=tmp_path / "cache")
    tuned = methods.tune(backbone, LoraSettings(rank=4, target_modules=["lm_head", "q_proj"]), seed=0)
    parallel = Parallel(Ranks(), tuned.model)
    _shard(tuned.model, ParallelSection(), Ranks())
    trained = trained_parameters(tuned.model)
    assert any("lm_head" in name for name in trained)
    ids = torch.arange(4, 40)[None]
    with without_backward(tuned.model), tuned.baseline():
        tuned.model(input_ids=ids)
    assert trained_parameters(tuned.model) == trained
    # A preference's reference is computed in the same micro-batch.
    with parallel.accumulating(last=True):
        with torch.no_grad(), tuned.baseline():
            tuned.model(input_ids=ids)
        tuned.model(input_ids=ids).logits.sum().backward()
    assert trained_parameters(tuned.model) == trained
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("param_dtype", "reduce_dtype"), [("bfloat16", None), ("bfloat16", "float32"), (None, "bfloat16"), (None, None)]
)
def test_adapters_are_summed_in_the_type_that_is_set_and_kept_in_float32(
    tmp_path: Path, param_dtype: str | None, reduce_dtype: str | None
) -> None:
    """Though the first pass of a run is one of the backbone, in which no adapter is trained."""
    directory = save_backbone("llama", tmp_path / "model")
    backbone = load_backbone(str(directory), quantization="none", cache_dir=tmp_path / "cache")
    tuned = methods.tune(backbone, LoraSettings(rank=4), seed=0)
    _shard(tuned.model, ParallelSection(param_dtype=param_dtype, reduce_dtype=reduce_dtype), Ranks())
    ids = torch.arange(4, 40)[None]
    with without_backward(tuned.model), tuned.baseline():
        tuned.model(input_ids=ids)
    tuned.model(input_ids=ids).logits.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad.to_local() for parameter in trained_parameters(tuned.model).values()]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    is_coarse = all(torch.equal(gradient.bfloat16().float(), gradient) for gradient in gradients)
    assert is_coarse == ("bfloat16" in (param_dtype, reduce_dtype))


def test_the_first_error_of_the_ranks_is_raised_where_they_were_started_whatever_its_kind() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for kind in errors_by_reason().values():
        first = kind("x" * 100_000)
        for error in (first, ConfigError("a consequence")):
            _report(error, store)
        found = _reported(store)
        assert (type(found), found.message) == (kind, first.message)
        store.delete_key(FIRST_ERROR)


@pytest.mark.parametrize(
    ("exit_codes", "first", "told"),
    [
        ((-signal.SIGABRT, -signal.SIGKILL), 0, r"rank 1 of 2 was killed by SIGKILL \(the system does so when memory"),
        ((1, -signal.SIGSEGV, -signal.SIGTERM), 1, "rank 1 of 3 was killed by SIGSEGV; all ranks"),
        ((1, -signal.SIGSEGV, -signal.SIGTERM), 0, "rank 1 of 3 was killed by SIGSEGV; all ranks"),
        ((-signal.SIGTERM, 1), 0, "rank 0 of 2 was killed by SIGTERM; all ranks"),
        ((-signal.SIGTERM, 1), 1, None),
        ((0, None, 1), 2, None),
    ],
)
def test_of_ranks_that_ended_the_one_that_was_killed_is_named(
    tmp_path: Path, exit_codes: tuple[int | None, ...], first: int, told: str | None
) -> None:
    config = load_config(write_run(tmp_path))
    processes: list[Any] = [SimpleNamespace(exitcode=code) for code in exit_codes]
    with nullcontext() if told is None else pytest.raises(RankFailed, match=told):
        _raise_for_killed(processes, first, config)


@pytest.mark.parametrize("optimizer", NOT_ON_SHARDS)
def test_optimizers_that_cannot_step_on_shards_are_refused(tmp_path: Path, optimizer: str) -> None:
    file = write_run(tmp_path, method="full", quantization="none", steps=2)
    config = load_config(file, [f"training.optimizer={optimizer}"])
    message = rf"training.optimizer = {optimizer}: .* set training.optimizer = adamw"
    with pytest.raises(ConfigError, match=message):
        check_possible(config, Ranks(size=2))
    with pytest.raises(ConfigError, match=message):
        estimate(config, nproc=2)
    assert _peak(config, 2) is None, "so that it is not advised where memory runs out"
    check_possible(config, Ranks())
    check_possible(load_config(file, [f"training.optimizer={optimizer}", "parallel.strategy=ddp"]), Ranks(size=2))


@pytest.mark.parametrize("quantization", backbones.BY_BITSANDBYTES)
def test_a_rank_loads_what_bitsandbytes_quantises_onto_its_own_device(tmp_path: Path, quantization: str) -> None:
    settings = BackboneSection(quantization=quantization, device="cuda")
    assert backbones.of_rank(settings, torch.device("cuda", 1)) == settings.model_copy(update={"device": "cuda:1"})
    on_host = backbones.of_rank(BackboneSection(quantization="int8", device="cuda"), torch.device("cuda", 1))
    assert (on_host.device, on_host.dtype) == ("cpu", "bfloat16")
    backbones.check_loadable(backbones.of_rank(settings, torch.device("cuda", 1)), save_backbone("llama", tmp_path))


def test_nf4_is_refused_on_shards_and_on_the_cpu(tmp_path: Path) -> None:
    file = write_run(tmp_path, quantization="nf4")
    on_gpus = ["backbone.device=cuda", "parallel.strategy=ddp"]
    check_possible(load_config(file, on_gpus), Ranks(size=2, device=torch.device("cuda", 1)))
    with pytest.raises(ConfigError, match=r"nf4: .* parallel.strategy = ddp"):
        estimate(load_config(file, on_gpus[:1]), nproc=2)
    with pytest.raises(ConfigError, match="nf4 on the CPU"):
        estimate(load_config(file, on_gpus[1:]), nproc=2)
