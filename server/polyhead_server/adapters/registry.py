"""Which adapter types are served, by PEFT's name for them, and the checks that all of them share."""

from __future__ import annotations

import logging
from pathlib import Path

from polyhead_core.adapter_directory import AdapterDirectory, read_adapter_directory
from polyhead_core.errors import AdapterFormatError, AdapterMismatch, AdapterRejected
from polyhead_server.adapters.base import AdapterType, BackboneView, HostAdapter
from polyhead_server.adapters.lora import LoraType

logger = logging.getLogger(__name__)

ADAPTER_TYPES: dict[str, AdapterType] = {adapter_type.peft_type: adapter_type for adapter_type in (LoraType(),)}


def read_adapter(directory: Path, backbone: BackboneView, *, max_rank: int, max_file_bytes: int) -> HostAdapter:
    """Reads and validates the adapter in `directory`. Raises AdapterRejected or one of its subclasses."""
    adapter = read_adapter_directory(directory, max_file_bytes=max_file_bytes)
    adapter_type = type_of(adapter)
    check_backbone(adapter, backbone)
    return adapter_type.read(adapter, backbone, max_rank=max_rank)


def type_of(adapter: AdapterDirectory) -> AdapterType:
    peft_type = adapter.config.get("peft_type")
    supported = ", ".join(sorted(ADAPTER_TYPES))
    if not isinstance(peft_type, str):
        raise AdapterFormatError(
            f"adapter {adapter.name!r}: adapter_config.json names no peft_type; expected one of {supported}",
            details={"adapter": adapter.name, "key": "peft_type"},
        )
    if peft_type not in ADAPTER_TYPES:
        raise AdapterRejected(
            f"adapter {adapter.name!r} is of type {peft_type!r}, which is not served yet; served are {supported}",
            details={"adapter": adapter.name, "peft_type": peft_type, "served": supported},
        )
    return ADAPTER_TYPES[peft_type]


def check_backbone(adapter: AdapterDirectory, backbone: BackboneView) -> None:
    """Refuses an adapter that says it was made on another backbone; one that does not say is judged by its shapes."""
    made_on = adapter.backbone_fingerprint
    if made_on is not None and made_on != backbone.fingerprint:
        raise AdapterMismatch(
            f"adapter {adapter.name!r} was made on another backbone: it records {made_on}, this server runs "
            f"{backbone.fingerprint}; serve it with the backbone that it was trained on, or train it again",
            details={"adapter": adapter.name, "given": made_on, "expected": backbone.fingerprint},
        )
    if adapter.quantization not in (None, backbone.quantization):
        logger.info(
            "adapter %r was trained with quantization %s and is served with %s",
            adapter.name,
            adapter.quantization,
            backbone.quantization,
        )
