"""Types of the keys that hold plain values, so that Hydra refuses a wrong value or name by itself. No torch here."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(Enum):
    stop = "stop"
    skip = "skip"


class Select(Enum):
    best = "best"
    last = "last"
    window = "window"
    ema = "ema"


class Method(Enum):
    uniform = "uniform"
    weighted = "weighted"
    greedy = "greedy"
    running = "running"


class ExportPrecision(Enum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


class Backend(Enum):
    torch = "torch"
    onnx = "onnx"
    jit = "jit"
    pt2 = "pt2"


class Score(Enum):
    none = "none"
    edit = "edit"
    wer = "wer"


@dataclass
class TrainerConfig:
    """steps, epochs: training ends at whichever comes first. accumulate: micro-batches a rank has in a step.

    max_grad_norm: largest gradient norm. ema: decay of the running mean of the weights, such as 0.999.
    running_sum: keeps the sum of the weights of all steps, in fp64, for `average method=running`.
    valid_every: steps between validations. valid_epochs: epochs between validations with a checkpoint; 0: none.
    previews: validation utterances to look at and listen to in TensorBoard.
    on_nonfinite: what a gradient that is not finite does. deterministic: on CUDA, at a price in speed.
    """

    steps: int | None = 1000
    epochs: int | None = None
    accumulate: int = 1
    precision: Precision = Precision.fp32
    max_grad_norm: float | None = 5.0
    ema: float | None = None
    running_sum: bool = False
    log_every: int = 50
    valid_every: int = 500
    valid_epochs: int = 1
    previews: int = 3
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    deterministic: bool = False


@dataclass
class CheckpointConfig:
    """every: steps between checkpoints. keep_last, keep_best: how many stay, by age and by validation loss."""

    every: int = 500
    keep_last: int = 3
    keep_best: int = 5


@dataclass
class TrainConfig:
    family: Any = field(default_factory=dict)
    model: Any = field(default_factory=dict)
    mode: Any = field(default_factory=dict)
    network: Any = field(default_factory=dict)
    components: Any = field(default_factory=dict)
    objective: Any = field(default_factory=dict)
    optimizer: Any = field(default_factory=dict)
    scheduler: Any = field(default_factory=dict)
    data: Any = field(default_factory=dict)
    engine: Any = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seed: int = 0
    run_dir: str = "???"
    init_from: str | None = None
    init_strict: bool = True
    reference: str | None = None


@dataclass
class AverageConfig:
    """num: null: 5, 1 of ema, all of window. metric: of the validation; lower is better. window: [from, to], in steps.

    temperature: of method=weighted, in units of the metric. strict: fewer than num are refused.
    """

    run_dir: str = "???"
    select: Select = Select.best
    num: int | None = None
    metric: str = "loss"
    window: list[int] | None = None
    method: Method = Method.uniform
    temperature: float = 0.1
    output: str | None = None
    strict: bool = True


@dataclass
class ExportConfig:
    """family, model, settings: instead of a run, whose network the weights are, as words of train. latency: whether it is measured."""

    run_dir: str | None = None
    family: str | None = None
    model: str | None = None
    settings: list[str] = field(default_factory=list)
    format: Any = field(default_factory=dict)
    weights: str = "best"
    precision: list[ExportPrecision] = field(default_factory=lambda: [ExportPrecision.fp32])
    components: list[str] = field(default_factory=lambda: ["all"])
    latency: bool = True
    out: str | None = None
    tag: str = "${cosyexp.swept:}"


@dataclass
class SynthesizeConfig:
    text: str = "???"
    llm: str | None = None
    flow: str | None = None
    hifigan: str | None = None
    exports: list[str] = field(default_factory=list)
    speaker: str | None = None
    backend: Backend = Backend.torch
    precision: ExportPrecision = ExportPrecision.fp32
    weights: str = "best"
    out: str = "out${cosyexp.swept:}.wav"
    seed: int = 0


@dataclass
class PrepareConfig:
    """out: the folder to write. shard_size: utterances in a parquet file. fit_on: recordings that the front ends are fitted on.

    max_seconds: of a recording. processes: at work side by side. max_bad: the share of recordings that may be unusable.
    cache: fields of audio that are computed too, of mel, f0 and wave. inspect: what to look at, instead of preparing.
    """

    family: Any = field(default_factory=dict)
    corpus: Any = field(default_factory=dict)
    speech_tokenizer: Any = field(default_factory=dict)
    speaker_encoder: Any = field(default_factory=dict)
    out: str = "???"
    shard_size: int = 200
    fit_on: int = 2000
    max_seconds: float = 30.0
    processes: int = 2
    max_bad: float = 0.05
    cache: list[str] = field(default_factory=list)
    inspect: str | None = None
    seed: int = 0


@dataclass
class PreferConfig:
    """candidates: how often each text is spoken. score: what chooses the best and the worst of them; none: chosen is the ground truth.

    batch_size: candidates side by side. limit: utterances at most of the training, and of the validation data.
    flow, hifigan: runs that make a candidate audible. asr: the folder of a Whisper model. language: in which it listens.
    """

    family: Any = field(default_factory=dict)
    model: Any = field(default_factory=dict)
    data: Any = field(default_factory=dict)
    run_dir: str = "???"
    out: str = "???"
    candidates: int = 1
    score: Score = Score.none
    weights: str = "best"
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    flow: str | None = None
    hifigan: str | None = None
    asr: str | None = None
    language: str | None = None
