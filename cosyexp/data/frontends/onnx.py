"""Trained front ends from ONNX files: the official speech tokenizers and speaker encoder, or any of their signature.

B batch, F mel bands, T mel frames, E embedding.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.errors import UserError
from cosyexp.models.layers.spectrogram import WhisperMel

BANDS, FRAME_RATE = 128, 100  # of what the tokenizers hear
PROBE = 4  # seconds of noise that a file is tried with


@cache
def session(path: str, threads: int) -> Any:
    """An open file, once a process; on CUDA where onnxruntime has it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    available = onnxruntime.get_available_providers()
    providers = [
        name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available
    ]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # the runtime has its own
        raise UserError(
            f"{path} cannot be opened as an ONNX model ({str(error).splitlines()[0]}): give its path"
        ) from None


def run(path: str, threads: int, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The first output of a model, its inputs by position; ValueError where it fails."""
    opened = session(path, threads)
    try:
        output: np.ndarray = opened.run(
            None, dict(zip((node.name for node in opened.get_inputs()), inputs, strict=True))
        )[0]
    except Exception as error:  # the runtime has its own
        raise ValueError(f"{Path(path).name} fails on it ({str(error).splitlines()[0]})") from None
    return output


def check_inputs(path: str, threads: int, wanted: Sequence[tuple[str, int]], told: str) -> None:
    """UserError where a model takes other inputs than `wanted`, a type and a number of dimensions each."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: {told}")
    nodes = session(path, threads).get_inputs()
    if [(node.type, len(node.shape)) for node in nodes] != list(wanted):
        found = ", ".join(f"{node.name} {node.type} {node.shape}" for node in nodes)
        raise UserError(f"{path} takes {found}: {told}")


@dataclass(frozen=True, kw_only=True)
class OnnxFile(FrontEnd):
    """path: of the ONNX file. threads: of each process, on a CPU."""

    path: str
    threads: int = 1

    @cached_property
    def key(self) -> str:
        if not Path(self.path).is_file():
            raise UserError(f"there is no file {self.path}: {self.told}")
        with open(self.path, "rb") as file:
            return f"{type(self).__name__} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    told: ClassVar[str] = ""
    inputs: ClassVar[tuple[tuple[str, int], ...]] = ()

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        raise NotImplementedError

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> "OnnxFile":
        """Fits nothing: tries the file with noise. UserError where it is another kind of model, or not the family's."""
        check_inputs(self.path, self.threads, self.inputs, self.told)
        noise = (
            np.random.default_rng(0).standard_normal(PROBE * SAMPLE_RATE).astype(np.float32) / 10
        )
        try:
            output = np.asarray(self.encode(noise))
        except ValueError as error:
            raise UserError(f"{self.path} cannot be used: {error}; {self.told}") from None
        self.check(wanted, output)
        return self

    def load(self, path: Path, wanted: Wanted) -> "OnnxFile":
        return self.fit([], wanted)


@dataclass(frozen=True, kw_only=True)
class OnnxTokenizer(OnnxFile):
    """speech_tokenizer_v1, v2 or v3: Whisper's log-mel (1, 128, T) and its length (1,) to token ids.

    A file whose first input has a free batch dimension takes several waves at once. The tokenizers know 30 s at most.
    """

    longest: ClassVar[float] = 30.0
    told: ClassVar[str] = (
        "a speech tokenizer takes float log-mel (1, 128, T) and an int32 length; give one as speech_tokenizer.path="
    )
    inputs: ClassVar[tuple[tuple[str, int], ...]] = (("tensor(float)", 3), ("tensor(int32)", 1))

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        if abs(len(output) / PROBE - wanted.token_rate) > 1:
            raise UserError(
                f"{self.path} gives {len(output) / PROBE:g} tokens a second, the family wants {wanted.token_rate}: give another"
            )
        if output.max(initial=0) >= wanted.codes:
            raise UserError(
                f"{self.path} gives token {output.max()}, the family knows {wanted.codes}: give another"
            )

    def encode(self, wave: np.ndarray) -> np.ndarray:
        mel_FT = log_mel(wave)
        return (
            run(self.path, self.threads, [mel_FT[None], np.array([mel_FT.shape[1]], np.int32)])
            .reshape(-1)
            .astype(np.int32)
        )

    def encode_all(self, waves: Sequence[np.ndarray]) -> list[Sequence[float] | np.ndarray]:
        if session(self.path, self.threads).get_inputs()[0].shape[0] == 1:
            return super().encode_all(waves)
        mels = [log_mel(wave) for wave in waves]
        lengths = np.array([mel.shape[1] for mel in mels], np.int32)
        batch_BFT = np.zeros((len(mels), BANDS, lengths.max(initial=0)), np.float32)
        for row, mel in zip(batch_BFT, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        tokens = (
            run(self.path, self.threads, [batch_BFT, lengths])
            .reshape(len(mels), -1)
            .astype(np.int32)
        )
        per_token = round(batch_BFT.shape[2] / max(tokens.shape[1], 1))
        return [row[: length // per_token] for row, length in zip(tokens, lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class OnnxSpeaker(OnnxFile):
    """campplus: Kaldi's filter banks (1, T, 80), less their mean over time, to an embedding (1, E)."""

    told: ClassVar[str] = (
        "a speaker encoder takes float filter banks (1, T, 80); give one as speaker_encoder.path="
    )
    inputs: ClassVar[tuple[tuple[str, int], ...]] = (("tensor(float)", 3),)

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        if len(output) != wanted.speaker_dim:
            raise UserError(
                f"{self.path} gives {len(output)} numbers for a speaker, the family wants {wanted.speaker_dim}: give another"
            )

    def encode(self, wave: np.ndarray) -> np.ndarray:
        bank_TF = filter_bank(wave)
        return (
            run(self.path, self.threads, [(bank_TF - bank_TF.mean(0))[None]])
            .reshape(-1)
            .astype(np.float32)
        )


@cache
def whisper_mel() -> WhisperMel:
    return WhisperMel(BANDS)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """(F, T) as Whisper hears a wave (S,) at 16 kHz; ValueError where it is too short."""
    if len(wave) < SAMPLE_RATE // 25:
        raise ValueError(
            f"its audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speech token"
        )
    mel_FT: np.ndarray = whisper_mel()(torch.from_numpy(wave)).numpy()
    return mel_FT


def filter_bank(wave: np.ndarray) -> np.ndarray:
    """(T, 80) Kaldi's log-mel filter banks of a wave (S,) at 16 kHz in [-1, 1], without dither; ValueError where it is too short."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.frame_opts.samp_freq = SAMPLE_RATE
    options.mel_opts.num_bins = 80
    bank = kaldi_native_fbank.OnlineFbank(options)
    bank.accept_waveform(SAMPLE_RATE, wave.tolist())
    bank.input_finished()
    if not bank.num_frames_ready:
        raise ValueError(
            f"its audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speaker embedding"
        )
    return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
