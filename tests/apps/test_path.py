"""The whole path: prepare, train, average, export, synthesize."""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cosyexp.data.shards import COLUMNS, read_list
from cosyexp.run.checkpoint import Checkpoints
from cosyexp.run.tensors import read_tensors
from tests.apps.warm import Warm
from tests.support import MODELS, RUNS, checkpoints, command, environment, metrics, train_words

COMPONENTS = {
    "llm": {"llm.prefill", "llm.decode"},
    "flow": {"flow.conditions", "flow.decoder.estimator"},
    "hifigan": {"hift"},
}
ORIGINAL = {
    "llm": {"llm.text_encoder", "llm.llm"},
    "flow": {"flow.encoder"},
    "hifigan": set(),
}  # for the original's runtime

# what runs and exports keep of the data
VOICES = {f"{name}.safetensors" for name in ("speakers", "speech_tokenizer", "speaker_encoder")}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """The files below a folder, with their size and time of writing."""
    files = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns)
        for path, stat in files.items()
    }


@pytest.fixture(scope="module")
def walked(trained: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained runs, averaged and exported."""
    folder = tmp_path_factory.mktemp("walked")
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    for model in MODELS:
        for words in (["select=best", "num=2"], ["select=last", "num=3"]):
            warm("average", f"run_dir=runs/demo/{model}", *words, cwd=folder)
        for form in ("onnx", "jit"):
            warm(
                "export",
                f"run_dir=runs/demo/{model}",
                f"format={form}",
                "latency=false",
                cwd=folder,
            )
    return folder


# prepare ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("prepared")
    words = [
        "corpus.minutes=0.3",
        "family.speech_vocabulary=64",
        "processes=2",
        "shard_size=3",
        "out=data/small",
    ]
    return folder, command("prepare", *words, cwd=folder).stdout


def test_prepare_writes_shards_and_front_ends_and_prints_a_summary(prepared):
    folder, output = prepared
    out = folder / "data/small"
    meta = yaml.safe_load((out / "meta.yaml").read_text())
    counts = f"{meta['utterances']} utterances, {meta['hours']} hours"
    assert f"data/small: {counts}, {len(meta['speakers'])} speakers" in output
    shards = {split: read_list(str(out / f"{split}.list")) for split in ("train", "valid")}
    tables = {split: [pq.read_table(shard) for shard in shards[split]] for split in shards}
    assert all(table.schema.equals(COLUMNS) for split in tables.values() for table in split)
    assert sum(map(len, tables["train"] + tables["valid"])) == meta["utterances"] == 8
    texts = {
        split: {text.as_py() for table in tables[split] for text in table["text"]}
        for split in tables
    }
    assert texts["valid"] and not texts["valid"] & texts["train"]
    tokens = {
        token.as_py() for table in tables["train"] for row in table["speech_token"] for token in row
    }
    assert max(tokens) < 64 and len(tokens) > 32
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "meta.yaml",
        "train.list",
        "valid.list",
        "speech_tokenizer.safetensors",
        "speaker_encoder.safetensors",
        "dropped.tsv",
        "quality.tsv",
        "report.html",
        "report.json",
        "speakers.safetensors",
    }


def test_speech_tokens_and_embeddings_fit_their_audio(prepared):
    for row in pq.read_table(prepared[0] / "data/small/train/00000.parquet").to_pylist():
        with open(prepared[0] / "utt.wav", "wb") as file:
            file.write(row["audio_data"])
        seconds = soundfile.info(str(prepared[0] / "utt.wav")).duration
        assert abs(len(row["speech_token"]) - 50 * seconds) <= 2
        assert len(row["utt_embedding"]) == len(row["spk_embedding"]) == 192


def test_prepared_data_are_left_unchanged(prepared, warm):
    folder, _ = prepared
    before = tree(folder)
    words = [
        "corpus.minutes=0.3",
        "family.speech_vocabulary=64",
        "processes=1",
        "shard_size=3",
        "out=data/small",
    ]
    output = warm("prepare", *words, cwd=folder).stdout
    assert tree(folder) == before and "preparing" not in output


def test_train_prepares_the_demo_by_itself_once_and_shows_it(tmp_path, warm):
    """On a terminal, with a progress bar for the preparation and one for the training."""
    words = ["data=demo", "data.corpus.minutes=0.8", "trainer.steps=2"]
    first = train_words("llm", tmp_path / "data/demo_50hz", *words)
    shown = on_a_terminal([sys.executable, "-m", "cosyexp.train", *first], tmp_path)
    assert "preparing 20 recordings in" in shown and "starting from scratch" in shown
    assert "prepare: 100%" in shown and "2/2" in shown and "loss=" in shown
    before = tree(tmp_path / "data")
    output = warm(
        "train", *train_words("flow", tmp_path / "data/demo_50hz", *words), cwd=tmp_path
    ).stdout
    assert "preparing" not in output
    assert before.items() <= tree(tmp_path / "data").items()


def on_a_terminal(words: list[str], cwd: Path) -> str:
    """What a command shows on a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    child = subprocess.Popen(
        words, cwd=cwd, env=environment(), stdout=theirs, stderr=theirs, stdin=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert child.wait() == 0, shown.decode()
    return shown.decode()


# train --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_run_directory_holds_the_whole_run(model, trained):
    run = trained / "runs/demo" / model
    assert {path.name for path in trained.iterdir()} == {"runs"}
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "logs",
        "metrics.jsonl",
        "overrides.yaml",
        *VOICES,
        "tensorboard",
    }
    assert checkpoints(run) == ["step_00000000", "step_00000002", "step_00000004"]
    assert [path.name for path in (run / "logs").iterdir()] == ["rank_0.log"]
    assert "done at step 4" in (run / "logs/rank_0.log").read_text()


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_names_its_files_and_losses(model, trained):
    trainables = (
        {"hifigan.safetensors", "discriminator.safetensors"}
        if model == "hifigan"
        else {f"{model}.safetensors"}
    )
    found = Checkpoints(trained / "runs/demo" / model).all()
    valid = {
        line["step"]: line["valid/loss"]
        for line in metrics(trained / "runs/demo" / model)
        if "valid/loss" in line
    }
    for checkpoint in found:
        assert set(checkpoint.meta["sha256"]) == {*trainables, "trainer/rank_0.pt"}
        assert checkpoint.corruption() is None
        assert checkpoint.losses["loss"] == valid[checkpoint.step]
        assert {"step", "epoch", "samples", "loss_dict", "tag", "sha256"} <= set(checkpoint.meta)
    assert [checkpoint.meta["tag"] for checkpoint in found] == ["step", "step", "last"]


def test_a_run_keeps_its_config_overrides_and_environment(trained, data):
    run = trained / "runs/demo/llm"
    assert yaml.safe_load((run / "overrides.yaml").read_text()) == train_words(
        "llm", data, "trainer.steps=4"
    )
    text = (run / "config.yaml").read_text()
    config = yaml.safe_load(text)
    assert (
        "${" not in text
        and config["network"]["llm"]["width"] == 16
        and config["data"]["train"] == f"{data}/train.list"
    )
    environment = json.loads((run / "environment.json").read_text())
    assert {"argv", "git", "versions", "host", "cpus", "threads"} <= set(environment)
    assert (
        environment["versions"]["torch"] == torch.__version__.split("+")[0]
        or environment["versions"]["torch"] == torch.__version__
    )


@pytest.mark.parametrize("model", MODELS)
def test_metrics_have_flat_keys_and_the_last_step_logs_and_validates(model, trained):
    lines = [
        json.loads(line)
        for line in (trained / "runs/demo" / model / "metrics.jsonl").read_text().splitlines()
    ]
    trains, valids = (
        [line for line in lines if f"{kind}/loss" in line] for kind in ("train", "valid")
    )
    assert [line["step"] for line in trains] == [1, 2, 3, 4]
    assert [line["step"] for line in valids] == [0, 2, 4]
    wanted = {
        "step",
        "epoch",
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "time/samples_per_second",
    }
    if model == "hifigan":
        wanted |= {
            "train/discriminator_loss",
            "train/discriminator_lr",
            "train/discriminator_grad_norm",
        }
    assert all(wanted <= set(line) for line in trains)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    if model == "llm":
        assert all(0 <= line["valid/acc"] <= 1 for line in valids)


@pytest.mark.parametrize("model", MODELS)
def test_tensorboard_holds_scalars_images_and_audio(model, trained):
    run = trained / "runs/demo" / model
    events = EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "audio": 0}
    ).Reload()
    tags = events.Tags()
    losses = {line["step"]: line["valid/loss"] for line in metrics(run) if "valid/loss" in line}
    assert {
        event.step: pytest.approx(event.value, rel=1e-6) for event in events.Scalars("valid/loss")
    } == losses
    assert {"train/loss", "train/lr", "train/grad_norm"} <= set(tags["scalars"])
    kind, made = {
        "llm": ("", []),
        "flow": ("images", events.Images),
        "hifigan": ("audio", events.Audio),
    }[model]
    if kind:
        names = {tag.split("/")[-1]: tag for tag in tags[kind]}
        assert set(names) == {"real", "generated"}
        assert all([event.step for event in made(tag)] == [0, 2, 4] for tag in names.values())
    if model == "hifigan":
        assert all(
            event.sample_rate == 16000 and event.length_frames == 2048
            for event in made(names["generated"])
        )


