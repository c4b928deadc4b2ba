"""`trainer inspect`: what an adapter directory holds, told from its files alone; no backbone is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polyhead_core.adapter_directory import read_adapter_directory
from polyhead_trainer.record import METRICS_FILE, read_record

_LORA = re.compile(r"(?:^|\.)(?P<module>[^.]+)\.lora_(?:embedding_)?A(?:\.weight)?$")


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    name: str
    shape: list[int]
    dtype: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class MetricsFacts:
    before: dict[str, Any]
    after: dict[str, Any]
    num_steps: int
    train_seconds: float


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    name: str
    content_hash: str
    peft_type: str
    task_type: str | None
    base_model: str | None
    ranks: list[int]
    """That the tensors really have, which patterns may make differ; empty where the type has no rank."""
    alpha: float | None
    use_rslora: bool
    target_modules: list[str] | str
    """As adapter_config.json says."""
    adapted_modules: list[str]
    """Last parts of the paths that tensors are there for."""
    num_parameters: int
    tensor_bytes: int
    file_bytes: int
    """Of the two files that the content hash covers."""
    backbone_fingerprint: str | None
    quantization: str | None
    metrics: MetricsFacts | None
    """Of polyhead_metrics.json; None where there is no readable one."""
    tensors: list[TensorFacts]


def inspect_adapter(directory: Path) -> AdapterFacts:
    """Raises AdapterFormatError, AdapterTooLarge: pickles are not opened."""
    adapter = read_adapter_directory(directory.resolve())
    config, tensors = adapter.config, adapter.tensors
    targets = config.get("target_modules") or []
    return AdapterFacts(
        name=adapter.name,
        content_hash=adapter.content_hash,
        peft_type=str(config.get("peft_type")),
        task_type=config.get("task_type"),
        base_model=config.get("base_model_name_or_path"),
        ranks=sorted(_of_factors(tensors, lambda _, tensor: tensor.shape[0])),
        alpha=config.get("lora_alpha"),
        use_rslora=bool(config.get("use_rslora")),
        target_modules=targets if isinstance(targets, str) else sorted(map(str, targets)),
        adapted_modules=sorted(_of_factors(tensors, lambda module, _: module)),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        tensor_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        file_bytes=adapter.file_bytes,
        backbone_fingerprint=adapter.backbone_fingerprint,
        quantization=adapter.quantization,
        metrics=_metrics(directory),
        tensors=[
            TensorFacts(
                name=name,
                shape=list(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                num_bytes=tensor.nbytes,
            )
            for name, tensor in sorted(tensors.items())
        ],
    )


def _of_factors(tensors: dict[str, Tensor], fact: Callable[[str, Tensor], Any]) -> set[Any]:
    matches = ((_LORA.search(name), tensor) for name, tensor in tensors.items())
    return {fact(match["module"], tensor) for match, tensor in matches if match and tensor.dim() == 2}


def _metrics(directory: Path) -> MetricsFacts | None:
    record = read_record(directory)
    if record is None:
        return None
    before, after = ({k: v for k, v in record[moment].items() if k != "answers"} for moment in ("before", "after"))
    return MetricsFacts(
        before=before, after=after, num_steps=len(record["curve"]), train_seconds=record["train_seconds"]
    )


def describe(facts: AdapterFacts) -> Iterable[str]:
    """The facts as lines for people."""
    scaling = "alpha / sqrt(rank)" if facts.use_rslora else "alpha / rank"
    targets = facts.target_modules if isinstance(facts.target_modules, str) else ", ".join(facts.target_modules)
    rows = {
        "adapter": facts.name,
        "content hash": facts.content_hash,
        "type": f"{facts.peft_type}, {facts.task_type or 'no task named'}",
        "rank": ", ".join(map(str, facts.ranks)) or "none",
        "scale": f"{scaling}, alpha {facts.alpha}" if facts.ranks else "none",
        "targets": targets or "none named",
        "adapted": ", ".join(facts.adapted_modules) or "none",
        "parameters": f"{facts.num_parameters:,} in {len(facts.tensors)} tensors, {facts.tensor_bytes:,} bytes",
        "files": f"{facts.file_bytes:,} bytes",
        "made for": facts.base_model or "not named",
        "fingerprint": facts.backbone_fingerprint or "not recorded: a server cannot tell whether its backbone is right",
        "quantization": facts.quantization or "not recorded",
        "metrics": _metrics_line(facts.metrics),
    }
    yield from (f"{title:<13} {value}" for title, value in rows.items())
    yield from (f"{tensor.name}  {tensor.dtype} {tensor.shape}" for tensor in facts.tensors)


def _metrics_line(metrics: MetricsFacts | None) -> str:
    if metrics is None:
        return f"no readable {METRICS_FILE}"
    measured = ", ".join(
        f"{name} {metrics.before.get(name):.4g} -> {value:.4g}"
        for name, value in metrics.after.items()
        if value is not None and metrics.before.get(name) is not None
    )
    return f"{measured}; {metrics.num_steps} steps in {metrics.train_seconds:.0f} s"
