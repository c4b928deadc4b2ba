"""What a run refuses of an [adapter] and of a backbone, and that equal adapters have equal identities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_trainer_run import configuration, run_quietly
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from polyhead_core.adapter_directory import CONFIG_FILE, content_hash
from polyhead_core.errors import ConfigError
from polyhead_trainer.errors import DataError
from polyhead_trainer.methods.peft_tuned import stamp
from tiny import VOCAB, tokenizer


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ('adapter.target_modules="["', "unterminated character set"),
        ('adapter.rank_pattern={"(" = 4}', "refuses the .adapter. settings"),
        ("adapter.rank_pattern={nope = 4}", "rank_pattern keys did not match any targeted module.*nope"),
        ("adapter.alpha_pattern={q_porj = 4}", "alpha_pattern keys did not match any targeted module.*q_porj"),
        ('evaluate.choices=["", " green"]', "an empty text is no completion"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, override: str, said: str) -> None:
    config = configuration(tmp_path, override)
    with pytest.raises(ConfigError, match=said):
        run_quietly(config)
    assert not config.output.parent.exists()


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning", "lora-pissa"])
def test_the_identity_does_not_hang_on_the_order_of_a_set(tmp_path: Path, method: str) -> None:
    """peft writes sets in the order that the process has them in, which another run of the same settings has not."""
    settings = {"lora-pissa": "adapter={rank = 2, init = 'pissa'}", "lora": "adapter={rank = 2}"}
    adapter = settings.get(method, f"adapter={{method = '{method}'}}")
    config = configuration(tmp_path, adapter, "backbone.quantization=none")
    result = run_quietly(config)
    file = config.output / CONFIG_FILE
    found = json.loads(file.read_text())
    sets = [key for key in ("target_modules", "feedforward_modules") if isinstance(found.get(key), list)]
    assert sets
    for key in sets:
        assert found[key] == sorted(found[key])
        found[key].reverse()
    other = shutil.copytree(config.output, tmp_path / "other")
    (other / CONFIG_FILE).write_text(json.dumps(found, indent=2, sort_keys=True))
    assert content_hash(other) != result.content_hash
    backbone = result.record.backbone
    stamped = stamp(other, fingerprint=backbone.fingerprint, quantization=backbone.quantization)
    assert stamped == result.content_hash


def save(model: torch.nn.Module, directory: Path) -> str:
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer().save_pretrained(directory)
    return str(directory)


def test_examples_beyond_the_backbones_positions_are_refused(tmp_path: Path) -> None:
    """Learned positions end there, in the middle of a run; rotary ones go on, untrained."""
    config = OPTConfig(
        vocab_size=VOCAB, max_position_embeddings=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    source = save(OPTForCausalLM(config), tmp_path / "opt")
    how = ("backbone.quantization=none", f"backbone.cache_dir={tmp_path}/cache", "evaluate.general_tokens=32")
    run = configuration(tmp_path, *how, backbone=source)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    long = json.dumps({"prompt": "x" * 80, "completion": " y"})
    (tmp_path / "train.jsonl").write_text("\n".join([*lines, long]))
    for streaming in ("false", "true"):
        with pytest.raises(DataError, match=r"train.jsonl:19: 83 tokens, .* made for 64: set data.max_length = 64"):
            run_quietly(configuration(tmp_path, *how, f"data.streaming={streaming}", backbone=source))
    shorter = configuration(tmp_path, *how, "data.max_length=64", backbone=source)
    assert run_quietly(shorter).record.data.num_too_long == 1
    assert run.data.max_length == 512


def test_a_backbone_without_linear_layers_wants_names(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=512, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)
    source = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    how = ("backbone.quantization=none", f"backbone.cache_dir={tmp_path}/cache")
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel keeps no layer as torch.nn.Linear .* name the layers"):
        run_quietly(configuration(tmp_path, *how, backbone=source))
    named = configuration(tmp_path, *how, 'adapter.target_modules=["c_attn"]', backbone=source)
    assert run_quietly(named).record.trainable.num_trainable == 2 * 4 * (32 + 96)
