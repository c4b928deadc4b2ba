"""The adapter folder: what is read, what its hash covers, and a table of hostile folders with what each is told."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from polyhead_core.adapter_directory import (
    CONFIG_FILE,
    FINGERPRINT_KEY,
    MAX_HEADER_BYTES,
    QUANTIZATION_KEY,
    WEIGHTS_FILE,
    check_adapter_name,
    content_hash,
    read_adapter_directory,
    stamp_backbone,
)
from polyhead_core.errors import AdapterFormatError, AdapterRejected, AdapterTooLarge, InvalidRequest

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    directory = tmp_path / "anna"
    directory.mkdir()
    (directory / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    save_file({KEY: torch.arange(32.0).view(4, 8)}, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    return directory


def test_reads_config_tensors_and_metadata(folder: Path) -> None:
    adapter = read_adapter_directory(folder)
    assert adapter.name == "anna"
    assert adapter.config == {"peft_type": "LORA", "r": 4}
    assert adapter.metadata == {"format": "pt"}
    assert adapter.backbone_fingerprint is None
    assert torch.equal(adapter.tensors[KEY], torch.arange(32.0).view(4, 8))
    assert adapter.content_hash == content_hash(folder)
    assert adapter.file_bytes == sum((folder / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE))


def test_the_hash_covers_both_files_and_nothing_else(folder: Path) -> None:
    first = content_hash(folder)
    (folder / "README.md").write_text("other files do not count")
    assert content_hash(folder) == first
    (folder / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "r": 5}))
    second = content_hash(folder)
    save_file({KEY: torch.ones(4, 8)}, folder / WEIGHTS_FILE)
    assert len({first, second, content_hash(folder)}) == 3


def test_a_byte_cannot_move_between_the_files(folder: Path) -> None:
    (folder / CONFIG_FILE).write_bytes(b"{} ")
    (folder / WEIGHTS_FILE).write_bytes(b"abc")
    first = content_hash(folder)
    (folder / CONFIG_FILE).write_bytes(b"{}")
    (folder / WEIGHTS_FILE).write_bytes(b" abc")
    assert content_hash(folder) != first


def test_stamp_keeps_tensors_and_metadata_and_is_idempotent(folder: Path) -> None:
    save_file({KEY: torch.randn(4, 8, dtype=torch.bfloat16)}, folder / WEIGHTS_FILE, metadata={"a": "b"})
    os.chmod(folder / WEIGHTS_FILE, 0o640)
    before = load_file(folder / WEIGHTS_FILE)
    stamped_hash = stamp_backbone(folder, fingerprint="f" * 64, quantization="int8")
    stamped = (folder / WEIGHTS_FILE).read_bytes()
    adapter = read_adapter_directory(folder)
    assert adapter.metadata == {"format": "pt", "a": "b", FINGERPRINT_KEY: "f" * 64, QUANTIZATION_KEY: "int8"}
    assert (adapter.backbone_fingerprint, adapter.quantization) == ("f" * 64, "int8")
    assert torch.equal(adapter.tensors[KEY], before[KEY])
    assert adapter.content_hash == stamped_hash
    assert (folder / WEIGHTS_FILE).stat().st_mode & 0o777 == 0o640
    assert stamp_backbone(folder, fingerprint="f" * 64, quantization="int8") == stamped_hash
    assert (folder / WEIGHTS_FILE).read_bytes() == stamped
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


def test_stock_peft_loads_a_stamped_adapter(tmp_path: Path) -> None:
    def backbone() -> LlamaForCausalLM:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
        return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape)).eval()

    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(backbone(), config).eval()
    model.save_pretrained(tmp_path / "a")
    stamp_backbone(tmp_path / "a", fingerprint="1234", quantization="none")
    loaded = PeftModel.from_pretrained(backbone(), str(tmp_path / "a")).eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["a", "sentiment-v2", "Größe 3", "a.b", "x" * 255])
def test_usable_names(name: str) -> None:
    check_adapter_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "\x1b[31m", "x" * 256, "\ud800"],
)
def test_unusable_names(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_adapter_name(name)
    assert "not usable" in caught.value.message
    caught.value.message.encode("utf-8")  # the message itself must be fit for the wire


class _Explodes:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch EXPLODED",)


def _header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def _weights(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS_FILE).write_bytes(data)


def _config(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / CONFIG_FILE).write_bytes(data)


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-5])


def _pickle_beside(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / WEIGHTS_FILE).unlink()
        (folder / name).write_bytes(pickle.dumps(_Explodes()))

    return apply


def _torch_save(folder: Path) -> None:
    torch.save({KEY: torch.ones(2)}, folder / WEIGHTS_FILE)


def _link_out(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        outside = folder.parent / f"secret-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(Path("..") / outside.name)

    return apply


def _absolute_link_out(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to("/etc/passwd")


def _link_loop(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to(WEIGHTS_FILE)


def _directory_as_file(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).mkdir()


def _pipe_as_file(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


_ENTRY = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "adapter_config.json is missing"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "adapter_model.safetensors is missing"),
    "weights.bin": (_pickle_beside("adapter_model.bin"), "safe_serialization"),
    "weights.pt": (_pickle_beside("adapter_model.pt"), "safe_serialization"),
    "pickle by another name": (_weights(pickle.dumps(_Explodes())), "pickle"),
    "zip pickle by another name": (_torch_save, "pickle"),
    "empty weights": (_weights(b""), "truncated"),
    "garbage": (_weights(b"\xff" * 64), "truncated or not a safetensors"),
    "truncated": (_truncate, "damaged"),
    "header longer than the file": (_weights(_header(_ENTRY)[:-10]), "truncated"),
    "header length of 2**64 - 1": (_weights(b"\xff" * 8 + b"{}"), "truncated"),
    "header absurdly large": (_weights(_header(b" " * (MAX_HEADER_BYTES + 1))), "at most"),
    "header not JSON": (_weights(_header(b"not json")), "not JSON"),
    "header a list": (_weights(_header(b"[]")), "JSON object"),
    "header nested": (_weights(_header(b"[" * 200_000)), "not JSON"),
    "data missing": (_weights(_header(_ENTRY, b"\0" * 4)), "damaged"),
    "data left over": (_weights(_header(_ENTRY, b"\0" * 12)), "damaged"),
    "offsets outside": (
        _weights(_header(b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', b"\0" * 8)),
        "damaged",
    ),
    "shape overflow": (
        _weights(_header(b'{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}}', b"\0" * 8)),
        "damaged",
    ),
    "unknown dtype": (_weights(_header(_ENTRY.replace(b"F32", b"F33"), b"\0" * 8)), "damaged"),
    "metadata not texts": (_weights(_header(b'{"__metadata__":{"a":1}}')), "damaged"),
    "config not JSON": (_config(b"{"), "UTF-8 JSON"),
    "config a list": (_config(b"[1]"), "JSON list"),
    "config nested": (_config(b"[" * 100_000), "UTF-8 JSON"),
    "config with NaN": (_config(b'{"lora_alpha": NaN}'), "UTF-8 JSON"),
    "config with a key twice": (_config(b'{"r": 1, "r": 2}'), "twice"),
    "config not UTF-8": (_config(b'{"a": "\xff"}'), "UTF-8 JSON"),
    "config with a huge number": (_config(b'{"r": ' + b"9" * 10_000 + b"}"), "UTF-8 JSON"),
    "config too large": (_config(b'{"a": "' + b"x" * (1 << 20) + b'"}'), "at most"),
    "config a link out": (_link_out(CONFIG_FILE), "link"),
    "weights a link out": (_link_out(WEIGHTS_FILE), "link"),
    "config a link to /etc": (_absolute_link_out, "link"),
    "weights a link to itself": (_link_loop, "cannot be opened"),
    "weights a folder": (_directory_as_file, "not a regular file"),
    "weights a pipe": (_pipe_as_file, "not a regular file"),
    "no folder": (lambda folder: folder.rename(folder.parent / "elsewhere"), "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders_are_refused_with_their_reason(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    damage, expected = HOSTILE[case]
    damage(folder)
    with pytest.raises(AdapterRejected) as caught:
        read_adapter_directory(folder)
    assert expected in caught.value.message
    assert "anna" in caught.value.message
    assert caught.value.details["adapter"] == "anna"
    assert isinstance(caught.value, AdapterTooLarge if case == "config too large" else AdapterFormatError)
    assert not (folder.parent / "EXPLODED").exists()


def test_too_large_files_are_refused_unread(folder: Path) -> None:
    with (folder / WEIGHTS_FILE).open("r+b") as file:
        file.truncate(1 << 40)  # sparse: reading it would never end
    with pytest.raises(AdapterTooLarge) as caught:
        read_adapter_directory(folder, max_file_bytes=1 << 20)
    assert str(1 << 40) in caught.value.message
    assert str(1 << 20) in caught.value.message


def test_a_link_to_a_file_beside_it_is_followed(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "v2.safetensors")
    (folder / WEIGHTS_FILE).symlink_to("v2.safetensors")
    assert set(read_adapter_directory(folder).tensors) == {KEY}


def test_a_file_replaced_while_it_is_read_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead_core import adapter_directory

    read = adapter_directory._read

    def replacing(descriptor: int, adapter: str, file_name: str, max_bytes: int) -> bytes:
        if file_name == CONFIG_FILE:
            (folder / "new").write_bytes(b"x" * 100)
            (folder / "new").rename(folder / WEIGHTS_FILE)
        return read(descriptor, adapter, file_name, max_bytes)

    monkeypatch.setattr(adapter_directory, "_read", replacing)
    with pytest.raises(AdapterFormatError, match="changed while"):
        read_adapter_directory(folder)
