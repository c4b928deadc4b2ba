"""Everything worth keeping of one run, and its form as polyhead_metrics.json. Computes nothing, needs no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead_trainer.config import EvaluateSection, RunConfig
from polyhead_trainer.data import EncodedData, ExampleStream, hash_sources

if TYPE_CHECKING:
    from torch import nn

    from polyhead_core.backbone import Backbone
    from polyhead_trainer.evaluate import Measures
    from polyhead_trainer.loop import StepReport
    from polyhead_trainer.profiling import OperatorTime

METRICS_FILE = "polyhead_metrics.json"
SCHEMA = 1
"""Raise when a field of the metrics file changes its meaning."""
PACKAGES = ("polyhead", "torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, kw_only=True)
class BackboneFacts:
    source: str
    fingerprint: str
    quantization: str
    dtype: str
    num_parameters: int
    num_bytes: int

    @classmethod
    def of(cls, backbone: Backbone) -> BackboneFacts:
        return cls(
            source=backbone.source,
            fingerprint=backbone.fingerprint,
            quantization=backbone.quantization,
            dtype=backbone.dtype_name,
            num_parameters=backbone.num_parameters,
            num_bytes=backbone.num_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    sha256: str
    """Over the contents of all training and held-out data; of data sets of the hub, over their fingerprints."""
    num_train: int
    """With data.streaming: records, those that are too long included."""
    num_held_out: int
    num_too_long: int
    """Examples left out, of both; with data.streaming of those that training met in its first epoch."""
    num_train_tokens: int | None
    """Unknown with data.streaming."""
    evaluation_sha256: str = ""
    """Over the contents of evaluate.earlier and evaluate.general_text."""

    @classmethod
    def of(cls, config: RunConfig, train: EncodedData | ExampleStream, held_out: EncodedData) -> DataFacts:
        held = train if isinstance(train, EncodedData) else None
        return cls(
            sha256=hash_sources([*config.data.train, *config.data.held_out]),
            num_train=len(train) if isinstance(train, ExampleStream) else len(train.examples),
            num_held_out=len(held_out.examples),
            num_too_long=held_out.num_too_long + (held.num_too_long if held is not None else 0),
            num_train_tokens=held.num_tokens if held is not None else None,
            evaluation_sha256=_hash_evaluation(config.evaluate),
        )

    def after(self, stream: ExampleStream | None) -> DataFacts:
        """What is known after the last step."""
        met = stream.position.num_too_long if stream is not None else 0
        return dataclasses.replace(self, num_too_long=self.num_too_long + met)


def _hash_evaluation(settings: EvaluateSection) -> str:
    digest = hashlib.sha256(hash_sources(settings.earlier).encode())
    if settings.general_text is not None:
        digest.update(settings.general_text.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class TrainableFacts:
    num_trainable: int
    trainable_bytes: int
    num_total: int
    """Backbone and adapter together."""

    @property
    def percentage(self) -> float:
        return 100 * self.num_trainable / self.num_total

    @classmethod
    def of(cls, model: nn.Module, backbone: BackboneFacts, num_untouched: int) -> TrainableFacts:
        """`num_untouched`: parameters in the backbone's tree before the method changed it."""
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        num_trainable = sum(parameter.numel() for parameter in trainable)
        num_added = count_parameters(model) - num_untouched
        return cls(
            num_trainable=num_trainable,
            trainable_bytes=sum(parameter.nbytes for parameter in trainable),
            num_total=backbone.num_parameters + num_added,
        )


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_shared(model: nn.Module, other: nn.Module) -> int:
    """Parameters of `model` that are `other`'s as well."""
    shared = {id(parameter) for parameter in other.parameters()}
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) in shared)


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    config: RunConfig
    backbone: BackboneFacts
    data: DataFacts
    trainable: TrainableFacts
    before: Measures
    after: Measures
    curve: list[StepReport]
    held_out_curve: list[tuple[int, float]]
    """(step, held-out loss) of the measurements while training."""
    questions: list[str]
    """What `before.answers` and `after.answers` answer."""
    references: list[str]
    train_seconds: float
    total_seconds: float
    peak_memory_bytes: int
    """Of the process (with a GPU: of its memory), evaluation included; with several ranks, of the main one."""
    num_ranks: int = 1
    rank_bytes: dict[str, dict[str, int]] | None = None
    """With several ranks: `held` by the main rank in its first step, and what a `replica` of DDP holds."""
    energy_joules: dict[str, float] = dataclasses.field(default_factory=dict)
    """While training, by counter: of the whole device, whatever else it did; with `trained_with` its part by tokens.
    Empty: none could be read."""
    mfu: float | None = None
    """Model FLOPs utilisation of the training steps, as `utilization` counts it: a share of `peak_flops_per_s`."""
    peak_flops_per_s: float | None = None
    peak_flops_source: str = ""
    operators: list[OperatorTime] = dataclasses.field(default_factory=list)
    """Of the profiled steps; empty: none were."""
    trained_with: list[str] = dataclasses.field(default_factory=list)
    """Adapters that shared its forward and backward passes; its seconds of training are its part by tokens."""

    def to_json(self) -> str:
        record: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        record["config"] = self.config.model_dump(mode="json")
        for name in ("backbone", "data", "trainable", "before", "after"):
            record[name] = dataclasses.asdict(record[name])
        for name in ("curve", "operators"):
            record[name] = [dataclasses.asdict(one) for one in record[name]]
        record = {"schema": SCHEMA, "versions": package_versions(), **record}
        return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def package_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def read_record(directory: Path) -> dict[str, Any] | None:
    """The metrics of a finished run, None where there is none."""
    try:
        record = json.loads((directory / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("schema") == SCHEMA else None
