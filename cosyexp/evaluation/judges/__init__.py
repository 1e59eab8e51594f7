"""Judges: models that rate speech."""
