"""A wrong run directory, or a wrong setting for one, gets one sentence; no file is changed."""

import subprocess
import sys
import time

import pytest
import yaml

from tests.support import RUNS, environment, metrics, sentence, train_words


@pytest.mark.parametrize(
    ("model", "words", "parts"),
    [
        ("llm", ["optimizer.lr=1"], ["optimizer.lr=0.002, not 1"]),
        ("llm", ["seed=1"], ["seed=0, not 1"]),
        ("flow", [], ["model.name=llm, not flow"]),
    ],
    ids=["learning rate", "seed", "model"],
)
def test_a_run_directory_of_another_config(model, words, parts, refused, runs, data):
    words = train_words(model, data, "trainer.steps=4", "run_dir=runs/demo/llm", *words)
    refused(
        "train",
        words,
        "runs/demo/llm was begun with",
        *parts,
        "repeat the old value",
        "another run_dir=",
    )


@pytest.mark.parametrize("path", ["file", "file/run"])
def test_a_run_directory_that_is_a_file(path, refused, data, tmp_path):
    (tmp_path / "file").write_text("precious")
    refused("train", train_words("llm", data, "trainer.steps=1", f"run_dir={path}"), "file")


def test_two_trainings_in_one_run_directory(warm, data, tmp_path):
    words = train_words(
        "llm",
        data,
        "trainer.steps=100000",
        "trainer.valid_every=0",
        "checkpoint.every=0",
        "run_dir=run",
    )
    first = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.train", *words],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.05)
    result = warm("train", *words, cwd=tmp_path, check=False)
    assert result.stderr.strip() == sentence(
        result, "another process is training in run", "another run_dir="
    )
    first.terminate()
    assert first.stderr is not None
    assert (first.wait(60), first.stderr.read()) == (0, "")
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(
        range(1, len(metrics(tmp_path / "run")) + 1)
    )


CONTENTS = {"no YAML": b"{{{", "empty": b"", "no text": b"\xff\xfe\x00\x80", "another": b"a: 1\n"}
COMMANDS = {
    "train": lambda data: train_words("llm", data, "trainer.steps=4"),
    "average": lambda data: ["run_dir=runs/demo/llm", "num=1"],
    "export": lambda data: ["run_dir=runs/demo/llm", "format=jit"],
    "synthesize": lambda data: ["text=hello", *RUNS],
}


WHERE = [
    *(("average", content) for content in CONTENTS),
    *((app, "another") for app in ("train", "export", "synthesize")),
]


@pytest.mark.parametrize(("app", "content"), WHERE)
def test_an_unreadable_config(app, content, refused, runs, data):
    (runs / "llm/config.yaml").write_bytes(CONTENTS[content])
    refused(app, COMMANDS[app](data), "runs/demo/llm")


@pytest.mark.parametrize("app", ["average", "export", "synthesize"])
def test_a_folder_that_is_no_run(app, refused, runs, data):
    (runs / "llm/config.yaml").unlink()
    refused(
        app,
        COMMANDS[app](data),
        "runs/demo/llm is no" if app == "average" else "runs/demo/llm is not a run directory",
        "name one that cosyexp.train wrote",
    )


