"""What one training run is: a TOML file, checked field by field. Knows no torch."""

from polyhead_trainer.config.adapter import (
    AdapterSection,
    AdapterSettings,
    BottleneckSettings,
    FullSettings,
    HeadSettings,
    Ia3Settings,
    LlamaAdapterSettings,
    LnTuningSettings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    PTuningSettings,
)
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
    "AdapterSection",
    "AdapterSettings",
    "BackboneSection",
    "BottleneckSettings",
    "CheckpointSection",
    "DataSection",
    "EvaluateSection",
    "FullSettings",
    "HeadSettings",
    "Ia3Settings",
    "LlamaAdapterSettings",
    "LnTuningSettings",
    "LoraSettings",
    "PTuningSettings",
    "ParallelSection",
    "PreferenceSection",
    "PrefixSettings",
    "PromptSettings",
    "RunConfig",
    "TrainingSection",
    "known_settings",
    "load_config",
    "parse_config",
]
