"""The readers of files that other people may have written, each with an intact file to damage."""

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from cosyexp.averaging.candidates import candidates_in
from cosyexp.cli.sweep import read_table, record_job
from cosyexp.config import FamilyConfig
from cosyexp.data.cache import CachedField, cache_path, ensure
from cosyexp.data.collators.base import Collator
from cosyexp.data.corpora.auto import Auto
from cosyexp.data.corpora.base import Corpus, Recording
from cosyexp.data.corpora.kaldi import Kaldi
from cosyexp.data.corpora.libritts import LibriTTS
from cosyexp.data.corpora.table import Table
from cosyexp.data.dataset import Dataset
from cosyexp.data.encoding import check, listen, read_key
from cosyexp.data.features import read_wave
from cosyexp.data.fields import Field, SpeechTokens
from cosyexp.data.frontends.kmeans import KMeansTokenizer
from cosyexp.data.frontends.mel_speaker import MelSpeakerEncoder
from cosyexp.data.index import index_path
from cosyexp.data.inspection import inspect
from cosyexp.data.prepared import prepared
from cosyexp.data.shards import read_list, read_note, write_list, write_shard
from cosyexp.data.tokenizers import CharacterTokenizer, qwen_tokenizer, whisper_encoding
from cosyexp.exporting.report import merge_report
from cosyexp.exporting.source import source_from_run
from cosyexp.run.directory import RunDirectory
from cosyexp.run.pickles import open_weights
from cosyexp.run.tensors import read_tensors
from cosyexp.run.weights import find_weights, read_weights
from cosyexp.synthesis.backends import read_excerpt, read_format
from cosyexp.training.engines.deepspeed import overridden
from cosyexp.training.loggers.base import BufferedLogger, RunInfo
from cosyexp.training.loggers.csv import Csv
from cosyexp.training.loggers.jsonl import JsonLines
from cosyexp.training.reference import NOTE as REFERENCE
from cosyexp.training.reference import read_note as read_reference
from tests.fuzz.harness import Reader
from tests.support import config
from tests.unit import layouts

TOKENS = SpeechTokens(512)
RATE = 24000  # Hz


class TokensOnly:
    """A collator that reads the speech tokens alone."""

    fields: dict[str, Field] = {"tokens": TOKENS}

    def length(self, sizes: Any) -> Any:
        """Returns the number of tokens."""
        return sizes["tokens"]


class Service(BufferedLogger):
    """A logger that sends nothing."""

    name = "service"

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        """Returns an id."""
        return str(run_id)


def readers(run: Path, folder: Path) -> Iterator[Reader]:
    """Yields all readers.

    Args:
        run: a finished run of the llm, with an average and an export as `format=jit`.
        folder: for copies of what they read.
    """
    run = Path(shutil.copytree(run, folder / "run"))
    yield from of_runs(run)
    yield from of_weights(run, folder)
    yield from of_data(folder)
    yield from of_corpora(folder)
    yield from of_audio(folder)


def of_runs(run: Path) -> Iterator[Reader]:
    """Yields the readers of a run directory."""
    directory = RunDirectory(run)
    begun = config("llm", Path("data"), "run_dir=run")
    info = RunInfo(directory, {}, 3, False)

    def restored(path: Path) -> Any:
        content = path.read_bytes()
        return lambda: path.write_bytes(content)

    yield Reader("config.yaml of a run", run / "config.yaml", lambda: directory.refuse_other(begun))
    meta = max(run.glob("checkpoints/step_*/meta.yaml"))

    def latest() -> None:
        RunDirectory(run).checkpoints.latest()
        for candidate in candidates_in(run).found:
            assert isinstance(candidate.losses.get("loss", 0.0), float)
        find_weights(RunDirectory(run), "best")

    yield Reader("meta.yaml of a checkpoint", meta, latest, prepare=restored(meta))

    def jsonl() -> None:
        logger = JsonLines()
        logger.start(info)
        logger.close()

    yield Reader("metrics.jsonl", run / "metrics.jsonl", jsonl)

    changes = run / "changes.yaml"
    directory.record_changes(2, {"optimizer.lr": (1e-4, 2e-4)})
    yield Reader("changes.yaml", changes, lambda: directory.record_changes(3, {"a": (1, 2)}))

    average = next(run.glob("averages/*/meta.yaml"))
    yield Reader("meta.yaml of an average", average, lambda: source_from_run(directory, "average"))

    excerpt = run / "exports/jit/llm.yaml"
    yield Reader(
        "<model>.yaml of an export",
        excerpt,
        lambda: (read_excerpt(excerpt), read_format(excerpt, "format=jit")),
    )
    yield Reader(
        "report.json of an export",
        next((run / "exports/jit").glob("report.*.json")),
        lambda: merge_report(run / "exports/jit", "fp32", {"runtime": "x"}, {}),
    )

    def csv() -> None:
        Csv().start(info)

    table = run / "metrics.csv"
    table.write_text("step,epoch,train/loss\n1,0,2.5\n2,0,2.25\n4,0,\n")
    yield Reader("metrics.csv", table, csv)

    sent = run / "loggers/service.json"
    sent.parent.mkdir()
    sent.write_text(json.dumps({"step": 2, "names": ["train/loss"], "id": "abc"}))
    yield Reader("state of a logger", sent, lambda: Service().start(info))

    note = directory.reference / REFERENCE
    note.parent.mkdir(exist_ok=True)
    note.write_text(yaml.safe_dump({"weights": "a.pt", "sha256": "0" * 64, "cached": "1"}))
    yield Reader("note of a DPO reference", note, lambda: read_reference(directory))

    sweep = run.parent / "sweep"
    for job in range(3):
        record_job(str(sweep), job, status="done", overrides=f"seed={job} a=1", valid_loss=2.0)
    row = sweep / "jobs/1.json"

    def sweep_table() -> None:
        read_table(sweep)
        record_job(str(sweep), 1, status="failed")

    yield Reader("row of a sweep", row, sweep_table)

    settings = run.parent / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
    base = {"zero_optimization": {"stage": 1}, "train_batch_size": 1}
    yield Reader("DeepSpeed's JSON", settings, lambda: overridden(base, settings))


