"""The keys of the config groups in `conf/family/`, `conf/data/`, ..., as dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from cosyexp.config.fields import Node, parse, setting
from cosyexp.errors import UserError


class Precision(Enum):
    """Precision of the forward and backward pass; bf16 and fp16 keep fp32 weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(Enum):
    """What happens at an update whose gradients are not finite."""

    stop = "stop"
    skip = "skip"


# What happens when a checkpoint cannot be written, as on a full disk.
OnError = Enum("OnError", {"stop": "stop", "continue": "continue"})


@dataclass
class MelConfig:
    """Settings of the log-mel spectrogram.

    Attributes:
        n_fft: size of the FFT, in samples.
        hop: samples per frame.
        win: size of the window, in samples.
        bins: number of mel bands.
        fmin: lowest frequency, in Hz.
        fmax: highest frequency, in Hz; null: half the sample rate.
        mean: subtracted from the spectrogram.
        std: divides the spectrogram.
        align: the waveform is padded to a multiple of so many samples, so that the frames cover
            whole speech tokens.
    """

    n_fft: int = setting(1024, ge=2)
    hop: int = setting(256, ge=1)
    win: int = setting(1024, ge=2)
    bins: int = setting(80, ge=1)
    fmin: float = setting(0.0, ge=0)
    fmax: float | None = setting(None, gt=0)
    mean: float = 0.0
    std: float = setting(1.0, gt=0)
    align: int = setting(1, ge=1)


@dataclass
class FamilyConfig:
    """Settings that llm, flow and vocoder of a family share.

    Attributes:
        sample_rate: of the audio, in Hz.
        pitch: method of the F0 estimation, harvest or dio.
        token_rate: speech tokens per second.
        frames_per_token: mel frames per speech token; null: the flow stretches the tokens of each
            utterance to the length of its mel.
        speech_vocabulary: number of different speech tokens.
        text_vocabulary: number of different text tokens.
        speaker_dim: size of a speaker embedding.
        speech_per_text: minimum and maximum number of speech tokens per text token in synthesis.
        instruct: instruction for texts that have none; null: the llm takes no instructions.
        sampler: draws speech tokens.
        guidance: strength of classifier-free guidance.
    """

    name: str = ""
    sample_rate: int = setting(16000, ge=1)
    mel: MelConfig = field(default_factory=MelConfig)
    pitch: str = "dio"
    token_rate: int = setting(50, ge=0)
    frames_per_token: int | None = setting(None, ge=1)
    speech_vocabulary: int = setting(512, ge=1)
    text_vocabulary: int = setting(34, ge=1)
    speaker_dim: int = setting(192, ge=1)
    speech_per_text: list[float] = setting(default_factory=lambda: [1.0, 8.0], gt=0)
    instruct: str | None = None
    sampler: Node = field(default_factory=dict)
    guidance: float = setting(0.0, ge=0)
    tokenizer: Node = field(default_factory=dict)


@dataclass
class ModelConfig:
    """Which of the three models is trained, and how its data become batches.

    Attributes:
        official: name of the model's file in the official releases.
        warmup: updates of the warm-up, if the schedule has one.
        max_frames: size of a padded micro-batch, in tokens (llm) or mel frames.
        collator: makes batches.
        discriminator: optimizer and scheduler of the discriminator of a GAN.
    """

    name: str = ""
    official: str = ""
    warmup: int = setting(0, ge=0)
    max_frames: int | None = setting(None, ge=1)
    collator: Node = field(default_factory=dict)
    discriminator: Node = field(default_factory=dict)


@dataclass
class ModeConfig:
    """The kind of training, sft or dpo.

    Attributes:
        suffix: of the default run directory.
    """

    name: str = ""
    suffix: str = ""


