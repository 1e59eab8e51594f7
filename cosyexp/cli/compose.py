"""The config of another app, composed from overrides."""

from collections.abc import Sequence
from typing import Any

from cosyexp.cli.hydra_app import CONFIG_DIR, register
from cosyexp.config import TrainConfig, parse


def compose(app: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Returns the resolved config that an app has with these overrides.

    It may be called from within another app: Hydra's global state is kept.

    Args:
        app: name of a primary config, such as "train" or "export/config".
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    register()
    folder, _, name = app.rpartition("/")
    running, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        path = str((CONFIG_DIR / folder).resolve())
        with hydra.initialize_config_dir(version_base="1.3", config_dir=path):
            composed = hydra.compose(name, overrides=list(overrides))
            config = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    finally:
        GlobalHydra.instance().hydra = running
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def compose_train(overrides: Sequence[str]) -> TrainConfig:
    """Returns the typed config that `cosyexp.train` has with these overrides."""
    return parse(TrainConfig, compose("train", overrides))
