"""Trained front ends from ONNX files: the official speech tokenizers and speaker encoder.

Any file with the same inputs works too. An ONNX file is a program: its path is given by the user to
`prepare`, and no run, data set or export can name one.

S samples, B batch, F mel bands, T mel frames, E speaker embedding.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from cosyexp.data.frontends.base import SAMPLE_RATE, FrontEnd, Wanted
from cosyexp.device import onnx_providers, select_device
from cosyexp.errors import UserError, reason
from cosyexp.models.layers.spectrogram import WhisperMel
from cosyexp.registry import register
from cosyexp.run.documents import open_regular

BANDS, FRAME_RATE = 128, 100  # mel bands, and frames per second, that the speech tokenizers take
PROBE = 4  # seconds of noise that a file is tried with


@cache
def session(path: str, threads: int) -> Any:
    """Opens an ONNX file, once per process; on CUDA where onnxruntime has it.

    Args:
        path: of the file.
        threads: threads of the runtime on a CPU.

    Raises:
        UserError: if the file cannot be opened as an ONNX model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    providers = onnx_providers(select_device("auto"))
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime raises its own exception types
        raise UserError(
            f"{path} cannot be opened as an ONNX model ({reason(error)}): "
            "give the path of another file"
        ) from None


def run(path: str, threads: int, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """Runs an ONNX model and returns its first output.

    Args:
        path: of the file.
        threads: threads of the runtime on a CPU.
        inputs: in the order of the model's inputs.

    Raises:
        ValueError: if the model fails.
    """
    opened = session(path, threads)
    try:
        output: np.ndarray = opened.run(
            None, dict(zip((node.name for node in opened.get_inputs()), inputs, strict=True))
        )[0]
    except Exception as error:  # onnxruntime raises its own exception types
        raise ValueError(f"{Path(path).name} fails on the audio ({reason(error)})") from None
    return output


def check_inputs(path: str, threads: int, wanted: Sequence[tuple[str, int]], hint: str) -> None:
    """Checks the inputs of an ONNX model.

    Args:
        path: of the file.
        threads: threads of the runtime on a CPU.
        wanted: type and number of dimensions of each input.
        hint: what the error tells the user to do.

    Raises:
        UserError: if the file does not exist, or the model has other inputs.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}: {hint}")
    nodes = session(path, threads).get_inputs()
    if [(node.type, len(node.shape)) for node in nodes] != list(wanted):
        actual = ", ".join(f"{node.name} {node.type} {node.shape}" for node in nodes)
        raise UserError(f"{path} takes {actual}: {hint}")


@dataclass(frozen=True, kw_only=True)
class OnnxFile(FrontEnd):
    """Base class of front ends that run an ONNX file; they are also their recipes in the config.

    Attributes:
        path: of the ONNX file.
        threads: threads of each process on a CPU.
        hint: what an error tells the user to do.
        inputs: type and number of dimensions of each input of the model.
    """

    path: str
    threads: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", os.path.expanduser(self.path))

    @cached_property
    def key(self) -> str:
        """Name of the class and hash of the file.

        Raises:
            UserError: if the file does not exist.
        """
        if not Path(self.path).is_file():
            raise UserError(f"there is no file {self.path}: {self.hint}")
        with open_regular(Path(self.path)) as file:
            return f"{type(self).__name__} {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"

    hint: ClassVar[str] = ""
    inputs: ClassVar[tuple[tuple[str, int], ...]] = ()

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        """Checks what the model gives for `PROBE` seconds of noise.

        Args:
            wanted: what the family requires.
            output: tokens or embedding.

        Raises:
            UserError: if the model does not fit the family.
            NotImplementedError: if a subclass does not override this method.
        """
        raise NotImplementedError

    def fit(self, waves: Iterable[np.ndarray], wanted: Wanted) -> "OnnxFile":
        """Tries the file with noise and returns itself; nothing is fitted.

        Raises:
            UserError: if the model has other inputs, fails, or does not fit the family.
        """
        check_inputs(self.path, self.threads, self.inputs, self.hint)
        noise = (
            np.random.default_rng(0).standard_normal(PROBE * SAMPLE_RATE).astype(np.float32) / 10
        )
        try:
            output = np.asarray(self.encode(noise))
        except ValueError as error:
            raise UserError(f"{self.path} cannot be used: {error}; {self.hint}") from None
        self.check(wanted, output)
        return self

    def load(self, path: Path, wanted: Wanted) -> "OnnxFile":
        """Tries the file as `fit` does; nothing is loaded, as nothing was fitted."""
        return self.fit([], wanted)


@register("front_end")
@dataclass(frozen=True, kw_only=True)
class OnnxTokenizer(OnnxFile):
    """The official speech tokenizers: speech_tokenizer_v1, v2 or v3.

    The model takes Whisper's log-mel (1, 128, T) and its length (1,), and gives token ids. If its
    first input has a dynamic batch dimension, several waveforms are encoded at a time. The official
    tokenizers take 30 seconds at most.
    """

    longest: ClassVar[float] = 30.0
    hint: ClassVar[str] = (
        "a speech tokenizer takes float log-mel (1, 128, T) and an int32 length; "
        "give one as speech_tokenizer.path="
    )
    inputs: ClassVar[tuple[tuple[str, int], ...]] = (("tensor(float)", 3), ("tensor(int32)", 1))

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        """Checks token rate and vocabulary.

        Raises:
            UserError: if they are not those of the family.
        """
        if abs(len(output) / PROBE - wanted.token_rate) > 1:
            raise UserError(
                f"{self.path} gives {len(output) / PROBE:g} tokens per second, but the family "
                f"needs {wanted.token_rate}: give another file as speech_tokenizer.path="
            )
        if output.max(initial=0) >= wanted.codes:
            raise UserError(
                f"{self.path} gives token {output.max()}, but the family has {wanted.codes} "
                "tokens: give another file as speech_tokenizer.path="
            )

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Returns the token ids of a waveform (S,) at 16 kHz, int32."""
        mel_FT = log_mel(wave)
        inputs = [mel_FT[None], np.array([mel_FT.shape[1]], np.int32)]
        return run(self.path, self.threads, inputs).reshape(-1).astype(np.int32)

    def encode_all(self, waves: Sequence[np.ndarray]) -> list[Sequence[float] | np.ndarray]:
        """Encodes several waveforms as one padded batch, if the model takes batches."""
        if session(self.path, self.threads).get_inputs()[0].shape[0] == 1:
            return super().encode_all(waves)
        mels = [log_mel(wave) for wave in waves]
        lengths = np.array([mel.shape[1] for mel in mels], np.int32)
        batch_BFT = np.zeros((len(mels), BANDS, lengths.max(initial=0)), np.float32)
        for row, mel in zip(batch_BFT, mels, strict=True):
            row[:, : mel.shape[1]] = mel
        output = run(self.path, self.threads, [batch_BFT, lengths])
        tokens = output.reshape(len(mels), -1).astype(np.int32)
        per_token = round(batch_BFT.shape[2] / max(tokens.shape[1], 1))
        return [row[: length // per_token] for row, length in zip(tokens, lengths, strict=True)]


@register("front_end")
@dataclass(frozen=True, kw_only=True)
class OnnxSpeaker(OnnxFile):
    """The official speaker encoder, campplus (Wang et al. 2023, "CAM++").

    The model takes Kaldi's filter banks (1, T, 80), less their mean over time, and gives (1, E).
    """

    hint: ClassVar[str] = (
        "a speaker encoder takes float filter banks (1, T, 80); give one as speaker_encoder.path="
    )
    inputs: ClassVar[tuple[tuple[str, int], ...]] = (("tensor(float)", 3),)

    def check(self, wanted: Wanted, output: np.ndarray) -> None:
        """Checks the size of the embedding.

        Raises:
            UserError: if it is not that of the family.
        """
        if len(output) != wanted.speaker_dim:
            raise UserError(
                f"{self.path} gives speaker embeddings of {len(output)} numbers, but the family "
                f"needs {wanted.speaker_dim}: give another file as speaker_encoder.path="
            )

    def encode(self, wave: np.ndarray) -> np.ndarray:
        """Returns the speaker embedding (E,) of a waveform (S,) at 16 kHz, float32."""
        bank_TF = filter_bank(wave)
        output = run(self.path, self.threads, [(bank_TF - bank_TF.mean(0))[None]])
        return output.reshape(-1).astype(np.float32)


@cache
def whisper_mel() -> WhisperMel:
    """Returns the module of Whisper's mel spectrogram, built once per process."""
    return WhisperMel(BANDS)


def log_mel(wave: np.ndarray) -> np.ndarray:
    """Returns Whisper's log-mel spectrogram (F, T) of a waveform.

    Args:
        wave: (S,) at 16 kHz.

    Raises:
        ValueError: if the waveform is too short for a speech token.
    """
    if len(wave) < SAMPLE_RATE // 25:
        raise ValueError(
            f"the audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speech token"
        )
    mel_FT: np.ndarray = whisper_mel()(torch.from_numpy(wave)).numpy()
    return mel_FT


def filter_bank(wave: np.ndarray) -> np.ndarray:
    """Returns Kaldi's log-mel filter banks (T, 80) of a waveform, without dither.

    Args:
        wave: (S,) at 16 kHz, in [-1, 1].

    Raises:
        ValueError: if the waveform is too short for one frame.
    """
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
            f"the audio of {len(wave) / SAMPLE_RATE:.3f} s is too short for a speaker embedding"
        )
    return np.stack([bank.get_frame(i) for i in range(bank.num_frames_ready)])
