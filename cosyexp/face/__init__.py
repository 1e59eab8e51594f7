"""The command line that all apps share. No torch here: `--help` and a wrong word answer at once."""

from cosyexp.face.door import door

__all__ = ["door"]
