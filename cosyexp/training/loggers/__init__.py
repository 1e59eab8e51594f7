"""Loggers: where a run sends its metrics, spectrograms and audio."""