@dataclass
class DataConfig:
    """Training and validation data.

    Attributes:
        train: a data list or a parquet file, or several.
        valid: the same for validation; null: no validation.
        speakers: safetensors with an embedding of each speaker, copied into the run for synthesis.
        use_spk_embedding: read the mean embedding of the speaker, instead of the utterance's.
        max_frames: size of a padded micro-batch, see `ModelConfig`.
        repeats: for each list in train, how often a row occurs in an epoch; null: once.
        longest: longer utterances are left out, in the unit of max_frames; null: none.
        limit: maximum number of training and of validation utterances; null: all.
        max_bad: share of the utterances that may be unusable.
        workers: processes that make batches; 0: the trainer itself.
        processes: processes that compute features, the first time.
        dir: a folder that `prepare` wrote.
        corpus: prepared into dir if it is missing; null: dir must exist.
    """

    train: Any = "???"
    valid: Any = "???"
    speakers: str | None = None
    use_spk_embedding: bool = False
    max_frames: int = setting(2000, ge=1)
    repeats: list[float] | None = setting(None, gt=0)
    longest: int | None = setting(None, ge=1)
    limit: int | None = setting(None, ge=1)
    max_bad: float = setting(0.05, ge=0, le=1)
    workers: int = setting(0, ge=0, le=1024)
    processes: int = setting(2, ge=1, le=1024)
    dir: str | None = "???"
    corpus: Any = None


@dataclass
class EngineConfig:
    """Keys that every engine has, see `conf/engine/base.yaml`.

    The class of an engine declares its other keys.

    Attributes:
        nproc_per_node: processes on this machine; auto: one per GPU.
        threads: CPU threads per process; null: as the run began, or the default of torch.
        timeout: seconds that a rank waits for another.
        compile: apply torch.compile to the repeated blocks of the networks.
        activation_checkpointing: recompute the activations of those blocks in the backward pass.
    """

    nproc_per_node: Any = setting("auto", ge=1, le=1024, words=("auto",))
    threads: int | None = setting(None, ge=1, le=1024)
    timeout: float = setting(1800.0, gt=0, le=604800)
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass
class TrainerConfig:
    """Settings of the training loop.

    Attributes:
        steps: training ends after so many steps, or after `epochs`, whichever comes first.
        epochs: maximum number of epochs; null: no limit.
        accumulate: micro-batches per rank and step.
        precision: of the forward and backward pass.
        max_grad_norm: gradients are clipped to this norm; null: not clipped.
        ema: decay of an exponential moving average of the weights, such as 0.999; null: none.
        running_sum: keep the sum of the weights of all steps in fp64, for `average method=running`.
        log_every: steps between logs; 0: only at the end.
        valid_every: steps between validations; 0: only at the end.
        valid_epochs: epochs between validations with a checkpoint; 0: none.
        previews: number of validation utterances that the loggers show.
        on_nonfinite: stop at an update whose gradients are not finite, or skip it.
        deterministic: use deterministic algorithms on CUDA, which are slower.
        freeze: patterns of the modules or parameters of the model that are not trained.
        lr_scales: patterns of parameters with a factor of their learning rate; the first pattern
            that matches counts.
        no_decay: patterns of the parameters without weight decay.
        layer_decay: factor of the learning rate from each repeated block to the one before it.
    """

    steps: int | None = setting(1000, ge=0)
    epochs: int | None = setting(None, ge=0)
    accumulate: int = setting(1, ge=1)
    precision: Precision = Precision.fp32
    max_grad_norm: float | None = setting(5.0, gt=0, hint="give null for no clipping")
    ema: float | None = setting(None, gt=0, lt=1)
    running_sum: bool = False
    log_every: int = setting(50, ge=0)
    valid_every: int = setting(500, ge=0)
    valid_epochs: int = setting(1, ge=0)
    previews: int = setting(3, ge=0)
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    deterministic: bool = False
    freeze: list[str] = field(default_factory=list)
    lr_scales: Any = None
    no_decay: list[str] = field(default_factory=list)
    layer_decay: float | None = setting(None, gt=0, le=1)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and how many are kept.

    Attributes:
        every: steps between checkpoints.
        keep_last: how many of the newest are kept.
        keep_best: how many of those with the lowest validation loss are kept.
        on_error: when one cannot be written, stop, or continue until the next; the last one of a
            run must be written.
    """

    every: int = setting(500, ge=0)
    keep_last: int = setting(3, ge=0)
    keep_best: int = setting(5, ge=0)
    on_error: OnError = OnError.stop


def engine_config(engine: Mapping[str, Any]) -> EngineConfig:
    """Returns the keys of an engine's config that all engines share.

    Raises:
        UserError: one of them is outside its range, or has another type.
    """
    from omegaconf.errors import ValidationError

    names = [f.name for f in fields(EngineConfig)]
    common = {name: engine[name] for name in names if name in engine}
    try:
        return parse(EngineConfig, common, "engine.")
    except ValidationError as error:
        raise UserError(f"engine.{error.full_key}: {str(error).splitlines()[0]}") from None
