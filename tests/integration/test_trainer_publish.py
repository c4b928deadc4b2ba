"""`trainer publish`: what a server's folder holds at any moment is a whole adapter, and one for its backbone."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyhead_client import Client
from polyhead_core.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, content_hash, stamp_backbone
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, ConfigError, InvalidRequest
from polyhead_trainer.cli import app
from polyhead_trainer.delivery import deliver, exchange, put_in_place
from polyhead_trainer.errors import OutputExists
from running_server import RunningServer
from tiny import save_adapter, save_backbone


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone("llama", tmp_path_factory.mktemp("backbone") / "base")


def make(backbone: Path, directory: Path, seed: int = 1) -> Path:
    return save_adapter(backbone, directory, seed=seed, r=4, target_modules=["q_proj"])


def test_all_of_it_is_copied_and_readable(tmp_path: Path, backbone: Path) -> None:
    adapter = make(backbone, tmp_path / "colours")
    (adapter / "tensorboard").mkdir()
    (adapter / "tensorboard/events").write_text("events")
    os.chmod(adapter / WEIGHTS_FILE, 0o600)
    (tmp_path / "served").mkdir()
    delivered = deliver(adapter, tmp_path / "served")
    assert delivered.path == tmp_path / "served/colours"
    assert content_hash(delivered.path) == content_hash(adapter) == delivered.content_hash
    assert sorted(p.name for p in delivered.path.rglob("*")) == sorted(p.name for p in adapter.rglob("*"))
    assert (delivered.path / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["colours"], "no staging is left"


def test_what_is_refused_leaves_the_folder_as_it_was(tmp_path: Path, backbone: Path) -> None:
    adapter, other = make(backbone, tmp_path / "colours"), make(backbone, tmp_path / "other", seed=2)
    served = tmp_path / "served"
    with pytest.raises(ConfigError, match="no folder"):
        deliver(adapter, served)
    served.mkdir()
    deliver(adapter, served)
    with pytest.raises(OutputExists, match="--overwrite"):
        deliver(other, served, name="colours")
    with pytest.raises(InvalidRequest, match="path separator"):
        deliver(other, served, name="../colours")
    with pytest.raises(ConfigError, match="already there"):
        deliver(served / "colours", served, overwrite=True)
    (served / "thesis").mkdir()
    with pytest.raises(ConfigError, match="no adapter's folder"):
        deliver(other, served, name="thesis", overwrite=True)
    (other / WEIGHTS_FILE).write_bytes(b"\x80\x04 not tensors")
    with pytest.raises(AdapterFormatError):
        deliver(other, served, name="new")
    assert content_hash(served / "colours") == content_hash(adapter)
    assert sorted(path.name for path in served.iterdir()) == ["colours", "thesis"]


def test_while_it_is_replaced_an_adapter_is_always_there(tmp_path: Path, backbone: Path) -> None:
    both = [make(backbone, tmp_path / "one"), make(backbone, tmp_path / "two", seed=2)]
    served = tmp_path / "served"
    served.mkdir()
    deliver(both[0], served, name="colours")
    (tmp_path / "probe-a").mkdir()
    (tmp_path / "probe-b").mkdir()
    if not exchange(tmp_path / "probe-a", tmp_path / "probe-b"):
        pytest.skip("this file system cannot exchange two names")
    looks, missing, done = 0, 0, threading.Event()

    def look() -> None:
        nonlocal looks, missing
        while not done.is_set():
            looks += 1
            missing += not os.path.lexists(served / "colours" / CONFIG_FILE)

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(1, 31):
        deliver(both[number % 2], served, name="colours", overwrite=True)
        assert content_hash(served / "colours") == content_hash(both[number % 2])
    done.set()
    watcher.join()
    assert looks > 100
    assert missing == 0
    assert [path.name for path in served.iterdir()] == ["colours"]


def test_without_an_exchange_it_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyhead_trainer.delivery.exchange", lambda one, other: False)
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    put_in_place(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old/text").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_running_server_is_asked_and_serves_it(tmp_path: Path, backbone: Path) -> None:
    cache, served = tmp_path / "cache", tmp_path / "served"
    served.mkdir()
    adapter = make(backbone, tmp_path / "colours")
    stranger = make(backbone, tmp_path / "stranger")
    fingerprint = load_backbone(str(backbone), quantization="none", cache_dir=cache).fingerprint
    stamp_backbone(adapter, fingerprint=fingerprint, quantization="int8")
    stamp_backbone(stranger, fingerprint="0" * 64, quantization="none")
    settings = {"quantization": "none", "adapter_scan_interval_s": 0.1}
    with RunningServer(tmp_path / "log", backbone=backbone, cache=cache, adapters=served, **settings) as server:
        with pytest.raises(AdapterMismatch, match="it would be refused there"):
            deliver(stranger, served, server=server.address)
        arguments = ["publish", str(adapter), str(served), "--server", server.address]
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert "trained on int8, served on none" in done.output
        with Client(server.address) as client:
            until_s = time.monotonic() + 20
            while not client.adapters():
                assert time.monotonic() < until_s, "the server did not see it"
                time.sleep(0.05)
            assert client.load("colours").content_hash == content_hash(adapter)
            assert [one.name for one in client.adapters()] == ["colours"]
    with pytest.raises(ConfigError, match="--server"):
        deliver(adapter, served, name="again", server=server.address)
    assert [path.name for path in served.iterdir()] == ["colours"]
