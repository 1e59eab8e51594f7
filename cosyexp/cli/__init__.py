"""The command line that all apps share. Nothing here imports torch, so `--help` answers at once."""