def of_weights(run: Path, folder: Path) -> Iterator[Reader]:
    """Yields the readers of tensors."""
    weights = {"a.weight": torch.ones(3, 4), "a.bias": torch.zeros(3, dtype=torch.float16)}
    original = folder / "epoch_1_whole.pt"
    torch.save({**weights, "epoch": 1, "step": 2}, original)

    def read_all(path: Path) -> None:
        read_weights(path)
        with open_weights(path) as file:
            for name in file.keys():  # noqa: SIM118
                file[name]

    yield Reader("weights as .pt", original, lambda: read_all(original))
    tensors = folder / "weights.safetensors"
    shutil.copy(max(run.glob("checkpoints/step_*/llm.safetensors")), tensors)
    yield Reader("weights as .safetensors", tensors, lambda: read_all(tensors))
    speakers = run / "speakers.safetensors"
    yield Reader("speakers.safetensors", speakers, lambda: read_tensors(speakers))
    tokenizer = folder / "speech_tokenizer.safetensors"
    draw = torch.Generator().manual_seed(0)
    waves = [torch.randn(16000, generator=draw).numpy() * 0.1 for _ in range(4)]
    KMeansTokenizer.fit(waves, codes=8, rate=50, seed=0).save(tokenizer)
    yield Reader("fitted speech tokenizer", tokenizer, lambda: KMeansTokenizer.load(tokenizer))
    encoder = folder / "speaker_encoder.safetensors"
    MelSpeakerEncoder.fit(waves, width=16, seed=0).save(encoder)
    yield Reader("fitted speaker encoder", encoder, lambda: MelSpeakerEncoder.load(encoder))


def of_data(folder: Path) -> Iterator[Reader]:
    """Yields the readers of shards, lists, caches, vocabularies and prepared folders."""
    shard, listed = folder / "shards/a.parquet", folder / "shards/a.list"
    rows: list[dict[str, Any]] = [
        {
            "utt": f"utt{i}",
            "text": "a b c",
            "spk": "one",
            "audio_data": b"RIFF" + bytes(100),
            "utt_embedding": [0.5] * 4,
            "spk_embedding": [0.5] * 4,
            "speech_token": [1, 2, 3 + i],
        }
        for i in range(6)
    ]
    write_shard(shard, rows, "note")
    write_list(listed, [shard])
    alphabet = CharacterTokenizer(alphabet="abc ")
    cached, index = cache_path(shard, TOKENS), index_path(shard, TokensOnly.fields)

    def train() -> None:
        collator: Collator = TokensOnly()  # type: ignore[assignment]
        data = Dataset([str(listed)], collator, max_bad=0.5, processes=1)
        for i in range(len(data)):
            data.row(i)

    def forget() -> None:
        shutil.rmtree(shard.with_suffix(".fields"), ignore_errors=True)

    yield Reader("parquet shard, to train", shard, train, prepare=forget)
    yield Reader(
        "parquet shard, to inspect",
        shard,
        lambda: (list(inspect(str(shard), alphabet)), read_note(shard)),
    )
    yield Reader("data list", listed, lambda: read_list(str(listed)))
    train()
    intact = {path: path.read_bytes() for path in (cached, index)}

    def restore() -> None:
        for path, content in intact.items():
            path.write_bytes(content)

    yield Reader("cached index", index, train, prepare=restore)

    def field() -> None:
        ensure([shard], [TOKENS], 1)
        values = CachedField(shard, TOKENS)
        for i in range(len(values.lengths)):
            values[i]
            values.utts[i].as_py()

    yield Reader("cached field", cached, train, prepare=restore)
    yield Reader("cached field, without an index", cached, field, prepare=restore)
    yield Reader("encoded part of a preparation", cached, lambda: read_key(cached))

    meta = folder / "prepared/meta.yaml"
    meta.parent.mkdir()
    meta.write_text(yaml.safe_dump({"settings": {"token_rate": 50}, "speakers": ["a"]}))
    yield Reader("meta.yaml of prepared data", meta, lambda: checked_family(meta.parent))

    vocabulary = folder / "small.tiktoken"
    vocabulary.write_text("".join(f"{token} {i}\n" for i, token in enumerate(["IQ==", "Ig=="])))
    yield Reader(
        "vocabulary of tiktoken",
        vocabulary,
        lambda: whisper_encoding.__wrapped__(str(vocabulary)),
    )
    tokenizer = folder / "qwen/tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text(json.dumps(small_tokenizer()))
    kind = {"tokenizer_class": "Qwen2Tokenizer"}
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(kind))
    for path in (tokenizer, tokenizer.with_name("tokenizer_config.json")):
        yield Reader(
            f"{path.stem} of a Qwen folder",
            path,
            lambda: qwen_tokenizer.__wrapped__(str(tokenizer.parent), "cosyvoice2"),
        )


