"""Adds the configs of cosyexp, and of packages that extend it, to Hydra's search path."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from cosyexp.cli.hydra_app import CONFIG_DIR
from cosyexp.registry import plugin_config_dirs


class CosyexpSearchPath(SearchPathPlugin):
    """Lets every app of cosyexp see all groups of conf/, and those of installed plugin packages.

    The export app, whose primary config is in conf/export, sees conf/export of each package too.
    Other Hydra apps of the same environment keep their search path.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Appends the folders if the primary config is one of cosyexp's."""
        primary = next((e.path for e in search_path.get_path() if e.provider == "main"), None)
        folders = [CONFIG_DIR.resolve(), (CONFIG_DIR / "export").resolve()]
        if primary is None or primary.removeprefix("file://") not in map(str, folders):
            return
        search_path.append("cosyexp", f"file://{CONFIG_DIR.resolve()}")
        inside = primary.removeprefix("file://").removeprefix(str(CONFIG_DIR.resolve())).strip("/")
        for folder in plugin_config_dirs():
            for path in dict.fromkeys([folder / inside, folder]):
                if path.is_dir():
                    search_path.append("cosyexp.plugins", f"file://{path.resolve()}")
