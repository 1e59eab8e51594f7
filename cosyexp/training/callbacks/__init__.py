"""Callbacks: code that runs at the events of the training loop."""
