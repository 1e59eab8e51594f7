"""Exported components, each against PyTorch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from cosyexp.data.layout import Layout
from cosyexp.errors import UserError
from cosyexp.exporting.components import Component, load_components
from cosyexp.exporting.export import Format
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.official import Official
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.source import source_from_run
from cosyexp.exporting.verify import TOLERANCE, Function, eager
from cosyexp.registry import build
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import read_tensors
from cosyexp.run.weights import find_weights
from tests.support import MODELS, config
from tests.unit.runs import add, changed, make_run

COMPONENTS = {
    "llm": ["llm.prefill", "llm.decode", "llm.text_encoder", "llm.llm"],
    "flow": ["flow.conditions", "flow.decoder.estimator", "flow.encoder"],
    "hifigan": ["hift"],
}
# the ONNX exporter is slow
SMALL = {"flow": ["network.estimator.channels=[16]", "network.estimator.mid_blocks=0"]}


def run_of(model: str, folder: Path, *words: str) -> RunDirectory:
    """Returns a run with random weights."""
    run = make_run(folder, config(model, Path("data"), "run_dir=unused", *words))
    torch.manual_seed(0)
    add(run, 1, {"loss": 1.0}, build(run.config().network, "network").state_dict())
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    """A run of each model."""
    return {model: run_of(model, tmp_path_factory.mktemp(model)) for model in MODELS}


def export(
    run: RunDirectory,
    form: Format,
    weights: str,
    precision: str,
    names: Sequence[str] | None,
    out: Path,
) -> list[Path]:
    """Exports components of a run, and returns the files."""
    return form.export(source_from_run(run, weights), out, precision=precision, names=names)


def components_of(run: RunDirectory) -> dict[str, Any]:
    """Returns the components with the last weights of a run."""
    return load_components(source_from_run(run, "last"))


def assert_same(component: Component, exported: Function, inputs: Sequence[Tensor]) -> None:
    """Asserts that both compute the same outputs."""
    for wanted, found in zip(eager(component, *inputs), exported(*inputs), strict=True):
        assert wanted.shape == found.shape and wanted.dtype == found.dtype
        assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def sizes_and_draw() -> Iterator[tuple[int, torch.Generator]]:
    """Yields sizes of inputs, and generators for them."""
    return ((size, torch.Generator().manual_seed(size)) for size in (1, 2, 3, 40))


@pytest.fixture(scope="module", params=MODELS)
def exported(
    request: pytest.FixtureRequest, runs: dict[str, RunDirectory]
) -> tuple[RunDirectory, list[Path]]:
    """A run, and the files of its export as TorchScript."""
    run = runs[request.param]
    return run, Jit().export(source_from_run(run, "best"), run.exports / "jit", timed=True)


def test_all_components_are_exported_with_a_report(exported):
    run, paths = exported
    model = run.config().model.name
    names = COMPONENTS[model]
    assert [path.name for path in paths] == [f"{name}.fp32.zip" for name in names]
    assert {path.name for path in paths[0].parent.iterdir()} == {
        *(path.name for path in paths),
        "report.fp32.json",
        f"{model}.yaml",
    }
    report = json.loads((paths[0].parent / "report.fp32.json").read_text())
    assert (
        report["weights"] == str(find_weights(run, "best")) and list(report["components"]) == names
    )
    for path, found in zip(paths, report["components"].values(), strict=True):
        assert found["bytes"] == path.stat().st_size
        assert found["largest_error"] and all(
            0 <= error < 1e-4 for error in found["largest_error"].values()
        )
        assert (
            len({(entry["size"] % 2, entry["batch"]) for entry in found["inputs"]}) == 4
            and len(found["inputs"]) == 10
        )
        assert all(
            16 <= entry["size"] <= 512 and entry["error"] < 1e-4 for entry in found["inputs"]
        )
        assert list(found["milliseconds"]) == ["200", "500", "1000"]
        assert all(time > 0 for at in found["milliseconds"].values() for time in at.values())


def test_torchscript_computes_the_same_at_any_size(exported):
    run, paths = exported
    for component, path in zip(components_of(run).values(), paths, strict=True):
        for size, draw in sizes_and_draw():
            assert_same(component, Jit().load(path), component.example(size, draw))


@pytest.mark.parametrize("name", ["llm.decode", "flow.decoder.estimator"])
def test_onnx_computes_the_same_at_any_size(tmp_path, name):
    model, out = name.split(".")[0], tmp_path / "out"
    run = run_of(model, tmp_path / "run", *SMALL.get(model, []))
    (path,) = export(run, Onnx(opset=18), "last", "fp32", [name], out)
    assert path == out / f"{name}.fp32.onnx" and {file.name for file in out.iterdir()} == {
        path.name,
        "report.fp32.json",
        f"{model}.yaml",
    }
    component, form = components_of(run)[name], Onnx(opset=18).load(path)
    for size, draw in sizes_and_draw():
        inputs = component.example(size, draw)
        assert_same(component, form, inputs)
        if name == "flow.decoder.estimator":  # a batch of any size
            for batch in (1, 3):
                assert_same(
                    component, form, [x[:1].repeat_interleave(batch, dim=0) for x in inputs]
                )


@torch.no_grad()
def test_the_exported_language_model_decodes_what_the_network_does(runs):
    run = runs["llm"]
    paths = export(
        run, Jit(), "last", "fp32", ["llm.prefill", "llm.decode"], run.exports / "decode"
    )
    prefill, decode = (Jit().load(path) for path in paths)
    network = components_of(run)["llm.prefill"].network
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(30, (1, 6), generator=draw)
    speech = torch.randint(500, (1, 5), generator=draw)
    speaker = torch.randn(1, 192, generator=draw)
    nothing = torch.zeros(1, 1, dtype=torch.long), torch.tensor([0])
    logp, cache, start = prefill(text, torch.tensor([6]), *nothing, speaker)
    found = [logp]
    for token in speech[0]:
        logp, cache = decode(token[None], cache, start)
        found.append(logp)
    order, answer, _ = map(
        torch.from_numpy,
        Layout(speaker=True, vocabulary=512)(6, speech[0].numpy(), 0, False, (6, 5)),
    )
    wanted = network(
        text,
        torch.tensor([6]),
        speech,
        speaker,
        order[None],
        torch.tensor([len(order)]),
        answer[None],
    )
    assert_close(torch.cat(found), wanted[0].log_softmax(-1), rtol=0, atol=1e-4)
    # a prompt of speech tokens
    logp, _, start = prefill(text, torch.tensor([6]), speech, torch.tensor([4]), speaker)
    assert start.tolist() == [1]
    assert_close(logp, found[4], rtol=0, atol=1e-4)


def test_only_the_components_that_are_asked_for_are_written(runs, tmp_path):
    paths = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    assert [path.name for path in paths] == ["llm.decode.fp32.zip"] and not (
        tmp_path / "llm.prefill.fp32.zip"
    ).exists()
    assert list(json.loads((tmp_path / "report.fp32.json").read_text())["components"]) == [
        "llm.decode"
    ]


def test_the_error_of_an_unknown_component_lists_the_names(runs, tmp_path):
    with pytest.raises(
        UserError, match=r"has no component llm\.nonsense: it has llm\.prefill, llm\.decode"
    ):
        export(runs["llm"], Jit(), "best", "fp32", ["llm.decode", "llm.nonsense"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_components_cannot_be_exported(tmp_path, runs):
    run = make_run(tmp_path, changed(runs["llm"].config(), components={}))
    add(run, 1)
    with pytest.raises(UserError, match="lists no components to export: see its network's YAML"):
        export(run, Jit(), "last", "fp32", None, tmp_path / "out")


def test_weights_of_another_network_are_refused(tmp_path, runs):
    run = make_run(tmp_path, runs["llm"].config())
    add(run, 1)
    with pytest.raises(UserError, match="do not fit the network"):
        export(run, Jit(), "last", "fp32", None, tmp_path / "out")


LOAD = Jit.load  # the tests replace it


def with_offset(path: Path) -> Function:
    """Loads a file whose outputs are all too large."""
    return lambda *inputs: tuple(y + 3e-4 * y.abs().max() for y in LOAD(Jit(), path)(*inputs))


def with_nan(path: Path) -> Function:
    """Loads a file whose outputs are NaN."""
    return lambda *inputs: tuple(y * float("nan") for y in LOAD(Jit(), path)(*inputs))


def with_rounding(path: Path) -> Function:
    """Loads a file whose outputs have a small relative error."""
    return lambda *inputs: tuple(y + 3e-4 * y for y in LOAD(Jit(), path)(*inputs))


def of_one_size(path: Path) -> Function:
    """Loads a file that takes no inputs of other sizes."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("Got invalid dimensions for input")

    return run


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (with_offset, UserError, r"llm\.decode as jit in fp32 differs from PyTorch by .*not kept"),
        (with_nan, UserError, r"llm\.decode as jit in fp32 differs from PyTorch by inf.*not kept"),
        (of_one_size, RuntimeError, "Got invalid dimensions"),
    ],
)
def test_a_broken_export_is_not_kept_and_the_earlier_one_stays(
    runs, tmp_path, monkeypatch, broken, error, message
):
    (path,) = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    before, report = path.read_bytes(), (tmp_path / "report.fp32.json").read_bytes()
    monkeypatch.setattr(Jit, "load", lambda self, path, *args: broken(path))
    with pytest.raises(error, match=message):
        export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    assert path.read_bytes() == before and (tmp_path / "report.fp32.json").read_bytes() == report
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "report.fp32.json", "llm.yaml"}


