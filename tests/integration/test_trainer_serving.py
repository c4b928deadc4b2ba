"""What the trainer makes, the server serves: its log-probabilities are those that the run measured itself with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_trainer_run import configuration, run_quietly, write_data

from polyhead_client import AdapterRejected, Client, Generation
from polyhead_trainer.config import RunConfig
from polyhead_trainer.data import EncodedExample, load_examples
from polyhead_trainer.run import RunResult
from running_server import RunningServer
from tiny import save_backbone, tokenizer

SERVED = {
    "lora": 'adapter={rank = 4, target_modules = ["q_proj", "v_proj", "down_proj"]}',
    "rslora": "adapter={rank = 8, use_rslora = true}",
    "lora-plus": "adapter={rank = 2, lora_plus_ratio = 8.0, rank_pattern = {q_proj = 6}, alpha_pattern = {q_proj = 5}}",
    "head-and-embedding": 'adapter={rank = 4, target_modules = ["lm_head", "embed_tokens", "up_proj"]}',
    "pissa": 'adapter={rank = 4, init = "pissa"}',
}
NOT_YET = {"ia3": 'adapter={method = "ia3"}', "bottleneck": 'adapter={method = "bottleneck"}'}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[RunConfig, RunResult]]]:
    root = tmp_path_factory.mktemp("served")
    write_data(root)
    save_backbone("llama", root / "backbone")
    runs = {}
    for name, adapter in {**SERVED, **NOT_YET}.items():
        quantization = "none" if name == "pissa" else "int8"
        config = configuration(root, adapter, f"output={root}/adapters/{name}", f"backbone.quantization={quantization}")
        runs[name] = (config, run_quietly(config))
    return root, runs


def served_loss(client: Client, adapter: str, examples: list[EncodedExample]) -> float:
    """Mean over the label tokens in nats, as the trainer measures it."""
    total, num_labels = 0.0, 0
    for example in examples:
        scored = client.score(example.token_ids, adapter=adapter)
        assert [token.token_id for token in scored.tokens] == example.token_ids
        labels = [token for token, is_label in zip(scored.tokens, example.is_label, strict=True) if is_label]
        total -= sum(token.logprob for token in labels)
        num_labels += len(labels)
    return total / num_labels


@pytest.mark.parametrize("quantization", ["int8", "none"])
def test_served_log_probabilities_are_the_runs_own(
    trained: tuple[Path, dict[str, tuple[RunConfig, RunResult]]], tmp_path: Path, quantization: str
) -> None:
    root, runs = trained
    names = [name for name in SERVED if runs[name][0].backbone.quantization == quantization]
    folder = tmp_path / "adapters"
    for name in names:
        shutil.copytree(root / "adapters" / name, folder / name)
    settings = {"quantization": quantization, "kv_dtype": "float32", "adapter_dtype": "float32"}
    with (
        RunningServer(
            tmp_path / "log", backbone=root / "backbone", cache=root / "cache", adapters=folder, **settings
        ) as server,
        Client(server.address) as client,
    ):
        for name in names:
            config, result = runs[name]
            held_out = load_examples(config.data.held_out, tokenizer(), config.data.max_length).examples
            expected = result.record.after.held_out_loss
            assert expected < result.record.before.held_out_loss
            # Int8 activations are rounded: a fused layer's float32 sums may differ in the last bit from the tree's.
            tolerance = 1e-3 if quantization == "int8" else 1e-4
            assert served_loss(client, name, held_out) == pytest.approx(expected, rel=tolerance)
            found = client.generate(
                held_out[0].token_ids[: held_out[0].prompt_length], adapter=name, max_tokens=4, temperature=0.0
            )
            assert isinstance(found, Generation)
            assert found.text == result.record.after.answers[0]
            assert found.adapter is not None
            assert found.adapter.content_hash == result.content_hash


def test_what_the_server_cannot_serve_yet_it_names(
    trained: tuple[Path, dict[str, tuple[RunConfig, RunResult]]], tmp_path: Path
) -> None:
    root, _ = trained
    with (
        RunningServer(
            tmp_path / "log", backbone=root / "backbone", cache=root / "cache", adapters=root / "adapters"
        ) as server,
        Client(server.address) as client,
    ):
        for name, kind in (("ia3", "IA3"), ("bottleneck", "BOTTLENECK")):
            with pytest.raises(AdapterRejected, match=kind):
                client.generate("x", adapter=name, max_tokens=1)
        assert client.generate("x", adapter="lora", max_tokens=1, ignore_eos=True).token_ids
