"""Hydra plugins of cosyexp: search path, launchers, sweeper. Hydra finds them by this folder."""