def test_an_export_with_rounding_errors_is_kept_with_a_warning(runs, tmp_path, monkeypatch, said):
    monkeypatch.setattr(Jit, "load", lambda self, path, *args: with_rounding(path))
    (path,) = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    message = "llm.decode as jit in fp32 differs from PyTorch by 3.0e-04, more than 0.0001"
    assert path.exists() and f"{message}, which is unusual: listen to it" in said.text


def test_exported_weights_have_no_parametrizations(runs):
    component = components_of(runs["hifigan"])["hift"]
    assert not any("parametrizations" in name for name in component.state_dict())
    network = build(runs["hifigan"].config().network, "network")
    network.load_state_dict(read_tensors(find_weights(runs["hifigan"], "last")))
    inputs = component.example(9, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(component(*inputs), network.eval()(*inputs)[0], rtol=1e-5, atol=1e-6)


# for the runtime of the original


def test_an_official_file_is_the_network_and_nothing_else(tmp_path, runs):
    run = runs["llm"]
    (path,) = export(run, Official(), "last", "fp32", None, tmp_path)
    assert path == tmp_path / "llm.pt" and {file.name for file in tmp_path.iterdir()} == {
        "llm.pt",
        "report.fp32.json",
    }
    found, network = torch.load(path, weights_only=True), build(run.config().network, "network")
    assert type(found) is dict and list(found) == list(network.state_dict())
    network.load_state_dict(found, strict=True)
    wanted = read_tensors(find_weights(run, "last"))
    assert all(
        torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype
        for name in wanted
    )


def test_an_official_file_has_no_components(tmp_path, runs):
    with pytest.raises(UserError, match="leave components= out"):
        export(runs["llm"], Official(), "last", "fp32", ["llm.decode"], tmp_path)
    assert not list(tmp_path.iterdir())