def test_a_run_starts_from_the_weights_of_another(trained, data, warm, tmp_path):
    source = trained / "runs/demo/llm"
    output = warm(
        "train",
        *train_words("llm", data, "trainer.steps=1", f"init_from={source}", "run_dir=second"),
        cwd=tmp_path,
    ).stdout
    last = source / "checkpoints/step_00000004/llm.safetensors"
    assert f"second: starting from {last}" in output
    wanted, found = (
        read_tensors(last),
        read_tensors(tmp_path / "second/checkpoints/step_00000000/llm.safetensors"),
    )
    assert wanted.keys() == found.keys() and all(
        torch.equal(wanted[name], found[name]) for name in wanted
    )


def test_a_resumed_run_warns_that_it_ignores_init_from(trained, data, warm, tmp_path):
    words = train_words("llm", data, f"init_from={trained}/runs/demo/llm", "run_dir=run")
    assert "is ignored" not in warm("train", *words, "trainer.steps=1", cwd=tmp_path).stdout
    assert "is ignored" not in warm("train", *words, "trainer.steps=1", cwd=tmp_path).stdout
    assert (
        "init_from=other.pt is ignored"
        in warm("train", *words, "trainer.steps=2", "init_from=other.pt", cwd=tmp_path).stdout
    )


def test_a_run_without_a_checkpoint_accepts_another_config(trained, data, warm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(
        trained / "runs/demo/llm/config.yaml", run / "config.yaml"
    )  # as a run leaves that failed before its first checkpoint
    warm(
        "train", *train_words("llm", data, "trainer.steps=1", "seed=3", "run_dir=run"), cwd=tmp_path
    )
    assert (
        yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
        and (run / "checkpoints/step_00000001").exists()
    )


def test_a_run_starts_from_a_file_of_weights(trained, data, warm, tmp_path):
    weights = read_tensors(trained / "runs/demo/llm/checkpoints/step_00000002/llm.safetensors")
    torch.save({**weights, "epoch": 3, "step": 7}, tmp_path / "llm.pt")
    output = warm(
        "train",
        *train_words("llm", data, "trainer.steps=1", "init_from=llm.pt", "run_dir=run"),
        cwd=tmp_path,
    ).stdout
    found = read_tensors(tmp_path / "run/checkpoints/step_00000000/llm.safetensors")
    assert "starting from llm.pt" in output and all(
        torch.equal(weights[name], found[name]) for name in weights
    )


def test_a_finished_run_has_nothing_left_to_do(trained, data, warm, tmp_path):
    shutil.copytree(trained / "runs/demo/llm/checkpoints", tmp_path / "run/checkpoints")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(trained / "runs/demo/llm" / name, tmp_path / "run" / name)
    before = tree(tmp_path / "run/checkpoints")
    output = warm(
        "train", *train_words("llm", data, "trainer.steps=4", "run_dir=run"), cwd=tmp_path
    ).stdout
    assert "resuming at step 4" in output and "done at step 4" in output
    assert tree(tmp_path / "run/checkpoints") == before
    assert metrics(tmp_path / "run") == metrics(trained / "runs/demo/llm")


# average ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("name", "steps"), [("best2", [2, 4]), ("last3", [0, 2, 4])])
def test_an_average_is_the_mean_of_the_checkpoints_in_its_meta(model, name, steps, walked):
    run = walked / "runs/demo" / model
    meta = yaml.safe_load((run / "averages" / name / "meta.yaml").read_text())
    assert [
        source["step"] for source in meta["sources"]
    ] == steps  # the loss falls, so the last are the best
    assert {path.name for path in (run / "averages" / name).iterdir()} == {
        f"{model}.safetensors",
        "meta.yaml",
    }
    found = read_tensors(run / "averages" / name / f"{model}.safetensors")
    parts = [
        read_tensors(run / f"checkpoints/step_{step:08d}/{model}.safetensors") for step in steps
    ]
    for tensor, tensors in ((found[key], [part[key] for part in parts]) for key in parts[0]):
        wanted = (
            torch.stack(tensors).double().mean(0) if tensor.is_floating_point() else tensors[-1]
        )
        assert torch.allclose(tensor.double(), wanted.double(), rtol=1e-6, atol=1e-7)


def test_average_prints_its_checkpoints(walked, warm):
    output = warm(
        "average", "run_dir=runs/demo/llm", "num=2", "output=elsewhere/llm.safetensors", cwd=walked
    ).stdout.splitlines()
    losses = {
        line["step"]: f"{line['valid/loss']:.4f}"
        for line in metrics(walked / "runs/demo/llm")
        if "valid/loss" in line
    }
    assert [line.split() for line in output] == [
        ["step", "epoch", "loss", "weight"],
        ["2", "0", losses[2], "0.500"],
        ["4", "0", losses[4], "0.500"],
        ["elsewhere/llm.safetensors"],
    ]
    assert (walked / output[-1]).read_bytes() == (
        walked / "runs/demo/llm/averages/best2/llm.safetensors"
    ).read_bytes()


# export -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("form", "suffix"), [("onnx", "onnx"), ("jit", "zip")])
def test_an_export_writes_the_components_and_a_report(model, form, suffix, walked):
    folder = walked / "runs/demo" / model / "exports" / form
    report = json.loads((folder / "report.fp32.json").read_text())
    names = COMPONENTS[model] | (ORIGINAL[model] if form == "jit" else set())
    files = {f"{name}.fp32.{suffix}" for name in names}
    assert {path.name for path in folder.iterdir()} == {
        *files,
        "report.fp32.json",
        f"{model}.yaml",
        *VOICES,
        "MODEL.md",
    }
    assert set(report["components"]) == names
    assert report["weights"] == f"runs/demo/{model}/checkpoints/step_00000004/{model}.safetensors"
    for name, component in report["components"].items():
        assert 0 <= max(component["largest_error"].values()) < 1e-4
        assert component["bytes"] == (folder / f"{name}.fp32.{suffix}").stat().st_size


def test_export_takes_the_newest_run_by_default(walked, warm):
    now = (walked / "runs/demo/llm/checkpoints").stat().st_mtime
    for model in MODELS:
        os.utime(walked / "runs/demo" / model / "checkpoints", (now, now + (model == "llm")))
    output = warm(
        "export", "format=jit", "components=llm.decode", "weights=average", "out=only", cwd=walked
    ).stdout
    assert (
        "the newest run, runs/demo/llm" in output
        and "exporting runs/demo/llm/averages/last3/llm.safetensors" in output
    )
    assert {path.name for path in (walked / "only").iterdir()} == {
        "llm.decode.fp32.zip",
        "report.fp32.json",
        "llm.yaml",
        *VOICES,
        "MODEL.md",
    }
    table = [
        line.split() for line in output.splitlines() if line.startswith(("component", "llm.decode"))
    ]
    assert table[0] == [
        "component",
        "precision",
        "MB",
        "error",
        "ms",
        "at",
        "200",
        "ms",
        "at",
        "500",
        "ms",
        "at",
        "1000",
    ]
    assert (
        table[1][:3] == ["llm.decode", "fp32", "0.1"]
        and float(table[1][3]) < 1e-4
        and len(table[1]) == 13
    )


def test_exports_synthesize_without_their_runs(walked, warm, tmp_path):
    """The wave is that of the trained weights."""
    for model in MODELS:
        shutil.copytree(walked / "runs/demo" / model / "exports/onnx", tmp_path / model)
    warm(
        "synthesize",
        "text=hello",
        "backend=onnx",
        f"exports={','.join(MODELS)}",
        "out=exported.wav",
        cwd=tmp_path,
    )
    warm("synthesize", "text=hello", *RUNS, f"out={tmp_path}/trained.wav", cwd=walked)
    found, wanted = (
        samples((tmp_path / f"{name}.wav").read_bytes()) / 32768 for name in ("exported", "trained")
    )
    assert len(found) == len(wanted) and abs(found - wanted).max() < 1e-3 < abs(wanted).max()


def test_a_folder_with_exports_of_all_models_synthesizes(walked, warm, tmp_path):
    (tmp_path / "voice").mkdir()
    for model in MODELS:
        shutil.copytree(
            walked / "runs/demo" / model / "exports/onnx", tmp_path / "voice", dirs_exist_ok=True
        )
    warm("synthesize", "text=hello", "backend=onnx", "exports=voice", cwd=tmp_path)
    assert samples((tmp_path / "out.wav").read_bytes()).any()


# synthesize ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def say(walked: Path, warm: Warm) -> Callable[..., bytes]:
    """Synthesizes, and returns the bytes of the WAV file."""

    def say(*words: str) -> bytes:
        output = warm(
            "synthesize", "text=hello, you!", *RUNS, "out=wavs/it.wav", *words, cwd=walked
        ).stdout
        content = (walked / "wavs/it.wav").read_bytes()
        info = soundfile.info(str(walked / "wavs/it.wav"))
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        expected = f"wavs/it.wav: {info.duration:.2f} s of speech in "
        assert output.splitlines()[-1].startswith(expected)
        return content

    return say


@pytest.fixture(scope="module")
def spoken(say: Callable[..., bytes]) -> bytes:
    return say()


def samples(content: bytes) -> np.ndarray:
    return np.frombuffer(content[44:], np.int16).astype(float)


def test_the_same_seed_gives_the_same_wave(say, spoken):
    assert say("seed=0", "weights=best") == spoken
    assert samples(spoken).any()


def test_another_seed_speaker_or_text_gives_another_wave(say, spoken):
    others = [say("seed=1"), say("speaker=dora"), say("text=good morning")]
    assert len({spoken, *others}) == 4


def test_the_first_speaker_is_the_default(say, spoken):
    assert say("speaker=anna") == spoken


def test_averaged_weights_give_another_wave(say, spoken):
    assert say("weights=average") != spoken


@pytest.mark.parametrize("backend", ["onnx", "jit"])
def test_exported_models_compute_what_pytorch_computes(backend, say, spoken):
    wanted, found = samples(spoken), samples(say(f"backend={backend}"))
    assert len(found) == len(wanted)
    assert np.abs(found - wanted).max() <= max(4, 1e-3 * np.abs(wanted).max())


def test_characters_outside_the_alphabet_are_named(walked, warm):
    output = warm("synthesize", "text=call 23!", *RUNS, "out=wavs/numbers.wav", cwd=walked).stdout
    assert "left out: '2' '3'" in output


def test_text_may_hold_commas_quotes_and_equal_signs(walked, warm):
    output = warm(
        "synthesize", 'text=no, "it\'s" a=b', *RUNS, "out=wavs/odd=name.wav", cwd=walked
    ).stdout
    assert "left out: '\"' '='" in output
    assert (walked / "wavs/odd=name.wav").exists()


def test_a_dollar_in_a_text_is_a_character(walked, warm):
    output = warm(
        "synthesize", "text=the ${red} door", *RUNS, "out=wavs/dollar.wav", cwd=walked
    ).stdout
    assert "left out: '$' '{' '}'" in output
