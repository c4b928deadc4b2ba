"""Every method on a tiny backbone: it learns, its files hold what they should and, reloaded, give the run's figures."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_trainer_run import configuration, run_quietly

from polyhead_core.adapter_directory import WEIGHTS_FILE
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, ConfigError
from polyhead_trainer import methods
from polyhead_trainer.config import RunConfig, TrainingSection
from polyhead_trainer.evaluate import Measures
from polyhead_trainer.methods import trained_parameters
from polyhead_trainer.reevaluate import measure, read_subject

LAYERS, HIDDEN, KEY_WIDTH, INNER = 3, 64, 32, 96
"""Of the tiny Llama."""


@dataclass(frozen=True, kw_only=True)
class Case:
    settings: dict[str, Any]
    tensors: dict[str, list[int]]
    """Endings of the names in the file, with their shapes; one of each in every adapted layer."""
    layers: int = LAYERS
    quantization: str = "int8"
    learning_rate: float = 1e-2
    exact: bool = True
    """Whether what is reloaded gives the same bits."""


LORA = {"q_proj.lora_A.weight": [4, HIDDEN], "q_proj.lora_B.weight": [HIDDEN, 4]}
TWICE = {"q_proj.lora_A.weight": [8, HIDDEN], "q_proj.lora_B.weight": [HIDDEN, 8]}
Q = {"method": "lora", "rank": 4, "target_modules": ["q_proj"]}
CASES = {
    "rslora": Case(settings={**Q, "use_rslora": True}, tensors=LORA),
    "gaussian": Case(settings={**Q, "init": "gaussian"}, tensors=LORA),
    "lora-plus": Case(settings={**Q, "lora_plus_ratio": 16.0}, tensors=LORA, learning_rate=1e-3),
    "dora": Case(settings={**Q, "use_dora": True}, tensors={**LORA, "q_proj.lora_magnitude_vector": [HIDDEN]}),
    "pissa": Case(settings={**Q, "init": "pissa"}, tensors=TWICE, quantization="none", exact=False),
    "olora": Case(settings={**Q, "init": "olora"}, tensors=TWICE, quantization="none", exact=False),
    "ia3": Case(
        settings={"method": "ia3"},
        tensors={"k_proj.ia3_l": [KEY_WIDTH, 1], "v_proj.ia3_l": [KEY_WIDTH, 1], "down_proj.ia3_l": [1, INNER]},
    ),
    "ln_tuning": Case(
        settings={"method": "ln_tuning", "target_modules": ["input_layernorm", "post_attention_layernorm"]},
        tensors={
            "input_layernorm.ln_tuning_layers.weight": [HIDDEN],
            "post_attention_layernorm.ln_tuning_layers.weight": [HIDDEN],
        },
    ),
    "prefix_tuning": Case(
        settings={"method": "prefix_tuning", "num_virtual_tokens": 5},
        tensors={"prompt_embeddings": [5, LAYERS * 2 * KEY_WIDTH]},
        layers=1,
    ),
    "prompt_tuning": Case(
        settings={"method": "prompt_tuning", "num_virtual_tokens": 5, "init_text": "colours"},
        tensors={"prompt_embeddings": [5, HIDDEN]},
        layers=1,
    ),
    "p_tuning": Case(
        settings={"method": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 32},
        tensors={"prompt_embeddings": [5, HIDDEN]},
        layers=1,
    ),
    "p_tuning-lstm": Case(
        settings={"method": "p_tuning", "num_virtual_tokens": 5, "encoder": "lstm", "encoder_hidden_size": 32},
        tensors={"prompt_embeddings": [5, HIDDEN]},
        layers=1,
        exact=False,  # folded for one row, computed for a batch
    ),
    "llama_adapter": Case(
        settings={"method": "llama_adapter", "adapter_len": 6, "adapter_layers": 2},
        tensors={"self_attn.adaption_prompt": [1, 6, HIDDEN], "self_attn.adaption_gate": [1]},
        layers=2,
        learning_rate=0.1,
    ),
    "bottleneck": Case(
        settings={"method": "bottleneck", "size": 8},
        tensors={
            "mlp.bottleneck.down.weight": [8, HIDDEN],
            "mlp.bottleneck.down.bias": [8],
            "mlp.bottleneck.up.weight": [HIDDEN, 8],
            "mlp.bottleneck.up.bias": [HIDDEN],
        },
    ),
    "bottleneck-both": Case(
        settings={"method": "bottleneck", "size": 8, "places": "both", "activation": "gelu"},
        tensors={
            f"{part}.bottleneck.{name}": shape
            for part in ("mlp", "self_attn")
            for name, shape in {
                "down.weight": [8, HIDDEN],
                "down.bias": [8],
                "up.weight": [HIDDEN, 8],
                "up.bias": [HIDDEN],
            }.items()
        },
    ),
}


def case_configuration(folder: Path, case: Case, *overrides: str) -> RunConfig:
    text = ", ".join(f"{name} = {json.dumps(value)}" for name, value in case.settings.items())
    return configuration(
        folder,
        f"adapter={{{text}}}",
        f"backbone.quantization={case.quantization}",
        f"training.learning_rate={case.learning_rate}",
        "training.schedule=constant",
        "training.max_steps=4",
        *overrides,
    )


def assert_equal(found: Measures, expected: Measures, *, exact: bool) -> None:
    if exact:
        assert found == expected
        return
    assert found.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-4)
    assert found.general_perplexity is not None
    assert expected.general_perplexity is not None
    assert math.log(found.general_perplexity) == pytest.approx(math.log(expected.general_perplexity), rel=1e-4)
    assert found.answers == expected.answers


@pytest.mark.parametrize("name", CASES)
def test_a_method_learns_and_its_files_give_the_same_figures(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    config = case_configuration(tmp_path, case)
    result = run_quietly(config)
    assert result.record.after.held_out_loss < result.record.before.held_out_loss
    losses = [report.loss for report in result.record.curve]
    assert losses[-1] < losses[0]

    tensors = load_file(config.output / WEIGHTS_FILE)
    assert len(tensors) == case.layers * len(case.tensors), sorted(tensors)
    for tensor_name, tensor in tensors.items():
        (ending,) = [ending for ending in case.tensors if tensor_name.endswith(ending)]
        assert list(tensor.shape) == case.tensors[ending]

    again = measure(read_subject(config.output, []))
    assert_equal(again.before, result.record.before, exact=case.exact)
    assert_equal(again.after, result.record.after, exact=case.exact)


STOCK = [name for name in CASES if not name.startswith("bottleneck")]


@pytest.mark.parametrize("name", STOCK)
def test_stock_peft_computes_the_trained_models_logits(tmp_path: Path, name: str) -> None:
    """On a backbone that transformers itself loaded: nothing of ours is in the way."""
    case = dataclasses.replace(CASES[name], quantization="none")
    config = case_configuration(tmp_path, case)
    backbone = load_backbone(config.backbone.source, quantization="none", cache_dir=config.backbone.cache_dir)
    tuned = methods.tune(backbone, config.adapter, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(tuned.model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    directory = tmp_path / "saved"
    directory.mkdir()
    tuned.save(directory, fingerprint=backbone.fingerprint, quantization="none")
    ids_BT = torch.randint(3, 256, (2, 9), generator=generator)
    tuned.model.eval()
    with torch.no_grad():
        expected = tuned.model(input_ids=ids_BT, use_cache=False).logits
    fresh = type(backbone.model).from_pretrained(config.backbone.source, dtype=torch.float32)
    stock = PeftModel.from_pretrained(fresh, str(directory)).eval()
    with torch.no_grad():
        found = stock(input_ids=ids_BT, use_cache=False).logits
        untouched = type(backbone.model).from_pretrained(config.backbone.source)(input_ids=ids_BT).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found[:, -9:] - untouched).abs().max() > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize("name", ["ia3", "dora", "prefix_tuning", "prompt_tuning", "llama_adapter", "bottleneck"])
def test_a_warm_start_goes_on_where_the_first_run_ended(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    first = run_quietly(case_configuration(tmp_path, case))
    warm = {**case.settings, "warm_start": str(tmp_path / "adapters/colours")}
    again = case_configuration(tmp_path, dataclasses.replace(case, settings=warm), f"output={tmp_path}/adapters/again")
    second = run_quietly(again)
    assert second.record.before == first.record.before, "the baseline is the backbone, not the first adapter"
    assert second.record.curve[0].loss < first.record.curve[0].loss
    assert second.record.after.held_out_loss < first.record.after.held_out_loss


def test_a_warm_start_from_another_form_is_refused(tmp_path: Path) -> None:
    run_quietly(case_configuration(tmp_path, CASES["rslora"]))
    other = {**Q, "rank": 2, "warm_start": str(tmp_path / "adapters/colours")}
    with pytest.raises(AdapterMismatch, match=r"lora_A.weight is \[4, 64\], where the settings make it \[2, 64\]"):
        run_quietly(case_configuration(tmp_path, Case(settings=other, tensors={}), f"output={tmp_path}/adapters/again"))
    ia3 = {"method": "ia3", "warm_start": str(tmp_path / "adapters/colours")}
    with pytest.raises(AdapterMismatch, match="unlike the adapter that the settings describe"):
        run_quietly(case_configuration(tmp_path, Case(settings=ia3, tensors={}), f"output={tmp_path}/adapters/again"))


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("rslora", {"alpha": 32}, "lora_alpha = 16, where the settings make it 32"),
        ("rslora", {"use_rslora": False}, "use_rslora = True, where the settings make it False"),
        ("bottleneck", {"activation": "silu"}, "where the settings make it silu"),
    ],
)
def test_a_warm_start_that_would_act_differently_is_refused(
    tmp_path: Path, name: str, changed: dict[str, Any], said: str
) -> None:
    case = CASES[name]
    config = case_configuration(tmp_path, case)
    backbone = load_backbone(config.backbone.source, cache_dir=config.backbone.cache_dir)
    (tmp_path / "first").mkdir()
    methods.tune(backbone, config.adapter, 0).save(
        tmp_path / "first", fingerprint=backbone.fingerprint, quantization="int8"
    )
    other = dataclasses.replace(case, settings={**case.settings, **changed, "warm_start": str(tmp_path / "first")})
    with pytest.raises(AdapterMismatch, match=said):
        run_quietly(case_configuration(tmp_path, other))


def test_what_a_warm_start_forgets_is_told_against_what_it_starts_from(tmp_path: Path) -> None:
    case, options = CASES["rslora"], (f'evaluate.earlier=["{tmp_path}/held_out.jsonl"]', "evaluate.max_examples=2")
    first = run_quietly(case_configuration(tmp_path, case, *options))
    assert first.record.before.earlier_loss == pytest.approx(first.record.before.held_out_loss)
    warm = {**case.settings, "warm_start": str(tmp_path / "adapters/colours")}
    again = dataclasses.replace(case, settings=warm)
    second = run_quietly(case_configuration(tmp_path, again, *options, f"output={tmp_path}/adapters/again"))
    assert second.record.before.held_out_loss == pytest.approx(first.record.before.held_out_loss)
    assert second.record.before.earlier_loss == pytest.approx(first.record.after.held_out_loss)


def test_biases_of_int8_layers_are_refused(tmp_path: Path) -> None:
    config = case_configuration(tmp_path, Case(settings={**Q, "bias": "lora_only"}, tensors={}))
    with pytest.raises(ConfigError, match=r"adapter.bias = lora_only: an int8 layer's bias"):
        run_quietly(config)


def test_pissa_of_an_embedding_is_refused(tmp_path: Path) -> None:
    settings = {"method": "lora", "init": "pissa", "target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(ConfigError, match=r"adapter.init = pissa on an embedding"):
        run_quietly(case_configuration(tmp_path, Case(settings=settings, tensors={}, quantization="none")))


@pytest.mark.parametrize(("name", "some"), [("ia3", False), ("dora", True), ("ln_tuning", False)])
def test_factors_do_not_decay(tmp_path: Path, name: str, some: bool) -> None:
    config = case_configuration(tmp_path, CASES[name])
    section = config.backbone
    backbone = load_backbone(section.source, quantization=section.quantization, cache_dir=section.cache_dir)
    tuned = methods.tune(backbone, config.adapter, seed=0)
    groups = tuned.parameter_groups(TrainingSection(max_steps=1, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in trained_parameters(tuned.model).items()}
    decaying = {names[id(one)] for group in groups if "weight_decay" not in group for one in group["params"]}
    assert bool(decaying) == some
    assert all("lora_A" in name or "lora_B" in name for name in decaying)
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_lora_plus_gives_b_its_own_rate(tmp_path: Path) -> None:
    config = case_configuration(tmp_path, CASES["lora-plus"])
    backbone = load_backbone(config.backbone.source, cache_dir=config.backbone.cache_dir)
    tuned = methods.tune(backbone, config.adapter, seed=0)
    groups = tuned.parameter_groups(TrainingSection(max_steps=1, learning_rate=1e-3))
    names = {id(parameter): name for name, parameter in trained_parameters(tuned.model).items()}
    by_rate = {group["lr"]: {"lora_B" in names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert by_rate == {1e-3: {False}, 1.6e-2: {True}}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize(
    ("adapter", "quantization", "message"),
    [
        ('{init = "pissa"}', "int8", "takes its part out of the backbone's weights, which int8 cannot hold"),
        ('{init = "olora"}', "llm.int8", "takes its part out of the backbone's weights, which llm.int8 cannot hold"),
        ("{use_dora = true}", "llm.int8", "fails on bitsandbytes' int8 on the CPU"),
        ('{method = "llama_adapter", adapter_layers = 9}', "int8", "the backbone has 3 layers"),
        ('{method = "prompt_tuning", init_text = ""}', "int8", "has no tokens"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path: Path, adapter: str, quantization: str, message: str) -> None:
    config = configuration(tmp_path, f"adapter={adapter}", f"backbone.quantization={quantization}")
    with pytest.raises(ConfigError, match=message):
        run_quietly(config)


@pytest.mark.parametrize("method", ["hra", "oft", "BOFT", "pissa", "o-lora", "DoRA", "rs_lora"])
def test_refused_methods_say_what_to_do(tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter.method = {method}: "):
        configuration(tmp_path, f'adapter={{method = "{method}"}}')


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"size": None}, "must name size, activation, places of a bottleneck"),
        ({"activation": "tanh"}, "must name size, activation, places of a bottleneck"),
        ({"size": 16}, r"is \[8\], where the settings make it \[16\]"),
    ],
)
def test_a_broken_bottleneck_directory_is_refused(tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    config = case_configuration(tmp_path, CASES["bottleneck"])
    run_quietly(config)
    file = config.output / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **broken}))
    backbone = load_backbone(config.backbone.source, cache_dir=config.backbone.cache_dir)
    with pytest.raises((AdapterMismatch, AdapterFormatError), match=message):
        methods.reload_adapter(backbone, config.output)
