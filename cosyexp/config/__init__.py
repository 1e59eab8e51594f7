"""The typed config of every app: names, types, defaults and ranges of all keys.

Hydra composes a config from `conf/` and checks it against these dataclasses; `parse` converts it to
the dataclass and checks its ranges. A node with a `_target_` (a network, an optimizer, ...) stays a
plain dict, as its class declares its arguments, see `cosyexp.registry`.

To add a key, add a field in `groups.py` or `apps.py`; `setting` gives it a range. This package does
not import torch.
"""

from cosyexp.config.apps import (
    MODELS,
    AverageConfig,
    CompareConfig,
    EvaluateConfig,
    ExportConfig,
    ExportedConfig,
    ExportPrecision,
    MetricMode,
    PreferConfig,
    PrepareConfig,
    PullConfig,
    PushConfig,
    Select,
    SynthesizeConfig,
    TrainConfig,
)
from cosyexp.config.fields import literal, parse, setting, to_dict
from cosyexp.config.groups import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    FamilyConfig,
    MelConfig,
    ModeConfig,
    ModelConfig,
    OnError,
    OnNonfinite,
    Precision,
    TrainerConfig,
    engine_config,
)

__all__ = [
    "MODELS",
    "AverageConfig",
    "CheckpointConfig",
    "CompareConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportPrecision",
    "ExportedConfig",
    "FamilyConfig",
    "MelConfig",
    "MetricMode",
    "ModeConfig",
    "ModelConfig",
    "OnError",
    "OnNonfinite",
    "Precision",
    "PreferConfig",
    "PrepareConfig",
    "PullConfig",
    "PushConfig",
    "Select",
    "SynthesizeConfig",
    "TrainConfig",
    "TrainerConfig",
    "engine_config",
    "literal",
    "parse",
    "setting",
    "to_dict",
]
