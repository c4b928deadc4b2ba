"""What must be the same for a continued run to be the same run. Knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polyhead_trainer.config import RunConfig, flat_settings
from polyhead_trainer.errors import ResumeRefused
from polyhead_trainer.record import BackboneFacts, DataFacts

CHANGES_NOTHING = (
    "output",
    "title",
    "backbone.cache_dir",
    "data.name",
    "data.source",
    "data.license",
    "training.num_threads",
    "evaluate.show",
    "checkpoint.",
    "parallel.strategy",
    "parallel.wrap",
    "parallel.cpu_offload",
    "parallel.timeout_s",
    "tracking.",
    "profile.",
)
"""Settings (a dot at the end: whole sections) that may differ between a run and its continuation. Other numbers of
threads or ranks, or another way to share the work among them, change results in rounding alone."""

CHANGES_ROUNDING = (
    "training.micro_batch_size",
    "training.activation_checkpointing",
    "training.activation_checkpointing_every",
    "training.logit_chunk",
    "training.compile",
    "evaluate.batch_size",
)
"""Settings that may differ too, and are told of: what saves memory must not cost the run that ran out of it."""


MAKES_THE_MODEL = ("task", "adapter.", "data.labels", "backbone.quantization")
"""Settings without which the trained tensors mean something else, as above."""


@dataclass(frozen=True)
class RunIdentity:
    settings: dict[str, str]
    """Every setting that changes results, as JSON by its dotted name."""
    rounding: dict[str, str]
    """The same of those in CHANGES_ROUNDING."""
    data_sha256: str
    evaluation_sha256: str
    backbone_fingerprint: str

    @classmethod
    def of(cls, config: RunConfig, data: DataFacts, backbone: BackboneFacts) -> RunIdentity:
        settings = flat_settings(config)
        return cls(
            settings={name: value for name, value in settings.items() if not may_differ(name)},
            rounding={name: settings[name] for name in CHANGES_ROUNDING},
            data_sha256=data.sha256,
            evaluation_sha256=data.evaluation_sha256,
            backbone_fingerprint=backbone.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_continues(self, saved: RunIdentity, origin: object) -> list[str]:
        """What to tell of settings that changed rounding alone since `saved` was written to `origin`.

        Raises ResumeRefused, with everything that makes it another run.
        """
        changes = _changes(saved.settings, self.settings)
        if self.data_sha256 != saved.data_sha256:
            changes.append("the contents of the data are others")
        if self.evaluation_sha256 != saved.evaluation_sha256:
            changes.append("the contents of evaluate.earlier or evaluate.general_text are others")
        if self.backbone_fingerprint != saved.backbone_fingerprint:
            changes.append("the backbone's weights are others")
        if changes:
            raise ResumeRefused(
                f"{origin} belongs to another run: {'; '.join(changes)}. Set back what changed, or choose another "
                "output, or delete the checkpoints to start anew"
            )
        return _remarks(_changes(saved.rounding, self.rounding))

    def check_makes(self, config: RunConfig, origin: object) -> None:
        """Raises ResumeRefused where `config` makes another model than the one whose tensors are in `origin`."""
        now, saved = (
            {name: value for name, value in settings.items() if _is_among(name, MAKES_THE_MODEL)}
            for settings in (flat_settings(config), self.settings)
        )
        if changes := _changes(saved, now):
            raise ResumeRefused(f"{origin} holds another model: {'; '.join(changes)}. Set back what changed")


def may_differ(name: str) -> bool:
    """Whether a run can be continued with another value of the setting."""
    return _is_among(name, (*CHANGES_NOTHING, *CHANGES_ROUNDING))


def _is_among(name: str, known: Sequence[str]) -> bool:
    return any(name == one or (one.endswith(".") and name.startswith(one)) for one in known)


def _changes(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    return [
        f"{name} was {saved.get(name, 'not set')}, is {now.get(name, 'not set')}"
        for name in sorted({*now, *saved})
        if now.get(name) != saved.get(name)
    ]


def _remarks(changes: Sequence[str]) -> list[str]:
    if not changes:
        return []
    return [
        f"{'; '.join(changes)}: from here on results equal those of an undisturbed run up to rounding, not bit for bit "
        "(dropout and NEFTune draw other random numbers)"
    ]
