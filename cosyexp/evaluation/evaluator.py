"""What models make of an utterance, each alone and together, and how good it is.

B batch, N speech tokens, E speaker embedding, F mel bands, T mel frames, S samples, V classes.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosyexp.config import MODELS
from cosyexp.data import features
from cosyexp.data.draws import keyed
from cosyexp.data.fields import Mel, SpeechTokens, spectrogram
from cosyexp.data.utterance import Utterance
from cosyexp.errors import UserError
from cosyexp.evaluation import signal
from cosyexp.evaluation.judges.base import Judge, Speech
from cosyexp.evaluation.scores import Score
from cosyexp.synthesis.backends import LoadedModel
from cosyexp.synthesis.pipeline import Pipeline, Voice

log = logging.getLogger(__name__)
ALL_LENGTHS = [0.0, 1e6]  # minimum and maximum number of speech tokens per text token


@dataclass(frozen=True)
class Truth:
    """What is known of an utterance.

    Attributes:
        utt: its id.
        text: what is said.
        speaker: name of the speaker.
        speaker_E: speaker embedding.
        tokens_N: speech tokens.
        wave_S: the recording, in [-1, 1].
        mel_FT: its log-mel spectrogram.
    """

    utt: str
    text: str
    speaker: str
    speaker_E: Tensor
    tokens_N: np.ndarray
    wave_S: np.ndarray
    mel_FT: np.ndarray


@dataclass
class Sample:
    """What a system makes of an utterance.

    Attributes:
        mel_FT: log-mel spectrogram; None if it makes none.
        wave_S: waveform, in [-1, 1]; None if it makes none.
        scores: by metric.
        notes: texts of the judges, by name.
        seconds: time that it took; None if that was not measured.
    """

    mel_FT: np.ndarray | None = None
    wave_S: np.ndarray | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None


class Evaluator:
    """Measures one, two or all three models of a family, by the systems that can be built of them.

    recordings       the recording itself, which only the judges rate
    llm              llm: the true speech tokens, each predicted from those before it
    vocoder          hifigan: the mel spectrogram of the recording to a waveform
    copy_synthesis   flow, and hifigan if given: the speech tokens of the recording to speech
    synthesis        all three: the text to speech

    Args:
        models: by name.
        judges: rate all that can be heard.
        seed: of the random draws, which also depend on the utterance and the system.
    """

    def __init__(
        self, models: Mapping[str, LoadedModel], judges: Sequence[Judge], seed: int
    ) -> None:
        self.pipeline = Pipeline(models)
        self.judges, self.seed = judges, seed
        family = self.pipeline.family
        self.rate, self.pitch = family.sample_rate, family.pitch
        self.mel = Mel(sample_rate=self.rate, **asdict(family.mel))
        self.tokens = SpeechTokens(family.speech_vocabulary)
        systems = {
            "recordings": (self.recording, ()),
            "llm": (self.llm, ("llm",)),
            "vocoder": (self.vocoder, ("hifigan",)),
            "copy_synthesis": (self.copy_synthesis, ("flow",)),
            "synthesis": (self.synthesis, MODELS),
        }
        self.systems = {
            name: system
            for name, (system, needed) in systems.items()
            if all(model in models for model in needed)
        }
        if llm := models.get("llm"):
            layout = llm.config.model.collator["layout"]
            self.end: int = family.speech_vocabulary + layout.get("eos", 0)

    @torch.inference_mode()
    def __call__(self, truth: Truth) -> dict[str, Sample]:
        """Returns what each system makes of an utterance, with its scores."""
        return {name: system(truth) for name, system in self.systems.items()}

    def truths(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Truth]:
        """Yields what is known of the rows of shards; one that cannot be used is logged."""
        for row in rows:
            try:
                yield self._truth(row)
            except ValueError as error:
                log.warning("%s is left out: %s", row["utt"], error)

    def _truth(self, row: Mapping[str, Any]) -> Truth:
        utterance = Utterance(row)
        column = "spk_embedding" if row.get("spk_embedding") else "utt_embedding"
        wave_S = utterance.wave(self.rate)
        return Truth(
            row["utt"],
            str(utterance["text"]),
            str(row.get("spk") or row["utt"]),
            torch.from_numpy(utterance.numbers(column).astype(np.float32)),
            self.tokens(utterance),
            wave_S,
            self.log_mel(wave_S),
        )

    # the systems ---------------------------------------------------------------------------------

    def recording(self, truth: Truth) -> Sample:
        """Returns the recording."""
        return self._judged(Sample(truth.mel_FT, truth.wave_S), truth, reference=False)

    def llm(self, truth: Truth) -> Sample:
        """Returns the accuracy and the perplexity of the true speech tokens and their end."""
        pipeline = copy(self.pipeline)
        pipeline.family = replace(pipeline.family, speech_per_text=ALL_LENGTHS)
        forced = pipeline.sample = TeacherForcing([*truth.tokens_N.tolist(), self.end])
        voice, draw = Voice(truth.speaker_E[None]), self._draw(truth, "llm")
        pipeline.tokens([truth.text], voice, [draw], pipeline.instruction(None))
        labels = len(forced.labels)
        perplexity = float(np.exp(-np.mean(forced.logp)))
        scores = {"accuracy": forced.hits / labels, "perplexity": perplexity}
        return Sample(scores={name: Score(value, labels) for name, value in scores.items()})

    def vocoder(self, truth: Truth) -> Sample:
        """Returns the waveform that the vocoder makes of the recording's mel spectrogram."""
        mel_BFT = torch.from_numpy(truth.mel_FT[None] - self.mel.mean) / self.mel.std
        began = time.perf_counter()
        wave_S = self.pipeline.wave(mel_BFT, self._draw(truth, "vocoder"))
        sample = self._made(truth, wave_S, began)
        size = min(len(wave_S), len(truth.wave_S))
        found_S, wanted_S = wave_S[:size], truth.wave_S[:size]
        convergence, magnitude = signal.stft_distances(found_S, wanted_S)
        found_T, wanted_T = (
            features.pitch(wave, self.rate, self.mel.hop, self.pitch)
            for wave in (found_S, wanted_S)
        )
        values = {
            **_mel_distances(self.log_mel(found_S), self.log_mel(wanted_S)),
            "stft_convergence": convergence,
            "stft_magnitude": magnitude,
            "f0_cents": signal.pitch_rmse(found_T, wanted_T),
            "voicing_error": signal.voicing_error(found_T, wanted_T),
        }
        sample.scores |= {name: Score(v) for name, v in values.items() if v is not None}
        return self._judged(sample, truth)

    def copy_synthesis(self, truth: Truth) -> Sample:
        """Returns the mel spectrogram, and the waveform, of the recording's speech tokens."""
        draw, began = self._draw(truth, "copy_synthesis"), time.perf_counter()
        tokens_BN = torch.from_numpy(truth.tokens_N).long()[None]
        mel_BFT = self.pipeline.mel(tokens_BN, truth.speaker_E[None], draw)
        mel_FT = mel_BFT[0].cpu().numpy() * self.mel.std + self.mel.mean
        if "vocoder" in self.systems:
            sample = self._made(truth, self.pipeline.wave(mel_BFT, draw), began)
        else:
            sample = Sample(seconds=time.perf_counter() - began)
        self._refuse_nonfinite(mel_FT, truth)
        sample.mel_FT = mel_FT
        frames = min(mel_FT.shape[1], truth.mel_FT.shape[1])
        values = _mel_distances(mel_FT[:, :frames], truth.mel_FT[:, :frames])
        sample.scores |= {name: Score(value) for name, value in values.items()}
        return self._judged(sample, truth)

    def synthesis(self, truth: Truth) -> Sample:
        """Returns the waveform of the text."""
        self.pipeline.speakers.setdefault(truth.speaker, truth.speaker_E)
        seed, began = self._draw(truth, "synthesis").initial_seed(), time.perf_counter()
        wave_S = self.pipeline.synthesize(truth.text, truth.speaker, seed)
        sample = self._made(truth, wave_S, began)
        sample.scores["duration_ratio"] = Score(len(wave_S) / len(truth.wave_S))
        return self._judged(sample, truth)

    def speed(self, truth: Truth, sample: Sample) -> Score | None:
        """Returns the seconds that a sample took per second of speech; None if not measured."""
        if sample.seconds is None:
            return None
        spoken = len(truth.wave_S if sample.wave_S is None else sample.wave_S) / self.rate
        return Score(sample.seconds / spoken, spoken)

    # details -------------------------------------------------------------------------------------

    def log_mel(self, wave_S: np.ndarray) -> np.ndarray:
        """Returns the log-mel spectrogram of a waveform, in the family's settings."""
        size = max(len(wave_S), self.mel.n_fft)
        padded_S = np.pad(wave_S, (0, size - len(wave_S) + -size % self.mel.align))
        mel_BFT = spectrogram(self.mel)(torch.from_numpy(padded_S)[None])
        return np.asarray(mel_BFT[0].numpy())

    def _draw(self, truth: Truth, system: str) -> torch.Generator:
        seed = int(keyed(self.seed, truth.utt, system).integers(2**63))
        return torch.Generator().manual_seed(seed)

    def _made(self, truth: Truth, wave_S: np.ndarray, began: float) -> Sample:
        seconds = time.perf_counter() - began
        self._refuse_nonfinite(wave_S, truth)
        return Sample(self.log_mel(wave_S), wave_S, seconds=seconds)

    def _judged(self, sample: Sample, truth: Truth, reference: bool = True) -> Sample:
        """Adds what the judges say of a sample that can be heard."""
        if sample.wave_S is not None:
            recording = truth.wave_S if reference else None
            speech = Speech(sample.wave_S, self.rate, truth.text, recording)
            for judge in self.judges:
                verdict = judge(speech)
                sample.scores |= verdict.scores
                sample.notes |= verdict.notes
        return sample

    def _refuse_nonfinite(self, values: np.ndarray, truth: Truth) -> None:
        if not np.isfinite(values).all():
            raise UserError(
                f"the speech of {truth.utt} has values that are not finite: its models diverged, "
                f"choose other weights"
            )


class TeacherForcing:
    """A sampler that chooses given tokens, and keeps how likely each was.

    Args:
        labels: the tokens, and the class that ends them.
    """

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels, self.logp, self.hits = labels, list[float](), 0

    def __call__(self, logp_V: Tensor, history: Sequence[int], draw: Any) -> int:
        """Returns the next token."""
        label = self.labels[len(history)]
        self.logp.append(float(logp_V[label]))
        self.hits += int(logp_V.argmax()) == label
        return label


def _mel_distances(found_FT: np.ndarray, wanted_FT: np.ndarray) -> dict[str, float]:
    return {
        "mel_l1": signal.mel_l1(found_FT, wanted_FT),
        "mcd": signal.mel_cepstral_distortion(found_FT, wanted_FT),
    }
