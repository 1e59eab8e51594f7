"""The config of each app, as a dataclass."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cosyexp.config.fields import Node, setting
from cosyexp.config.groups import (
    CheckpointConfig,
    DataConfig,
    FamilyConfig,
    ModeConfig,
    ModelConfig,
    TrainerConfig,
    engine_config,
)
from cosyexp.config.names import ADAPTER, plain_name
from cosyexp.errors import UserError

MODELS = ("llm", "flow", "hifigan")  # of a system, in the order of synthesis


class Select(Enum):
    """Which checkpoints are averaged."""

    best = "best"
    last = "last"
    window = "window"
    ema = "ema"


class MetricMode(Enum):
    """Which values of a metric are better."""

    min = "min"
    max = "max"


class ExportPrecision(Enum):
    """Precision of an exported file."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@dataclass
class AppConfig:
    """Keys of every app.

    The groups experiment, debug and hparams_search are not keys: they select overlay files.

    Attributes:
        trusted: packages whose classes a config may build; never read from a run.
    """

    trusted: list[str] = field(default_factory=list)


@dataclass
class ExportedConfig:
    """The part of a run's config that an export keeps for synthesis."""

    family: FamilyConfig = field(default_factory=FamilyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    components: Node = field(default_factory=dict)

    def check(self) -> None:
        """Checks the names of which files are named after.

        Raises:
            UserError: one of them would lead out of its folder.
        """
        names = {"model.name": self.model.name, "model.official": self.model.official}
        for key, name in names.items():
            if name:
                plain_name(name, key)
        for name in self.components:
            plain_name(str(name), "components")


@dataclass
class ResumeConfig:
    """How a run is resumed; it belongs to the command, and is not stored in the run.

    Attributes:
        change: keys that go on with another value, such as optimizer.lr.
    """

    change: list[str] = field(default_factory=list)


@dataclass
class TrainConfig(ExportedConfig, AppConfig):
    """Config of `train`.

    Attributes:
        run_dir: folder of the run.
        init_from: a run or a file of weights to start from.
        init_strict: whether all of these weights must fit.
        init_extra: what the embeddings of family.tokenizer.extra start from: mean, normal or
            copy:<token>; null: the weights have them.
        reference: reference model of mode=dpo, a run or a file of weights.
        resume: what a resumed run may change.
        plan: print what the run would need, and train nothing.
    """

    mode: ModeConfig = field(default_factory=ModeConfig)
    network: Node = field(default_factory=dict)
    objective: Node = field(default_factory=dict)
    adapter: Node = field(default_factory=dict)
    optimizer: Node = field(default_factory=dict)
    scheduler: Node = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    engine: Node = field(default_factory=dict)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    seed: int = setting(0, ge=0)
    run_dir: str = "???"
    init_from: str | None = None
    init_strict: bool = True
    init_extra: str | None = "mean"
    reference: str | None = None
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    plan: bool = False

    @property
    def weights_file(self) -> str:
        """Name of the file of weights in a checkpoint or an average."""
        return ADAPTER if self.adapter else f"{self.model.name}.safetensors"

    def check(self) -> None:
        """Checks the keys whose valid values depend on other keys.

        Raises:
            UserError: the run would have no end, no name, or no data, or a name is not plain.
        """
        super().check()
        engine_config(self.engine)
        if not self.run_dir:
            raise UserError("run_dir= is empty: name the folder of the run")
        if self.trainer.steps is None and self.trainer.epochs is None:
            raise UserError(
                "trainer.steps and trainer.epochs are both null, so the run would never end: give "
                "one of them"
            )
        if "steps" in self.scheduler and self.scheduler["steps"] is None:
            raise UserError(
                "scheduler.steps is null, but this schedule follows the length of the run: give "
                "trainer.steps="
            )
        if not self.data.train:
            raise UserError("data.train= is empty: name a data list or a parquet file")


@dataclass
class AverageConfig(AppConfig):
    """Config of `average`.

    Attributes:
        run_dir: the run, or a model directory of the original.
        select: which checkpoints are averaged.
        num: number of checkpoints; null: 5, or 1 of ema, or all of a window.
        metric: validation loss or metric that defines the best.
        metric_mode: whether its lowest or its highest value is best.
        window: first and last step of the checkpoints to average.
        method: how the checkpoints are combined.
        output: file to write, instead of a folder in the run.
        strict: refuse to average fewer checkpoints than num.
    """

    run_dir: str = "???"
    select: Select = Select.best
    num: int | None = setting(None, ge=1)
    metric: str = "loss"
    metric_mode: MetricMode = MetricMode.min
    window: list[int] | None = None
    method: Node = field(default_factory=dict)
    output: str | None = None
    strict: bool = True


@dataclass
class CompareConfig(AppConfig):
    """Config of `compare`.

    Attributes:
        run_dir: the runs.
        metric: validation loss or metric that defines the best.
        metric_mode: whether its lowest or its highest value is best.
        out: the picture.
    """

    run_dir: list[str] = field(default_factory=list)
    metric: str = "loss"
    metric_mode: MetricMode = MetricMode.min
    out: str = "compare.png"

    def check(self) -> None:
        """Checks that there are runs.

        Raises:
            UserError: there are none, or one is named twice.
        """
        if not self.run_dir:
            raise UserError("run_dir= is empty: name the runs to compare, run_dir=a,b")
        if twice := next((run for run in self.run_dir if self.run_dir.count(run) > 1), None):
            raise UserError(f"run_dir= names {twice} twice: name each run once")


@dataclass
class ExportConfig(AppConfig):
    """Config of `export`.

    Attributes:
        run_dir: the run; null: the newest one.
        official: family of an official file of weights, which is exported without a run.
        settings: overrides of `train` that describe the network of an official file.
        weights: which weights of the run, or a file.
        metric: validation loss or metric that defines the best weights.
        metric_mode: whether its lowest or its highest value is best.
        latency: whether to measure the latency.
        device: where the files are verified and timed: auto, cpu, cuda, cuda:1, mps.
        out: folder to write; null: in the run.
        license: of the weights, for the model card; null: not stated.
        evaluation: folder of an evaluation, for the model card.
        tag: appended to the default folder in a sweep.
    """

    run_dir: str | None = None
    official: str | None = None
    settings: list[str] = field(default_factory=list)
    format: Node = field(default_factory=dict)
    weights: str = "best"
    metric: str = "loss"
    metric_mode: MetricMode = MetricMode.min
    precision: list[ExportPrecision] = field(default_factory=lambda: [ExportPrecision.fp32])
    components: list[str] = field(default_factory=lambda: ["all"])
    latency: bool = True
    device: str = "auto"
    out: str | None = None
    license: str | None = None
    evaluation: str = "evaluation"
    tag: str = "${cosyexp.swept:}"


@dataclass
class PushConfig(AppConfig):
    """Config of `push`.

    Attributes:
        run_dir: the run; null: the newest one.
        format: folder of the run's exports whose files are pushed; null: all, as folders.
        repo: the repository, such as me/voice.
        private: whether a new repository is private.
        endpoint: URL of the hub; null: HF_ENDPOINT, or huggingface.co.
    """

    run_dir: str | None = None
    format: str | None = None
    repo: str = "???"
    private: bool = True
    endpoint: str | None = None


@dataclass
class PullConfig(AppConfig):
    """Config of `pull`.

    Attributes:
        repo: the repository, such as me/voice.
        revision: branch, tag or commit; null: the main branch.
        out: folder to write; it must not be there.
        endpoint: URL of the hub; null: HF_ENDPOINT, or huggingface.co.
    """

    repo: str = "???"
    revision: str | None = None
    out: str = "???"
    endpoint: str | None = None


@dataclass
class ModelsConfig(AppConfig):
    """Config of an app that runs trained models.

    Attributes:
        llm: run of the llm; `evaluate` also takes a file of the official release.
        flow: run of the flow, or such a file.
        hifigan: run of the vocoder, or such a file.
        exports: folders of exports, instead of runs.
        backend: torch, or the format of the exports.
        precision: of the exports.
        weights: which weights of the runs.
        metric: validation loss or metric that defines the best weights.
        metric_mode: whether its lowest or its highest value is best.
        trusted_exports: run exported files that an export of this user did not write.
        device: auto, cpu, cuda, cuda:1, mps.
        seed: of all random draws.
    """

    llm: str | None = None
    flow: str | None = None
    hifigan: str | None = None
    exports: list[str] = field(default_factory=list)
    backend: str = "torch"
    precision: ExportPrecision = ExportPrecision.fp32
    weights: str = "best"
    metric: str = "loss"
    metric_mode: MetricMode = MetricMode.min
    trusted_exports: bool = False
    device: str = "auto"
    seed: int = setting(0, ge=0)

    @property
    def given(self) -> dict[str, str]:
        """The runs or files, by model."""
        return {name: path for name in MODELS if (path := getattr(self, name))}

    def check(self) -> None:
        """Checks that runs and exports are not both given.

        Raises:
            UserError: they are, or it is not said in which format the exports are.
        """
        if self.exports and (self.given or self.backend == "torch"):
            raise UserError(
                "exports= excludes runs and backend=torch: leave out llm=, flow= and hifigan=, "
                "and give the format of the exports as backend=, such as onnx"
            )


@dataclass
class SynthesizeConfig(ModelsConfig):
    """Config of `synthesize`.

    Attributes:
        text: what to say; "-" in a stream: standard input.
        texts: file with a text per line, instead.
        speaker: name of a speaker; null: the first.
        prompt: recording whose voice speaks, instead.
        prompt_text: what is said in it; null: the llm does not continue it.
        instruct: how to say it; null: the default of the family.
        speed: 2.0 takes half the time.
        stream: write the file while it is made.
        batch_size: maximum number of pieces of text that the llm speaks at once.
        speech_tokenizer: front end of the tokens of the prompt.
        speaker_encoder: front end of the speaker embedding of the prompt.
        out: WAV file to write.
    """

    text: str | None = None
    texts: str | None = None
    speaker: str | None = None
    prompt: str | None = None
    prompt_text: str | None = None
    instruct: str | None = None
    speed: float = setting(1.0, ge=0.25, le=4)
    stream: bool = False
    batch_size: int = setting(8, ge=1)
    speech_tokenizer: Node = field(default_factory=dict)
    speaker_encoder: Node = field(default_factory=dict)
    out: str = "out${cosyexp.swept:}.wav"

    def check(self) -> None:
        """Checks what is said, and by whom.

        Raises:
            UserError: there is no text or more than one, or settings exclude each other.
        """
        if self.text is None and self.texts is None:
            raise UserError("text must be given, for example text=..., or texts=<file>")
        excluded = [
            ("text", "texts"),
            ("speaker", "prompt"),
            ("texts", "stream"),
        ]
        for first, second in excluded:
            if getattr(self, first) is not None and getattr(self, second):
                raise UserError(f"{first}= and {second}= exclude each other: give one of them")
        if self.prompt_text is not None and self.prompt is None:
            raise UserError("prompt_text= is what is said in a recording: give prompt=<file>")
        if self.stream and self.speed != 1:
            raise UserError("a stream has speed=1: leave out stream=true, or speed=")
        super().check()


@dataclass
class EvaluateConfig(ModelsConfig):
    """Config of `evaluate`.

    Attributes:
        official: family of the files; null: runs.
        valid: data list or parquet file; null: the validation data of the first run.
        limit: maximum number of utterances; null: all.
        judge: judges by name.
        shown: number of utterances on the page, the worst ones.
        out: folder to write.
    """

    official: str | None = None
    valid: str | None = None
    limit: int | None = setting(None, ge=1)
    judge: dict[str, Any] = field(default_factory=dict)
    shown: int = setting(30, ge=0)
    out: str = "evaluation${cosyexp.swept:}"

    def check(self) -> None:
        """Checks that it is said once what to evaluate.

        Raises:
            UserError: nothing is given, or keys exclude each other.
        """
        if not self.given and not self.exports:
            raise UserError("there is nothing to evaluate: give llm=, flow= or hifigan=")
        super().check()
        if self.official and (self.exports or self.backend != "torch"):
            raise UserError("official= evaluates files of weights: leave out exports= and backend=")


@dataclass
class PrepareConfig(AppConfig):
    """Config of `prepare`.

    Attributes:
        out: folder to write.
        shard_size: utterances per parquet file.
        fit_on: maximum number of recordings that the front ends are fitted on.
        max_seconds: maximum length of a recording in seconds.
        processes: number of parallel processes.
        max_bad: share of the recordings that may be unusable.
        segment: cuts long recordings into utterances.
        transcribe: gives the text of recordings without one.
        verify: hears each recording, to compare its text with.
        normalize: language whose numbers and abbreviations are written as words: en, zh, ja, auto.
        trim: whether silence at both ends is cut.
        loudness: integrated loudness in LUFS that the audio is scaled to.
        filter: which recordings are kept, such as snr > 15 and wer < 0.3.
        max_unknown: share of a text that the family's tokenizer may not know.
        dry_run: write the report only.
        cache: fields of the audio to compute now: mel, f0, wave.
        inspect: data to describe, instead of preparing.
    """

    family: FamilyConfig = field(default_factory=FamilyConfig)
    corpus: Node = field(default_factory=dict)
    speech_tokenizer: Node = field(default_factory=dict)
    speaker_encoder: Node = field(default_factory=dict)
    out: str = "???"
    shard_size: int = setting(200, ge=1)
    fit_on: int = setting(2000, ge=1)
    max_seconds: float = setting(30.0, gt=0)
    processes: int = setting(2, ge=1, le=1024)
    max_bad: float = setting(0.05, ge=0, le=1)
    segment: Any = None
    transcribe: Any = None
    verify: Any = None
    normalize: str | None = None
    trim: bool = False
    loudness: float | None = setting(None, ge=-70, le=0)
    filter: str | None = None
    max_unknown: float = setting(0.5, ge=0, le=1)
    dry_run: bool = False
    cache: list[str] = field(default_factory=list)
    inspect: str | None = None
    seed: int = setting(0, ge=0)

    def check(self) -> None:
        """Checks that the pieces of long recordings get a text.

        Raises:
            UserError: they do not.
        """
        if self.segment and not self.transcribe:
            raise UserError(
                "segment= cuts long recordings into pieces without a text: add transcribe=whisper"
            )


@dataclass
class PreferConfig(AppConfig):
    """Config of `prefer`.

    Attributes:
        run_dir: run of the llm.
        out: folder to write.
        candidates: number of answers per text.
        score: ranks the answers; null: the ground truth is chosen, an answer rejected.
        weights: which weights of the run, or a file.
        batch_size: maximum number of answers that are generated at once.
        limit: maximum number of training and of validation utterances.
        flow: run of the flow that synthesizes the answers.
        hifigan: run of the vocoder that synthesizes the answers.
        asr: folder of a Whisper model; null: whisper-base.
        language: of the recognizer, such as en; null: detected.
        device: auto, cpu, cuda, cuda:1, mps.
    """

    family: FamilyConfig = field(default_factory=FamilyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run_dir: str = "???"
    out: str = "???"
    candidates: int = setting(1, ge=1)
    score: Any = None
    weights: str = "best"
    batch_size: int = setting(16, ge=1)
    limit: int | None = setting(None, ge=1)
    seed: int = setting(0, ge=0)
    flow: str | None = None
    hifigan: str | None = None
    asr: str | None = None
    language: str | None = None
    device: str = "auto"