def checked_family(folder: Path) -> None:
    """Reads a prepared folder as a training does."""
    from cosyexp.data.prepared import check_family

    check_family(folder, FamilyConfig(name="demo", token_rate=50))
    prepared(folder)


def small_tokenizer() -> dict[str, Any]:
    """Returns the content of a tokenizer.json of three tokens."""
    switches = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    byte_level = {"type": "ByteLevel", **switches}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    }


def of_corpora(folder: Path) -> Iterator[Reader]:
    """Yields the readers of what `prepare` makes data of."""

    def read(corpus: Corpus) -> None:
        len(corpus)
        for recording in corpus.recordings():
            try:
                check(recording)
                listen(recording, 30.0)
            except ValueError:
                continue  # left out, with the reason

    def found(root: Path) -> Corpus:
        return Auto(name="a", root=str(root))

    cells = [{"wav": f"{i}.wav", "text": f'say "{i}"', "utt": i, "speaker": "x"} for i in range(5)]
    contents = {
        "table.csv": "wav,text,utt,speaker\n"
        + "".join(f'{i}.wav,"a, b",u{i},x\n' for i in range(5)),
        "table.tsv": "wav\ttext\tutt\tspeaker\n"
        + "".join(f"{i}.wav\ta\tu{i}\tx\n" for i in range(5)),
        "table.jsonl": "".join(json.dumps(row) + "\n" for row in cells),
    }
    for name, content in contents.items():
        path = folder / name
        path.write_text(content)
        table = Table(name="t", path=str(path), held_out=0.2)
        yield Reader(f"corpus: {name}", path, lambda table=table: read(table))  # type: ignore[misc]
    metadata = folder / "lj/metadata.csv"
    metadata.parent.mkdir()
    metadata.write_text("a|Mr. A|Mister A\nb|b|b\n")
    speech = "corpus: metadata.csv of LJSpeech"
    yield Reader(speech, metadata, lambda: read(found(metadata.parent)))
    kaldi = folder / "kaldi"
    kaldi.mkdir()
    for name, content in (("wav.scp", "a /x/a.wav\n"), ("text", "a b c\n"), ("utt2spk", "a x\n")):
        (kaldi / name).write_text(content)
    spoken = Kaldi(name="k", root=str(kaldi), held_out=0.1)
    for name in ("wav.scp", "text"):
        yield Reader(f"corpus: {name} of Kaldi", kaldi / name, lambda: read(spoken))
    text = folder / "libri/train/1/2/u.normalized.txt"
    text.parent.mkdir(parents=True)
    text.write_text("hello\n")
    text.with_name("u.wav").write_bytes(b"RIFF")
    libri = LibriTTS(name="l", root=str(folder / "libri"), train=["train"], valid=[])
    yield Reader("corpus: text of LibriTTS", text, lambda: read(libri))
    for layout, damaged in (
        (layouts.hugging_face, "data/train-00000-of-00001.parquet"),
        (layouts.saved_to_disk, "data-00000-of-00001.arrow"),
        (layouts.webdataset, "shard-000.tar"),
        (layouts.lhotse_cuts, "cuts.jsonl.gz"),
        (layouts.kaldi_segments, "segments"),
        (layouts.kaldi_ark, "wav.scp"),
    ):
        root = folder / layout.__name__
        layout(root)
        path = root / damaged
        yield Reader(f"corpus: {path.name}", path, lambda root=root: read(found(root)))  # type: ignore[misc]


def of_audio(folder: Path) -> Iterator[Reader]:
    """Yields the readers of audio."""
    wave = 0.3 * np.sin(np.arange(RATE // 4) * 0.05)
    for suffix in ("wav", "flac", "ogg"):
        file = io.BytesIO()
        soundfile.write(file, wave, RATE, format=suffix.upper())
        path = folder / f"audio.{suffix}"
        path.write_bytes(file.getvalue())
        yield Reader(f"audio: {suffix}", path, lambda path=path: heard(path), (ValueError,))  # type: ignore[misc]


def heard(path: Path) -> Sequence[float]:
    """Decodes audio as `prepare` does."""
    recording = Recording(utt="u", text="t", speaker="s", path=str(path))
    return [float(np.abs(listen(recording, 30.0)[0]).max()), len(read_wave(str(path), 16000))]
