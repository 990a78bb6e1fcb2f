"""What a run is told: YAML files and dotted overrides on documented dataclasses.  Imports neither torch nor megatron.

    config = load_config("configs/dft.yaml", ["train.steps=20"], world_size=1)
    config.train.steps, config.loss_name, config.transformer["num_layers"]
"""

from megatron_plugin.config.errors import ConfigError, DataPathError, as_config_error
from megatron_plugin.config.load import load_config, save_config, to_yaml
from megatron_plugin.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    GPTArguments,
    MuConfig,
    ParallelConfig,
    RampConfig,
    TrainConfig,
)

__all__ = ["CheckpointConfig", "Config", "ConfigError", "DataConfig", "DataPathError", "GPTArguments", "MuConfig", "ParallelConfig",
           "RampConfig", "TrainConfig", "as_config_error", "load_config", "save_config", "to_yaml"]  # fmt: skip
