"""Scores an answer by what a speech recognizer understands of it. E speaker embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.data.draws import keyed
from cosyexp.errors import UserError
from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.metrics import word_error_rate
from cosyexp.registry import register
from cosyexp.run.directory import RunDirectory
from cosyexp.synthesis.backends import from_run
from cosyexp.synthesis.pipeline import Pipeline


@register("score")
class WordErrorRate:
    """Word error rate of an answer that a flow and a vocoder make audible.

    Args:
        llm, flow, hifigan: runs.
        asr: folder of a Whisper model; None: the small one of the extra `eval`.
        language: such as "en"; None: detected.
        seed: of what flow and vocoder draw, together with the utterance.

    Raises:
        UserError: a run is missing, or there is no recognizer.
    """

    def __init__(
        self,
        *,
        llm: str,
        flow: str | None,
        hifigan: str | None,
        asr: str | None = None,
        language: str | None = None,
        seed: int = 0,
    ) -> None:
        if not (flow and hifigan):
            raise UserError(
                "score=wer makes the candidates audible: give flow=<run> and hifigan=<run>"
            )
        self.seed, self.asr = seed, WhisperASR(Path(asr) if asr else None, language)
        runs = {"llm": llm, "flow": flow, "hifigan": hifigan}
        models = {name: from_run(RunDirectory(path), "best") for name, path in runs.items()}
        self.pipeline = Pipeline(models)

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        """Returns the word errors as a share of the words of the text."""
        seed = int(keyed(self.seed, row["utt"], "voice").integers(2**63))
        draw = torch.Generator().manual_seed(seed)
        embedding = row.get("spk_embedding") or row["utt_embedding"]
        speaker_BE = torch.tensor([embedding], dtype=torch.float32)
        mel_BFT = self.pipeline.mel(torch.tensor([answer]), speaker_BE, draw)
        wave = self.pipeline.wave(mel_BFT, draw)
        return word_error_rate(row["text"], self.asr(wave, self.pipeline.sample_rate))
