"""Scores an answer by what a listener understands of it. N speech tokens, E speaker embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cosyexp.data.draws import keyed
from cosyexp.evaluation.asr import WhisperASR
from cosyexp.evaluation.metrics import error_rate
from cosyexp.run.directory import RunDirectory
from cosyexp.synthesis.backends import from_run
from cosyexp.synthesis.pipeline import Pipeline


class ErrorRate:
    """Word errors of a recogniser on an answer that a flow and a vocoder make audible, as a share of the words of the text.

    llm, flow, hifigan: runs. asr: the folder of a Whisper model, or None. Draws follow from seed and utterance.
    """

    def __init__(
        self, llm: str, flow: str, hifigan: str, *, asr: str | None, language: str | None, seed: int
    ) -> None:
        self.seed, self.judge = seed, WhisperASR(Path(asr) if asr else None, language)
        runs = {"llm": llm, "flow": flow, "hifigan": hifigan}
        self.voice = Pipeline(
            {name: from_run(RunDirectory(path), "best") for name, path in runs.items()}
        )

    @torch.inference_mode()
    def __call__(self, row: Mapping[str, Any], answer: Sequence[int]) -> float:
        draw = torch.Generator().manual_seed(
            int(keyed(self.seed, row["utt"], "voice").integers(2**63))
        )
        speaker_BE = torch.tensor(
            [row.get("spk_embedding") or row["utt_embedding"]], dtype=torch.float32
        )
        mel_BFT = self.voice.mel(torch.tensor([answer]), speaker_BE, draw)
        return error_rate(
            row["text"], self.judge(self.voice.wave(mel_BFT, draw), self.voice.sample_rate)
        )
