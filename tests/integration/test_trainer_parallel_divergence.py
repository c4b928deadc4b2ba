"""What several ranks leave when a loss is not a number any more: what one process leaves, and nobody waits for ever."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from poisoned_runs import BAD_LETTER, FIRST_BAD_STEP, at_once_poisoned_rank, poison, poisoned_rank
from polyhead_trainer.config import load_config
from polyhead_trainer.errors import TrainingDiverged
from polyhead_trainer.parallel import launch
from trainer_processes import finish, write_run


def diverge_on_ranks(monkeypatch: pytest.MonkeyPatch, file: Path, *settings: str, rank: Any = poisoned_rank) -> str:
    """What two ranks say, in little time."""
    monkeypatch.setattr(launch, "_rank", rank)
    started = time.monotonic()
    with pytest.raises(TrainingDiverged) as told:
        launch.launch(load_config(file, settings), 2, overwrite=False, resume=False)
    assert time.monotonic() - started < 120, "hung, or nearly"
    return told.value.message


def trained_at(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    dcp_to_torch_save(checkpoint, scratch)
    trained: dict[str, torch.Tensor] = torch.load(scratch, weights_only=True)["trained"]
    return {name.replace(".default", ""): tensor for name, tensor in trained.items()}


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        ("fsdp", "{rank = 4, dropout = 0.0}"),
        ("ddp", "{rank = 4, dropout = 0.0}"),
        # Of these some are outside of layers, and rank 1's part of some is empty.
        ("fsdp", '{rank = 1, target_modules = ["q_proj", "lm_head"]}'),
        ("fsdp", '{rank = 4, init = "pissa", target_modules = ["q_proj"]}'),
        ("fsdp", '{method = "bottleneck"}'),
    ],
)
def test_the_last_good_adapter_of_several_ranks_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, adapter: str
) -> None:
    file = write_run(tmp_path, quantization="none", steps=8)
    settings = [f"adapter={adapter}", "checkpoint.every_steps=1", f"parallel.strategy={strategy}"]
    # AdamW makes whole steps of gradients that are all rounding.
    settings += ["training.optimizer=sgd", "training.learning_rate=0.05"]
    assert finish(file, *settings, prepare=poison, argument=FIRST_BAD_STEP) == 1
    alone = file.with_suffix(".error").read_text().removeprefix("TrainingDiverged: ")
    output = tmp_path / "adapters/ranks"
    message = diverge_on_ranks(monkeypatch, file, *settings, f"output={output}")

    kept = output.with_name("ranks.last-good")
    assert message.startswith("step 5: loss nan")
    assert f"the adapter after 3 steps, the last with a finite loss, is in {kept}" in message
    same = [re.sub(r"norm [\w.]+", "norm N", text) for text in (message.replace("ranks", "colours"), alone)]
    assert same[0] == same[1]
    checkpoints = output.with_name("ranks.checkpoints")
    assert f"the last checkpoint is {checkpoints}/step-4, with the weights that step 5 began with" in message
    assert message.endswith(f"; {checkpoints}/step-3 is from before")
    assert not output.exists()

    found, expected = (
        load_file(folder / "adapter_model.safetensors") for folder in (kept, tmp_path / "adapters/colours.last-good")
    )
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0.0, atol=1e-5)
    if "init" not in adapter and "bottleneck" not in adapter:
        good, later = (trained_at(checkpoints / f"step-{step}", tmp_path / f"{step}.pt") for step in (3, 4))
        assert good.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in good.items())
        assert not all(torch.equal(later[name], tensor) for name, tensor in good.items())
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "backbone"), str(kept))


def test_the_batch_says_which_rank_computed_which_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, quantization="none", steps=8, dropout=0.0)
    message = diverge_on_ranks(monkeypatch, file)
    batch = json.loads((tmp_path / "adapters/colours.diverged.json").read_text())
    assert batch["step"] == FIRST_BAD_STEP
    assert [row["rank"] for row in batch["examples"]] == [0, 1, 0, 1, 0, 1, 0][: len(batch["examples"])]
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    number = {row["origin"]: int(row["origin"].rpartition(":")[2]) - 1 for row in batch["examples"]}
    blamed = [origin for origin, at in number.items() if BAD_LETTER in prompts[at]]
    assert 0 < len(blamed) < len(number)
    assert f"these have no finite loss of their own: {', '.join(blamed)};" in message


def test_ranks_that_diverge_at_once_keep_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_run(tmp_path, quantization="none", steps=8, dropout=0.0)
    message = diverge_on_ranks(monkeypatch, file, rank=at_once_poisoned_rank)
    assert message.endswith("no earlier step had shown a finite loss, so that no adapter is kept")
    names = sorted(path.name for path in (tmp_path / "adapters").iterdir())
    assert names == ["colours.diverged.json", "colours.tensorboard"]
