"""The server's settings: one frozen dataclass, one docstring a field, checked at construction. Reads no environment."""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from polyhead_core.devices import DEVICE_NAME
from polyhead_core.errors import ConfigError

_MAX_COUNT = 10**9
"""Counts travel as 32 bits, some of them added up."""
_MAX_BYTES = 1 << 60
_MAX_THREADS = 4096
_TAKEN = {bool: (bool,), int: (int, str), float: (float, int, str), str: (str,)}
"""What a setting's type is made from, without loss: a file has numbers, --set and flags have texts."""


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    backbone: str = "default"
    """`default` (SmolLM2-135M-Instruct), a Hugging Face directory, a .gguf file or a hub id."""
    quantization: str = "int8"
    """`int8`, or `none` to serve the weights in `dtype`."""
    dtype: str = "auto"
    """Type of activations, and with quantization = none of weights: `float32`, `bfloat16`; auto: float32 on the CPU."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    cache_dir: str = ""
    """Where converted backbones are kept; empty: `$POLYHEAD_CACHE`, `$XDG_CACHE_HOME/polyhead`, `~/.cache/polyhead`."""
    adapters: str = ""
    """Folder whose sub-folders are adapters, named after them; empty: none."""
    listen: str = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server; port 0 takes a free one."""
    metrics: str = ""
    """HOST:PORT of the Prometheus endpoint; empty: none."""
    max_model_len: int = 2048
    """Most tokens of one sequence, prompt and output together; the backbone's own limit bounds it too."""
    max_batch_rows: int = 64
    """Most sequences in one step."""
    max_batch_tokens: int = 512
    """Most tokens computed in one step; longer prompts are prefilled in chunks."""
    max_queued_requests: int = 1024
    """Requests waiting beyond this are refused with RESOURCE_EXHAUSTED."""
    max_n: int = 16
    """Most continuations of one request."""
    max_logprobs: int = 20
    """Most likeliest tokens reported per position."""
    kv_block_size: int = 16
    """Tokens in one KV block."""
    kv_cache_bytes: int = 1 << 30
    """Memory of the KV cache."""
    kv_dtype: str = "auto"
    """Type of cached keys and values: `float32`, `bfloat16`; auto: bfloat16 with int8 weights, else `dtype`."""
    prefix_caching: bool = True
    """Reuse KV blocks of equal prefixes of the same tenant and adapter."""
    adapter_pool_bytes: int = 256 << 20
    """Memory of the device pool of adapter pages."""
    max_resident_adapters: int = 256
    """Slots of the device pool: most adapters resident at once."""
    host_cache_bytes: int = 1 << 30
    """Memory of packed adapters kept in host memory behind the device pool."""
    max_adapter_rank: int = 128
    """Adapters of a larger rank are refused."""
    max_adapter_file_bytes: int = 2 << 30
    """Adapter files larger than this are refused unread."""
    adapter_dtype: str = "auto"
    """Type of adapter weights in the pool: `float32`, `bfloat16`; auto: float32 where the backbone's weights are."""
    adapter_scan_interval_s: float = 1.0
    """How often the adapters folder is looked at; less often where that would take more than 0.25 % of the time."""
    max_adapter_wait_s: float = 2.0
    """Once a request has waited this long for room in the adapter pool, later ones are held back until it is in."""
    drain_timeout_s: float = 30.0
    """After SIGTERM, how long running requests may take to finish."""
    reader_timeout_s: float = 60.0
    """A stream whose client reads nothing for this long is ended."""
    metrics_max_adapter_labels: int = 100
    """Adapters with counters of their own; all others share the label `other`."""
    fuse_layers: bool = True
    """Run decoder layers of the common form, in int8, as one fused call."""
    cuda_graphs: bool = True
    """On CUDA, record decode steps of fused layers as graphs and replay them."""
    num_threads: int = 0
    """Compute threads; 0: as torch chooses."""
    check_integrity: bool = False
    """Check all bookkeeping after every step (tests)."""

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, expected: str) -> None:
            if not ok:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is not usable: expected {expected}")

        check("quantization", self.quantization in ("int8", "none"), "int8 or none")
        check("device", DEVICE_NAME.fullmatch(self.device) is not None, "cpu or cuda")
        for name in ("dtype", "kv_dtype", "adapter_dtype"):
            check(name, getattr(self, name) in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16")
        check("listen", _is_address(self.listen), "HOST:PORT")
        check("metrics", not self.metrics or _is_address(self.metrics), "HOST:PORT")
        for name in (
            "max_model_len", "max_batch_rows", "max_batch_tokens", "max_queued_requests", "max_n", "kv_block_size",
            "max_resident_adapters", "max_adapter_rank",
        ):  # fmt: skip
            check(name, 1 <= getattr(self, name) <= _MAX_COUNT, f"1 to {_MAX_COUNT}")
        for name in ("max_logprobs", "metrics_max_adapter_labels"):
            check(name, 0 <= getattr(self, name) <= _MAX_COUNT, f"0 to {_MAX_COUNT}")
        for name in ("kv_cache_bytes", "adapter_pool_bytes", "max_adapter_file_bytes"):
            check(name, 1 <= getattr(self, name) <= _MAX_BYTES, f"1 to {_MAX_BYTES}")
        check("host_cache_bytes", self.host_cache_bytes >= 0, "0 or more")
        check("num_threads", 0 <= self.num_threads <= _MAX_THREADS, f"0 to {_MAX_THREADS}")
        check("adapter_scan_interval_s", self.adapter_scan_interval_s > 0, "more than 0")
        check("max_adapter_wait_s", self.max_adapter_wait_s >= 0, "0 or more")
        check("drain_timeout_s", self.drain_timeout_s >= 0, "0 or more")
        check("reader_timeout_s", self.reader_timeout_s > 0, "more than 0")


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and int(port) < 65536


def load_config(file: Path | None, overrides: Sequence[str] = (), **flags: Any) -> ServerConfig:
    """Settings from a TOML `file`, then `key=value` texts, then `flags` that are not None; the last one counts."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values.update(tomllib.loads(file.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the settings in {file}: {error}") from error
    for text in overrides:
        key, separator, value = text.partition("=")
        if not separator:
            raise ConfigError(f"--set {text!r}: expected key=value")
        values[key.strip()] = value.strip()
    values.update({key: value for key, value in flags.items() if value is not None})
    return ServerConfig(**_converted(values))


def _converted(values: Mapping[str, Any]) -> dict[str, Any]:
    types = get_type_hints(ServerConfig)
    converted = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(types))}"
            raise ConfigError(f"unknown setting {key!r}{hint}")
        converted[key] = _convert(key, value, types[key])
    return converted


def _convert(key: str, value: Any, wanted: type) -> Any:
    if isinstance(value, str) and wanted is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool) != (wanted is bool) or not isinstance(value, _TAKEN[wanted]):
        raise ConfigError(f"{key} = {value!r:.100}: expected {wanted.__name__}")
    try:
        return wanted(value)
    except (OverflowError, ValueError) as error:
        raise ConfigError(f"{key} = {value!r}: expected {wanted.__name__}") from error


def describe_fields() -> list[tuple[str, str, str]]:
    """(name, type, default) of every setting, in order."""
    types = get_type_hints(ServerConfig)
    return [(f.name, types[f.name].__name__, repr(f.default)) for f in dataclasses.fields(ServerConfig)]
