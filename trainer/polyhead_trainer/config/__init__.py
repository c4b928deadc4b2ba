"""What one training run is: a TOML file, checked field by field. Knows no torch."""

from polyhead_trainer.config.adapter import AdapterSettings, FullSettings, HeadSettings, LoraSettings
from polyhead_trainer.config.load import known_settings, load_config, parse_config
from polyhead_trainer.config.sections import (
    BackboneSection,
    CheckpointSection,
    DataSection,
    EvaluateSection,
    ParallelSection,
    PreferenceSection,
    RunConfig,
    TrainingSection,
)

__all__ = [
    "AdapterSettings",
    "BackboneSection",
    "CheckpointSection",
    "DataSection",
    "EvaluateSection",
    "FullSettings",
    "HeadSettings",
    "LoraSettings",
    "ParallelSection",
    "PreferenceSection",
    "RunConfig",
    "TrainingSection",
    "known_settings",
    "load_config",
    "parse_config",
]
