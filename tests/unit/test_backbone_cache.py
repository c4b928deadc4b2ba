"""What the cache may not decide: configuration comes from the source, and a bad or unwritable cache is no traceback."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polyhead_core.backbone import convert, load_backbone, resolve_source
from polyhead_core.backbone.checkpoint import compute_fingerprint, fingerprint
from polyhead_core.errors import BackboneError
from tiny import reference_model, save_backbone

IDS = torch.arange(4, 44).view(1, -1)
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
KINDS: dict[str, dict[str, Any]] = {
    "int8": {},
    "plain-int8": {"calibrate": False},
    "typed": {"quantization": "none", "dtype": "bfloat16", "shared": True},
}


def edit(file: Path, **changes: Any) -> None:
    settings = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**settings, **changes}))


@torch.no_grad()
def logits(directory: Path, cache: Path, **settings: Any) -> Tensor:
    found: Tensor = load_backbone(str(directory), cache_dir=cache, **settings).model(IDS).logits
    return found.float()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_configuration_takes_effect_and_the_fingerprint_stays(kind: str, tmp_path: Path) -> None:
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"
    before = load_backbone(str(directory), cache_dir=cache, **KINDS[kind])
    edit(directory / "config.json", rope_parameters=LINEAR)
    edit(directory / "generation_config.json", eos_token_id=[2, 7], temperature=0.5, do_sample=True)
    after = load_backbone(str(directory), cache_dir=cache, **KINDS[kind])
    assert after.fingerprint == before.fingerprint
    assert after.model.config.rope_parameters["factor"] == 4.0
    assert after.eos_token_ids == (2, 7)
    assert after.model.generation_config.temperature == 0.5
    with torch.no_grad():
        ours, exact = after.model(IDS).logits.float(), reference_model(directory)(IDS).logits
    assert (ours - exact).norm() / exact.norm() < 0.15
    fresh = logits(directory, tmp_path / "fresh", **KINDS[kind])
    assert torch.equal(ours, fresh), "what an older configuration left in the cache shows"


def test_what_changes_no_number_converts_nothing_again(tmp_path: Path) -> None:
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"
    load_backbone(str(directory), cache_dir=cache)
    edit(directory / "config.json", eos_token_id=7)
    backbone = load_backbone(str(directory), cache_dir=cache)
    assert 7 in backbone.eos_token_ids
    assert len(list((cache / "int8").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"0123", b"\xff\xfe", b"x" * 64, b"a" * 64 + b"\n"])
def test_a_remembered_fingerprint_that_is_none_is_computed_anew(content: bytes, tmp_path: Path) -> None:
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"
    true = fingerprint(directory, cache)
    (remembered,) = (cache / "fingerprints").iterdir()
    remembered.write_bytes(content)
    assert fingerprint(directory, cache) == true
    assert remembered.read_text() == true
    assert list((cache / "fingerprints").iterdir()) == [remembered]


def test_a_write_that_breaks_off_leaves_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with caplog.at_level(logging.WARNING):
        assert fingerprint(directory, cache) == compute_fingerprint(directory)
    assert "No space left" in caplog.text
    assert list((cache / "fingerprints").iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_unwritable_cache_says_what_to_do(kind: str, tmp_path: Path) -> None:
    """A file where the cache should be: what stops root too, unlike permissions."""
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"
    cache.write_text("no folder")
    assert fingerprint(directory, cache) == compute_fingerprint(directory)
    with pytest.raises(BackboneError, match=r"cannot write .*cache_dir.*POLYHEAD_CACHE"):
        load_backbone(str(directory), cache_dir=cache, **KINDS[kind])
    assert load_backbone(str(directory), cache_dir=cache, quantization="none").fingerprint
    with pytest.raises(BackboneError, match=r"cannot write .*cache_dir.*POLYHEAD_CACHE"):
        resolve_source("default", cache)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a file system that makes no folders")
def test_a_cache_where_no_folder_can_be_made_says_what_to_do() -> None:
    with pytest.raises(BackboneError, match=r"cannot write /proc/polyhead/.*cache_dir"):
        resolve_source("default", Path("/proc/polyhead/cache"))


def test_a_disk_that_fills_up_during_the_conversion_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, cache = save_backbone("llama", tmp_path / "model"), tmp_path / "cache"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert, "save_file", full)
    with pytest.raises(BackboneError, match=r"No space left.*POLYHEAD_CACHE"):
        load_backbone(str(directory), cache_dir=cache, calibrate=False)
    assert list((cache / "int8").iterdir()) == []
