"""What must be the same for a continued run to be the same run. Knows no torch."""

from __future__ import annotations

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
    "parallel.",
    "tracking.",
)
"""Settings (a dot at the end: whole sections) that may differ between a run and its continuation. Other numbers of
threads or ranks, or another way to share the work among them, change results in rounding alone."""


@dataclass(frozen=True)
class RunIdentity:
    settings: dict[str, str]
    """Every setting that changes results, as JSON by its dotted name."""
    data_sha256: str
    backbone_fingerprint: str

    @classmethod
    def of(cls, config: RunConfig, data: DataFacts, backbone: BackboneFacts) -> RunIdentity:
        settings = flat_settings(config)
        return cls(
            settings={name: value for name, value in settings.items() if not _changes_nothing(name)},
            data_sha256=data.sha256,
            backbone_fingerprint=backbone.fingerprint,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check_continues(self, saved: RunIdentity, origin: object) -> None:
        """Raises ResumeRefused, with everything that changed since `saved` was written to `origin`."""
        names = sorted({*self.settings, *saved.settings})
        changes = [
            f"{name} was {saved.settings.get(name, 'not set')}, is {self.settings.get(name, 'not set')}"
            for name in names
            if self.settings.get(name) != saved.settings.get(name)
        ]
        if self.data_sha256 != saved.data_sha256:
            changes.append("the contents of the data are others")
        if self.backbone_fingerprint != saved.backbone_fingerprint:
            changes.append("the backbone's weights are others")
        if changes:
            raise ResumeRefused(
                f"{origin} belongs to another run: {'; '.join(changes)}. Set back what changed, or choose another "
                "output, or delete the checkpoints to start anew"
            )


def _changes_nothing(name: str) -> bool:
    return any(name == known or (known.endswith(".") and name.startswith(known)) for known in CHANGES_NOTHING)
