"""Scores an answer by the word error rate of a speech recognizer. E speaker embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.arguments import Count
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
    """Synthesizes an answer, and returns the word error rate of its transcript.

    Args:
        llm: run of the llm that generated the answers.
        flow: run of the flow that synthesizes them.
        hifigan: run of the vocoder that synthesizes them.
        asr: folder of a Whisper model; None: whisper-base, which the extra `eval` installs.
        language: such as "en"; None: detected.
        seed: of the random draws of flow and vocoder, which also depend on the utterance.
        device: where all of them run, see `inference_device`.

    Raises:
        UserError: a run is missing, or the recognizer is not installed.
    """

    def __init__(
        self,
        *,
        llm: str,
        flow: str | None,
        hifigan: str | None,
        asr: str | None = None,
        language: str | None = None,
        seed: Count = 0,
        device: str = "auto",
    ) -> None:
        if not (flow and hifigan):
            raise UserError(
                "score=wer synthesizes the candidates: give flow=<run> and hifigan=<run>"
            )
        self.seed, self.asr = seed, WhisperASR(Path(asr) if asr else None, language, device)
        runs = {"llm": llm, "flow": flow, "hifigan": hifigan}
        models = {name: from_run(RunDirectory(path), "best", device) for name, path in runs.items()}
        self.pipeline = Pipeline(models)

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        """Returns the number of word errors as a share of the words of the text."""
        seed = int(keyed(self.seed, row["utt"], "voice").integers(2**63))
        draw = torch.Generator().manual_seed(seed)
        embedding = row.get("spk_embedding") or row["utt_embedding"]
        speaker_BE = torch.tensor([embedding], dtype=torch.float32)
        mel_BFT = self.pipeline.mel(torch.tensor([answer]), speaker_BE, draw)
        wave = self.pipeline.wave(mel_BFT, draw)
        return word_error_rate(row["text"], self.asr(wave, self.pipeline.sample_rate))
