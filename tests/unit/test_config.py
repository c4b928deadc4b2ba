"""Settings come from file, texts and flags, in that order, and say what is wrong with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from local_engine import local_engine
from polyhead_core.backbone import load_backbone
from polyhead_core.errors import ConfigError
from polyhead_server import cli
from polyhead_server.config import ServerConfig, describe_fields, load_config
from tiny import save_backbone


def test_the_last_of_file_text_and_flag_counts(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('max_n = 2\nmax_logprobs = 3\ndtype = "float32"\n')
    config = load_config(file, ["max_logprobs=4", "dtype = bfloat16"], dtype="auto", backbone=None)
    assert (config.max_n, config.max_logprobs, config.dtype, config.backbone) == (2, 4, "auto", "default")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("prefix_caching=false", False),
        ("check_integrity=True", True),
        ("drain_timeout_s=3", 3.0),
        ("adapters=/x=y", "/x=y"),
    ],
)
def test_texts_become_the_fields_type(text: str, value: object) -> None:
    config = load_config(None, [text])
    assert getattr(config, text.partition("=")[0]) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_modle_len=3", "did you mean max_model_len"),
        ("zzz=3", "known are"),
        ("max_n", "key=value"),
        ("max_n=many", "expected int"),
        ("max_n=0", "1 to"),
        ("max_queued_requests=10000000000", "1 to"),
        ("kv_cache_bytes=0", "1 to"),
        ("adapter_pool_bytes=1" + "0" * 30, "1 to"),
        ("num_threads=100000", "0 to 4096"),
        ("device=gpu", "cpu or cuda"),
        ("device=meta", "cpu or cuda"),
        ("listen=", "HOST:PORT"),
        ("listen=localhost:\u00b2", "HOST:PORT"),
        ("metrics=localhost:\u0663", "HOST:PORT"),
        ("prefix_caching=1", "expected bool"),
        ("listen=localhost", "HOST:PORT"),
        ("listen=localhost:99999", "HOST:PORT"),
        ("quantization=int4", "int8 or none"),
        ("drain_timeout_s=-1", "0 or more"),
        ("drain_timeout_s=nan", "0 or more"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(None, [text])


@pytest.mark.parametrize(
    "content",
    ["max_n = ", "[table]\nx = 1", "max_n = true", 'max_n = "x"', "max_n = 3.7", "listen = 5", 'backbone = ["a"]'],
)
def test_unusable_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "server.toml"
    file.write_text(content)
    with pytest.raises(ConfigError):
        load_config(file)
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load_config(tmp_path / "missing.toml")


def test_every_setting_is_described_and_documented() -> None:
    fields = describe_fields()
    assert [name for name, _, _ in fields] == list(ServerConfig.__dataclass_fields__)
    assert ("max_n", "int", "16") in fields


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "max_modle_len=3"], "did you mean max_model_len"),
        (["--quantization", "int3"], "int8 or none"),
        (["--drain-timeout-s", "soon"], "drain_timeout_s"),
        (["--config", "/nonexistent.toml"], "nonexistent"),
        (["--backbone", "/nonexistent/backbone"], "/nonexistent/backbone"),
    ],
)
def test_the_command_refuses_in_one_line_with_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("polyhead-server: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_cache_bytes": 1 << 59},
        {"adapter_pool_bytes": 1 << 59},
        {"max_resident_adapters": 10**9, "max_adapter_rank": 10**9},
    ],
)
def test_memory_that_is_not_there_is_a_setting_that_cannot_be_used(settings: dict[str, int], tmp_path: Path) -> None:
    backbone = save_backbone("llama", tmp_path / "backbone")
    with pytest.raises(ConfigError, match=next(iter(settings))), local_engine(backbone, tmp_path / "cache", **settings):
        pass


def test_a_device_that_is_not_there_is_a_setting_that_cannot_be_used(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="no CUDA device"):
        load_backbone(str(tmp_path), device="cuda")


def test_an_interrupt_while_it_starts_ends_it_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_serve", interrupted)
    assert cli.main([]) == 130
    assert capsys.readouterr().err == ""


def test_the_help_names_all_settings_without_torch() -> None:
    code = "import sys; from polyhead_server import cli; sys.modules['torch'] = None; cli.main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ServerConfig.__dataclass_fields__)


def test_without_torch_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from polyhead_server import cli; sys.exit(cli.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == "polyhead-server: the package 'torch' is missing: pip install 'polyhead[server]'\n"
