"""The judge mos: the mean opinion score that listeners would give, as DistillMOS predicts it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from types import ModuleType
from typing import Any

import numpy as np
import soxr
import torch

from cosyexp.device import inference_device
from cosyexp.errors import MissingPackageError
from cosyexp.evaluation.judges.base import Speech, Verdict
from cosyexp.evaluation.scores import Score
from cosyexp.registry import register

RATE = 16000  # Hz


@register("judge")
class DistillMOS:
    """Predicts the mean opinion score, from 1 to 5 (Stahl & Gamper 2025, "DistillMOS").

    Args:
        device: where it runs, see `select_device`.
    """

    metrics = {"mos": "max"}

    def __init__(self, *, device: str = "auto") -> None:
        self.choice = device

    def load(self) -> None:
        """Loads the model.

        Raises:
            MissingPackageError: DistillMOS is not installed.
        """
        if not (find_spec("distillmos") and find_spec("xls_r_sqa")):
            raise MissingPackageError(
                "distillmos is not installed: pip install --no-deps distillmos xls-r-sqa"
            )
        with without_torchaudio(), redirect_stdout(StringIO()):
            self.model: Any = import_module("distillmos").ConvTransformerSQAModel()
        self.device = inference_device(self.choice)
        self.model.eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, speech: Speech) -> Verdict:
        """Returns the predicted score."""
        wave = soxr.resample(speech.wave_S, speech.sample_rate, RATE).astype(np.float32)
        score = self.model(torch.from_numpy(wave)[None].to(self.device))
        return Verdict({"mos": Score(float(score))})


@contextmanager
def without_torchaudio() -> Iterator[None]:
    """Lets DistillMOS be imported where there is no torchaudio, which it only reads files with."""
    missing = "torchaudio" not in sys.modules and find_spec("torchaudio") is None
    if missing:
        sys.modules["torchaudio"] = ModuleType("torchaudio")
    try:
        yield
    finally:
        if missing:
            del sys.modules["torchaudio"]
