"""What is said when memory runs out, where the estimate itself fails or ranks share a host."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyhead_trainer import out_of_memory
from polyhead_trainer.config import load_config
from polyhead_trainer.errors import OutOfMemory
from polyhead_trainer.out_of_memory import _available_bytes, explaining_out_of_memory
from trainer_processes import write_run


@pytest.mark.parametrize(
    "failure", [RuntimeError("no such operator on tensors without data"), MemoryError("none left")]
)
def test_an_estimate_that_fails_does_not_hide_what_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(out_of_memory, "estimate", fail)
    with (
        pytest.raises(OutOfMemory, match=rf"on cpu: 8 GiB .* cannot be estimated \({failure}\)"),
        explaining_out_of_memory(load_config(write_run(tmp_path)), num_ranks=1),
    ):
        raise MemoryError("8 GiB are not there")


def test_a_host_has_its_memory_once_for_all_ranks_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = _available_bytes("cpu", 1)
    assert _available_bytes("cpu", 4) == whole // 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # torchrun's, of 4 ranks on two hosts
    assert _available_bytes("cpu", 4) == whole // 2
