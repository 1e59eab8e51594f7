"""Exports by the command: formats and precisions, official files, damage, and refusals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cosyexp.run.tensors import read_tensors, save_tensors
from tests.apps.test_families import words
from tests.support import TINY, contents, environment, sentence

QUICK = "latency=false"
SIZES = ",".join(word for word in TINY["hifigan"] if word.startswith("network."))


def test_every_combination_is_exported_and_repeating_changes_nothing(runs, warm, tmp_path):
    folder = runs / "llm/exports"
    warm(
        "export",
        "-m",
        "run_dir=runs/demo/llm",
        "format=onnx,jit",
        "precision=fp32,fp16",
        QUICK,
        cwd=tmp_path,
    )
    ours, original = {"llm.prefill", "llm.decode"}, {"llm.text_encoder", "llm.llm"}
    voices = {f"{name}.safetensors" for name in ("speakers", "speech_tokenizer", "speaker_encoder")}
    reports = {f"report.{precision}.json" for precision in ("fp32", "fp16")}
    common = {"llm.yaml", *voices, "MODEL.md", *reports}
    files = {
        "onnx": {f"{name}.{precision}.onnx" for name in ours for precision in ("fp32", "fp16")}
    }
    files["jit"] = {f"{name}.fp32.zip" for name in ours | original} | {
        f"{name}.fp16.zip" for name in original
    }
    for form, names in files.items():
        assert {path.name for path in (folder / form).iterdir()} == names | common
    before = contents(folder)
    warm(
        "export", "run_dir=runs/demo/llm", "format=jit", "precision=fp32,fp16", QUICK, cwd=tmp_path
    )
    warm("export", "run_dir=runs/demo/llm", "components=llm.decode", QUICK, cwd=tmp_path)
    assert contents(folder) == before


def test_an_fp16_export_synthesizes(runs, warm, tmp_path):
    for model in ("llm", "flow", "hifigan"):
        warm(
            "export",
            f"run_dir=runs/demo/{model}",
            "precision=fp16",
            "out=voice",
            QUICK,
            cwd=tmp_path,
        )
    warm(
        "synthesize", "text=hello", "backend=onnx", "precision=fp16", "exports=voice", cwd=tmp_path
    )
    assert (tmp_path / "out.wav").stat().st_size > 1000


def test_exports_of_someone_else_run_only_if_the_user_says_so(runs, warm, refused, tmp_path):
    for model in ("llm", "flow", "hifigan"):
        words = [f"run_dir=runs/demo/{model}", "format=jit", "out=voice", QUICK]
        warm("export", *words, cwd=tmp_path)
    say = ["text=hello", "backend=jit", "exports=voice"]
    other = {"XDG_STATE_HOME": str(tmp_path / "other")}
    refusal = sentence(warm("synthesize", *say, cwd=tmp_path, check=False, env=other))
    assert "is a program that no export of yours wrote" in refusal
    assert not (tmp_path / "out.wav").exists() and not (tmp_path / "other").exists()
    warm("synthesize", *say, "trusted_exports=true", "out=a.wav", cwd=tmp_path, env=other)
    warm("synthesize", *say, "out=b.wav", cwd=tmp_path)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    flip(tmp_path / "voice/hift.fp32.zip")
    for words in ([], ["trusted_exports=true"]):
        refused("synthesize", [*say, *words], "voice/hift.fp32.zip has changed since it was")


def test_an_official_file_is_exported_without_a_run(runs, warm, tmp_path):
    warm("export", "run_dir=runs/demo/hifigan", "format=official", "out=official", cwd=tmp_path)
    warm("export", "run_dir=runs/demo/hifigan", "format=jit", QUICK, cwd=tmp_path)
    output = warm(
        "export",
        "official=demo",
        "weights=official/hift.pt",
        f"settings={SIZES}",
        "format=jit",
        "out=voice",
        QUICK,
        cwd=tmp_path,
    )
    assert "exporting official/hift.pt" in output.stdout
    assert {path.name for path in (tmp_path / "voice").iterdir()} == {
        "hift.fp32.zip",
        "hifigan.yaml",
        "report.fp32.json",
        "MODEL.md",
    }
    assert (tmp_path / "voice/hift.fp32.zip").read_bytes() == (
        runs / "hifigan/exports/jit/hift.fp32.zip"
    ).read_bytes()


def test_a_killed_export_leaves_the_earlier_one(runs, warm, tmp_path):
    order = ["run_dir=runs/demo/llm", "format=jit", QUICK]
    warm("export", *order, cwd=tmp_path)
    folder = runs / "llm/exports/jit"
    before, part = contents(folder), folder / ".llm.fp32.part"
    child = subprocess.Popen(
        [sys.executable, "-m", "cosyexp.export", *order],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not part.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert part.exists() and before.items() <= contents(folder).items()
    warm("export", *order, cwd=tmp_path)
    assert contents(folder) == before


def flip(path: Path, at: int = -100) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_byte_is_noticed(runs, warm, refused, tmp_path):
    warm("average", "run_dir=runs/demo/llm", "num=2", cwd=tmp_path)
    flip(next(runs.glob("llm/averages/*/llm.safetensors")))
    refused(
        "export",
        ["run_dir=runs/demo/llm", "format=jit", "weights=average"],
        "llm.safetensors does not match its checksum",
    )
    flip(runs / "llm/checkpoints/step_00000004/llm.safetensors")
    output = warm(
        "export", "run_dir=runs/demo/llm", "format=jit", "weights=last", QUICK, cwd=tmp_path
    ).stdout
    assert (
        "step_00000004 is skipped" in output
        and "exporting runs/demo/llm/checkpoints/step_00000002/llm.safetensors" in output
    )


@pytest.mark.parametrize("form", ["official", "jit"])
def test_weights_that_are_not_finite_are_refused(runs, refused, tmp_path, form):
    tensors = {
        name: tensor.clone()
        for name, tensor in read_tensors(
            runs / "llm/checkpoints/step_00000004/llm.safetensors"
        ).items()
    }
    tensors["llm_decoder.bias"][0] = torch.nan
    save_tensors(tmp_path / "nan.safetensors", tensors)
    refused(
        "export",
        ["run_dir=runs/demo/llm", f"format={form}", "weights=nan.safetensors"],
        "not finite as float32 (in llm_decoder.bias)",
    )


REFUSED = {
    "no file": (
        ["official=demo", "weights=flow.pt", "out=voice"],
        ["weights=flow.pt is not a file"],
    ),
    "no folder": (["official=demo", "weights=hift.pt"], ["out=<folder>"]),
    "unknown file name": (
        ["official=demo", "weights=best.pt", "out=voice"],
        ["best.pt", "model=flow|hifigan|llm"],
    ),
    "no such family": (
        ["official=demi", "weights=hift.pt", "out=voice"],
        ["family/demi", "Available options"],
    ),
    "a run too": (
        ["official=demo", "run_dir=runs/demo/llm", "weights=hift.pt", "out=voice"],
        ["run_dir=runs/demo/llm and official= exclude each other"],
    ),
    "jit in int8": (
        ["run_dir=runs/demo/flow", "format=jit", "precision=int8"],
        ["cannot be exported as format=jit precision=int8"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_exports(case, runs, refused):
    refused("export", REFUSED[case][0], *REFUSED[case][1])


def test_a_run_without_checkpoints(runs, refused):
    for path in (runs / "llm/checkpoints").rglob("meta.yaml"):
        path.unlink()
    assert refused(
        "export", ["run_dir=runs/demo/llm", "format=jit"], "no checkpoint for weights=best"
    )


def test_a_qwen_in_torchscript_is_refused_before_anything_is_made(warm, tmp_path):
    sizes = [word for word in words("cosyvoice2", "llm") if word.startswith("network.")]
    torch.save({"weight": torch.zeros(1)}, tmp_path / "llm.pt")
    order = [
        "official=cosyvoice2",
        "weights=llm.pt",
        f"settings={','.join(sizes)}",
        "format=jit",
        "out=voice",
    ]
    sentence(
        warm("export", *order, cwd=tmp_path, check=False),
        "llm.prefill of llm.pt cannot be exported as format=jit",
        "format=onnx",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["llm.pt"]


@pytest.mark.parametrize(
    ("order", "parts"),
    [
        (
            ["exports=voice", "backend=onnx"],
            ["voice holds no export", "cosyexp.export format=onnx out=voice"],
        ),
        (["exports=voice"], ["exports= excludes runs and backend=torch", "such as onnx"]),
    ],
)
def test_refused_export_folders(order, parts, refused):
    refused("synthesize", ["text=hello", *order], *parts)
