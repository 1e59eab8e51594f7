"""The config of another app, composed from words."""

from collections.abc import Sequence
from typing import Any

from cosyexp.cli.hydra_app import CONFIGS, register


def composed(app: str, words: Sequence[str]) -> dict[str, Any]:
    """The resolved config that an app has with these words; also within another app."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    register()
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIGS.resolve())):
            config = OmegaConf.to_container(
                compose(app, overrides=list(words)), resolve=True, enum_to_str=True
            )
    finally:
        GlobalHydra.instance().hydra = running
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]
