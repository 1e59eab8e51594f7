"""The command line that all apps share. No torch here: `--help` and a wrong word answer at once."""

from cosyexp.cli.door import door

__all__ = ["door"]