@pytest.mark.parametrize("app", ["average", "export", "synthesize"])
def test_checkpoints_that_were_all_cut_short(app, refused, runs, data):
    for path in runs.glob("llm/checkpoints/*/llm.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    what = "readable checkpoint" if app == "average" else "checkpoint for weights=best"
    output = refused(app, COMMANDS[app](data), f"runs/demo/llm has no {what}", "train it further")
    # step 0 is not among the best
    assert output.count("llm.safetensors does not match its checksum") == 2


def test_a_checkpoint_that_was_cut_short_is_not_averaged(warm, runs, tmp_path):
    path = runs / "llm/checkpoints/step_00000004/llm.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    output = warm("average", "run_dir=runs/demo/llm", "select=last", "num=2", cwd=tmp_path).stdout
    assert "step_00000004 is skipped: llm.safetensors does not match its checksum" in output
    meta = yaml.safe_load((runs / "llm/averages/last2/meta.yaml").read_text())
    assert [source["step"] for source in meta["sources"]] == [0, 2]
    warm("average", "run_dir=runs/demo/llm", "num=1", cwd=tmp_path)
    meta = yaml.safe_load((runs / "llm/averages/best1/meta.yaml").read_text())
    assert [source["step"] for source in meta["sources"]] == [2]


# average, export, synthesize ---------------------------------------------------------------------

ON_RUNS = {
    "too few checkpoints": (
        "average",
        ["run_dir=runs/demo/llm", "num=9"],
        ["has 2 such checkpoints, not num=9", "smaller num, or strict=false"],
    ),
    "no checkpoints at all": (
        "average",
        ["run_dir=runs/demo/llm", "num=0"],
        ["num=0 must be >= 1"],
    ),
    "unknown metric": (
        "average",
        ["run_dir=runs/demo/llm", "metric=wer"],
        ["validation wer", "select=last"],
    ),
    "no window": (
        "average",
        ["run_dir=runs/demo/llm", "select=window"],
        ["select=window", "window=[from,to]"],
    ),
    "nothing in the window": (
        "average",
        ["run_dir=runs/demo/llm", "window=[5,9]"],
        ["from step 5 to 9", "its checkpoints are of steps 0 to 4"],
    ),
    "no temperature": (
        "average",
        ["run_dir=runs/demo/llm", "num=2", "method=weighted", "method.temperature=0"],
        ["temperature=0 must be a number > 0"],
    ),
    "no running sums": (
        "average",
        ["run_dir=runs/demo/llm", "method=running"],
        ["sum.safetensors", "trainer.running_sum=true"],
    ),
    "no running means": (
        "average",
        ["run_dir=runs/demo/llm", "select=ema"],
        ["ema.safetensors", "trainer.ema="],
    ),
    "two kinds of means": (
        "average",
        ["run_dir=runs/demo/llm", "select=ema", "method=running"],
        ["select=ema", "method=running"],
    ),
    "output of another kind": (
        "average",
        ["run_dir=runs/demo/llm", "num=1", "output=a.bin"],
        ["output=a.bin", ".pt or .safetensors"],
    ),
    "output is a folder": ("average", ["run_dir=runs/demo/llm", "num=1", "output=runs"], ["runs"]),
    "output below a file": (
        "average",
        ["run_dir=runs/demo/llm", "num=1", "output=runs/demo/llm/config.yaml/x"],
        ["config.yaml"],
    ),
    "unknown component": (
        "export",
        ["run_dir=runs/demo/llm", "components=llm.prefil"],
        ["no component llm.prefil", "it has llm.prefill, llm.decode"],
    ),
    "unknown weights": (
        "export",
        ["run_dir=runs/demo/llm", "weights=worst"],
        ["weights=worst", "best, last, ema, average"],
    ),
    "no average yet": (
        "export",
        ["run_dir=runs/demo/llm", "weights=average"],
        ["no average yet", "cosyexp.average run_dir=runs/demo/llm"],
    ),
    "weights of another model": (
        "export",
        [
            "run_dir=runs/demo/llm",
            "weights=runs/demo/flow/checkpoints/step_00000000/flow.safetensors",
        ],
        ["flow.safetensors do not fit", "missing", "unknown"],
    ),
    "out is a file": (
        "export",
        ["run_dir=runs/demo/llm", "format=jit", "out=runs/demo/llm/config.yaml"],
        ["config.yaml"],
    ),
    "runs swapped": (
        "synthesize",
        ["text=hello", "llm=runs/demo/flow", "flow=runs/demo/llm", RUNS[2]],
        ["runs/demo/flow is a run of flow", "one of llm as llm="],
    ),
    "no text": ("synthesize", ["text=", *RUNS], ["text='' has no character that the model knows"]),
    "text outside the alphabet": (
        "synthesize",
        ["text=你好42", *RUNS],
        ["text='你好42' has no character that the model knows", "give another text"],
    ),
    "unknown speaker": (
        "synthesize",
        ["text=hello", *RUNS, "speaker=bob"],
        ["no speaker bob", "anna, ben, carl, dora"],
    ),
    "nothing exported": (
        "synthesize",
        ["text=hello", *RUNS, "backend=onnx"],
        [
            "there is no export runs/demo/llm/exports/onnx",
            "cosyexp.export run_dir=runs/demo/llm format=onnx",
        ],
    ),
    "unknown backend": (
        "synthesize",
        ["text=hello", *RUNS, "backend=tvm"],
        ["there is no export runs/demo/llm/exports/tvm", "format=tvm"],
    ),
    "wav is a folder": ("synthesize", ["text=hello", *RUNS, "out=runs"], ["runs"]),
    "weights to start from are missing": ("train", ["init_from=nowhere.pt"], ["nowhere.pt"]),
    "weights to start from are another model's": (
        "train",
        ["init_from=runs/demo/flow"],
        ["flow.safetensors do not fit"],
    ),
}


@pytest.mark.parametrize("case", ON_RUNS)
def test_refused_settings_for_runs(case, refused, runs, data):
    app, words, parts = ON_RUNS[case]
    refused(
        app, train_words("llm", data, "run_dir=new", *words) if app == "train" else words, *parts
    )


def test_a_run_without_speakers(refused, runs):
    for model in ("llm", "flow"):
        (runs / model / "speakers.safetensors").unlink()
    refused("synthesize", ["text=hello", *RUNS], "has speakers", "data.speakers=")


@pytest.mark.parametrize("name", ["speakers.safetensors", "exports/jit/llm.decode.fp32.zip"])
def test_a_file_of_a_run_that_is_damaged(name, refused, runs, warm, tmp_path):
    if name.startswith("exports"):
        warm("export", "run_dir=runs/demo/llm", "format=jit", cwd=tmp_path)
    (runs / "llm" / name).write_text("nonsense")
    refused(
        "synthesize",
        ["text=hello", *RUNS, "backend=jit" if "jit" in name else "backend=torch"],
        name,
    )


def test_a_run_cannot_name_foreign_code(refused, runs):
    config = runs / "llm/config.yaml"
    config.write_text(
        config.read_text().replace("cosyexp.models.llm.transformer_lm.TransformerLM", "os.system")
    )
    parts = ["os.system is not a registered network", "trusted=[os]"]
    refused("export", ["run_dir=runs/demo/llm", "format=jit"], *parts)
    refused("average", ["run_dir=runs/demo/llm", "num=2", "method=greedy"], *parts)


def test_a_run_cannot_set_what_is_trusted(refused, runs):
    config = runs / "llm/config.yaml"
    network = "cosyexp.models.llm.transformer_lm.TransformerLM"
    config.write_text(config.read_text().replace(network, "os.system") + "trusted: [os]\n")
    refused("export", ["run_dir=runs/demo/llm", "format=jit"], "os.system is not a registered")


def test_a_run_of_another_version(refused, runs):
    config = runs / "llm/config.yaml"
    assert config.read_text().startswith("format_version: 1\n")
    config.write_text(config.read_text().replace("format_version: 1", "format_version: 2"))
    refused("average", ["run_dir=runs/demo/llm"], "format version 2, this cosyexp reads 1")
