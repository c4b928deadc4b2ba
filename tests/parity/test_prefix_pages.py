"""A prefix of keys and values in pages that rows share in front of their own: logits equal peft's prefix tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model

from polyhead_core.backbone import load_backbone
from polyhead_core.kernels.tables import AdapterTables
from polyhead_server.engine.batch import BatchRow
from polyhead_server.engine.runner import Runner
from tiny import reference_model, save_backbone

BLOCK = 8


@pytest.mark.parametrize("length", [5, 8, 19])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_shared_prefix_pages_equal_prefix_tuning(family: str, length: int, tmp_path: Path) -> None:
    """Two prompts behind one prefix, one of them in chunks, beside a row without it."""
    save_backbone(family, tmp_path)
    backbone = load_backbone(str(tmp_path), quantization="none", dtype="float32")
    runner = Runner(backbone, block_size=BLOCK, kv_cache_bytes=1 << 20)
    torch.manual_seed(length)
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    tuned = get_peft_model(reference_model(tmp_path), settings).eval()
    prefix = write_prefix(runner, tuned)
    assert len(prefix) * BLOCK - length < BLOCK

    prompts = [torch.randint(4, 280, (size,)).tolist() for size in (13, 30, 9)]
    blocks = [[*prefix, *range(10, 12)], [*prefix, *range(12, 16)], [*range(16, 18)]]
    offset = len(prefix) * BLOCK - length
    none = AdapterTables.without_adapters(len(backbone.sites), backbone.device)

    def run(*rows: tuple[int, int, int]) -> list[torch.Tensor]:
        """Prompt, begin and end of the tokens to compute; the logits of each row's."""
        batch = [
            BatchRow(
                token_ids=prompts[one][begin:end],
                start=begin + (length if one < 2 else 0),
                block_ids=blocks[one],
                slot=-1,
                key_offset=offset if one < 2 else 0,
                num_logits=end - begin,
            )
            for one, begin, end in rows
        ]
        return list(runner.forward(runner.prepare(batch, none)).split([row.num_logits for row in batch]))

    first, chunk, plain = run((0, 0, 13), (1, 0, 11), (2, 0, 9))
    (rest,) = run((1, 11, 29))
    (last,) = run((1, 29, 30))
    with torch.no_grad():
        for prompt, found in ((prompts[0], first), (prompts[1], torch.cat((chunk, rest, last)))):
            torch.testing.assert_close(found, tuned(torch.tensor([prompt])).logits[0], rtol=1e-3, atol=1e-3)
        expected = reference_model(tmp_path)(torch.tensor([prompts[2]])).logits[0]
    torch.testing.assert_close(plain, expected, rtol=1e-3, atol=1e-3)


def write_prefix(runner: Runner, tuned: Any) -> list[int]:
    """Puts the learned keys and values at the end of the first blocks, in any order; these."""
    prefix = [tuple(layer) for layer in tuned.get_prompt(batch_size=1)]
    length = prefix[0][0].shape[2]
    blocks = list(range(-(-length // BLOCK)))[::-1]
    places = torch.arange(len(blocks) * BLOCK)[-length:]
    numbers, at = torch.tensor(blocks)[places // BLOCK], places % BLOCK
    for layer, (keys, values, *_) in enumerate(prefix):
        for pages, learned in ((runner.kv.keys[layer], keys), (runner.kv.values[layer], values)):
            pages[numbers, :, at] = learned[0].detach().transpose(0, 1)
    return blocks
