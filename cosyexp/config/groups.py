"""The config groups: what the files of `conf/family/`, `conf/data/`, ... may hold."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from cosyexp.config.fields import Node, parse, setting


class Precision(Enum):
    """Of a forward and backward pass; bf16 and fp16 keep fp32 weights."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(Enum):
    """What an update whose gradients are not finite does to the run."""

    stop = "stop"
    skip = "skip"


@dataclass
class MelConfig:
    """Log-mel spectrogram: n_fft, hop, win in samples, fmin and fmax in Hz (null: Nyquist).

    mean, std: the spectrogram is normalized by them. align: pad the wave to a multiple of this
    many samples, so that frames come in whole speech tokens.
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
    """What llm, flow and vocoder of one family share.

    token_rate: speech tokens per second. frames_per_token: mel frames of a speech token; null: the
    flow stretches each utterance to its own length. speech_per_text: fewest and most speech tokens
    per text token in synthesis. instruct: instruction of a text that has none; null: the llm takes
    no instructions. sampler: draws speech tokens. guidance: strength of classifier-free guidance.
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
    speech_per_text: list[float] = field(default_factory=lambda: [1.0, 8.0])
    instruct: str | None = None
    sampler: Node = field(default_factory=dict)
    guidance: float = setting(0.0, ge=0)
    tokenizer: Node = field(default_factory=dict)


@dataclass
class ModelConfig:
    """Which of the three models is trained, and how its data become batches.

    official: name of its file in the official releases. warmup: updates, if the schedule has a
    warm-up. max_frames: size of a padded micro-batch, in tokens (llm) or mel frames. discriminator:
    optimizer and scheduler of a GAN's discriminator.
    """

    name: str = ""
    official: str = ""
    warmup: int = setting(0, ge=0)
    max_frames: int | None = setting(None, ge=1)
    collator: Node = field(default_factory=dict)
    discriminator: Node = field(default_factory=dict)


@dataclass
class ModeConfig:
    """What a model learns from. suffix: of the run directory's default name."""

    name: str = ""
    suffix: str = ""


@dataclass
class DataConfig:
    """Training and validation data.

    train, valid: a data list or a parquet file, or several; valid may be null. speakers:
    safetensors with an embedding of each speaker, kept in the run for synthesis. repeats: for each
    list in train, how often a row occurs in an epoch. longest: leave out longer utterances. limit:
    use only so many utterances. max_bad: share of unusable utterances that is tolerated. workers:
    processes that make batches; processes: that compute features, the first time. dir: a folder
    that `prepare` wrote. corpus: prepared into dir if it is not there.
    """

    train: Any = None
    valid: Any = None
    speakers: str | None = None
    use_spk_embedding: bool = False
    max_frames: int = setting(2000, ge=1)
    repeats: list[float] | None = None
    longest: int | None = setting(None, ge=1)
    limit: int | None = setting(None, ge=1)
    max_bad: float = setting(0.05, ge=0, le=1)
    workers: int = setting(0, ge=0)
    processes: int = setting(2, ge=1)
    dir: str | None = None
    corpus: Any = None


@dataclass
class EngineConfig:
    """Keys that every engine has (`conf/engine/base.yaml`); an engine's class declares its others.

    nproc_per_node: processes on this machine; auto: one per GPU. threads: of a process on CPU;
    null: as the run began. timeout: seconds that a rank waits for another. compile:
    torch.compile the repeated blocks. activation_checkpointing: recompute the activations of
    those blocks in the backward.
    """

    nproc_per_node: Any = setting("auto", ge=1, words=("auto",))
    threads: int | None = setting(None, ge=1)
    timeout: float = setting(1800.0, gt=0)
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass
class TrainerConfig:
    """The training loop.

    steps, epochs: training ends at whichever comes first. accumulate: micro-batches per rank and
    step. max_grad_norm: gradients are clipped to this norm; null: not clipped. ema: decay of an
    exponential moving average of the weights, such as 0.999. running_sum: keep the sum of the
    weights of all steps in fp64, for `average method=running`. log_every, valid_every: steps; 0:
    never but at the end. valid_epochs: epochs between validations with a checkpoint; 0: none.
    previews: validation utterances shown in the loggers. on_nonfinite: stop at, or skip, an update
    whose gradients are not finite. deterministic: on CUDA, at a cost in speed.
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


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints. keep_last, keep_best: how many stay, by age and by loss."""

    every: int = setting(500, ge=0)
    keep_last: int = setting(3, ge=0)
    keep_best: int = setting(5, ge=0)


def engine_config(engine: Mapping[str, Any]) -> EngineConfig:
    """Returns the keys that all engines share.

    Raises:
        UserError: one of them is outside its range.
    """
    names = [f.name for f in fields(EngineConfig)]
    common = {name: engine[name] for name in names if name in engine}
    return parse(EngineConfig, common, "engine.")
