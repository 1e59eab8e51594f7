"""Exported components, each against PyTorch."""

import json
from pathlib import Path

import pytest
import torch
from cosyexp.registry import build
from torch.testing import assert_close

from cosyexp.data.layout import Layout
from cosyexp.errors import UserError
from cosyexp.exporting.components import load_components
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.official import Official
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.source import source_from_run
from cosyexp.exporting.verify import TOLERANCE, eager
from cosyexp.run.tensors import read_tensors
from cosyexp.run.weights import find_weights
from tests.support import MODELS, config
from tests.unit.runs import add, make_run

COMPONENTS = {
    "llm": ["llm.prefill", "llm.decode", "llm.text_encoder", "llm.llm"],
    "flow": ["flow.conditions", "flow.decoder.estimator", "flow.encoder"],
    "hifigan": ["hift"],
}
SMALL = {
    "flow": ["network.estimator.channels=[16]", "network.estimator.mid_blocks=0"]
}  # the ONNX exporter takes its time


def run_of(model, folder, *words):
    """A run with random weights."""
    run = make_run(folder, config(model, Path("data"), "run_dir=unused", *words))
    torch.manual_seed(0)
    add(run, 1, {"loss": 1.0}, build(run.config()["network"]).state_dict())
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {model: run_of(model, tmp_path_factory.mktemp(model)) for model in MODELS}


def export(run, form, weights, precision, names, out):
    return form.export(source_from_run(run, weights), out, precision=precision, names=names)


def components_of(run):
    return load_components(source_from_run(run, "last"))


def assert_same(component, exported, inputs):
    for wanted, found in zip(eager(component, *inputs), exported(*inputs), strict=True):
        assert wanted.shape == found.shape and wanted.dtype == found.dtype
        assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def sizes_and_draw():
    return ((size, torch.Generator().manual_seed(size)) for size in (1, 2, 3, 40))


@pytest.fixture(scope="module", params=MODELS)
def exported(request, runs):
    """Of a model, in TorchScript: the run, and the files."""
    run = runs[request.param]
    return run, Jit().export(source_from_run(run, "best"), run.exports / "jit", timed=True)


def test_all_components_are_exported_with_a_report(exported):
    run, paths = exported
    names = COMPONENTS[run.config()["model"]["name"]]
    assert [path.name for path in paths] == [f"{name}.fp32.zip" for name in names]
    beside = {"report.fp32.json", f"{run.config()['model']['name']}.yaml"}
    assert {path.name for path in paths[0].parent.iterdir()} == {
        *(path.name for path in paths),
        *beside,
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
    text, speech = (
        torch.randint(30, (1, 6), generator=draw),
        torch.randint(500, (1, 5), generator=draw),
    )
    speaker = torch.randn(1, 192, generator=draw)
    logp, cache = prefill(text, speaker)
    found = [logp]
    for token in speech[0]:
        logp, cache = decode(token[None], cache)
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


def test_only_the_components_that_are_asked_for_are_written(runs, tmp_path):
    paths = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    assert [path.name for path in paths] == ["llm.decode.fp32.zip"] and not (
        tmp_path / "llm.prefill.fp32.zip"
    ).exists()
    assert list(json.loads((tmp_path / "report.fp32.json").read_text())["components"]) == [
        "llm.decode"
    ]


def test_an_unknown_component_is_answered_with_the_names(runs, tmp_path):
    with pytest.raises(
        UserError, match=r"has no component llm\.nonsense: it has llm\.prefill, llm\.decode"
    ):
        export(runs["llm"], Jit(), "best", "fp32", ["llm.decode", "llm.nonsense"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_components_is_a_sentence(tmp_path, runs):
    run = make_run(tmp_path, {**runs["llm"].config(), "components": {}})
    add(run, 1)
    with pytest.raises(UserError, match="names no components to export"):
        export(run, Jit(), "last", "fp32", None, tmp_path / "out")


def test_weights_of_another_network_are_refused(tmp_path, runs):
    run = make_run(tmp_path, runs["llm"].config())
    add(run, 1)
    with pytest.raises(UserError, match="do not fit the network"):
        export(run, Jit(), "last", "fp32", None, tmp_path / "out")


def slightly_off(path):
    def run(*inputs):
        return tuple(output + 3e-4 * output.abs().max() for output in Jit().load_(path)(*inputs))

    return run


def not_a_number(path):
    return lambda *inputs: tuple(output * float("nan") for output in Jit().load_(path)(*inputs))


def of_one_size(path):
    def run(*inputs):
        raise RuntimeError("Got invalid dimensions for input")

    return run


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (slightly_off, UserError, r"llm\.decode as jit in fp32 differs from PyTorch by"),
        (not_a_number, UserError, r"llm\.decode as jit in fp32 differs from PyTorch by inf"),
        (of_one_size, Exception, "Got invalid dimensions"),
    ],
)
def test_a_broken_export_is_not_kept_and_the_earlier_one_stays(
    runs, tmp_path, monkeypatch, broken, error, message
):
    (path,) = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    before, report = path.read_bytes(), (tmp_path / "report.fp32.json").read_bytes()
    monkeypatch.setattr(Jit, "load_", Jit.load, raising=False)
    monkeypatch.setattr(Jit, "load", lambda self, path, precision: broken(path))
    with pytest.raises(error, match=message):
        export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    assert path.read_bytes() == before and (tmp_path / "report.fp32.json").read_bytes() == report
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "report.fp32.json", "llm.yaml"}


def a_little_off(path):
    return lambda *inputs: tuple(output + 3e-4 * output for output in Jit().load_(path)(*inputs))


def test_what_rounding_may_do_to_a_network_is_said_and_kept(runs, tmp_path, monkeypatch, said):
    monkeypatch.setattr(Jit, "load_", Jit.load, raising=False)
    monkeypatch.setattr(Jit, "load", lambda self, path, precision: a_little_off(path))
    (path,) = export(runs["llm"], Jit(), "best", "fp32", ["llm.decode"], tmp_path)
    assert (
        path.exists()
        and "llm.decode as jit in fp32 differs from PyTorch by 3.0e-04, above 0.0001, which is more"
        in said.text
    )


def test_exported_weights_have_no_parametrizations(runs):
    component = components_of(runs["hifigan"])["hift"]
    assert not any("parametrizations" in name for name in component.state_dict())
    network = build(runs["hifigan"].config()["network"])
    network.load_state_dict(read_tensors(find_weights(runs["hifigan"], "last")))
    inputs = component.example(9, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(component(*inputs), network.eval()(*inputs)[0], rtol=1e-5, atol=1e-6)


# for the original's own runtime


def test_an_official_file_is_the_network_and_nothing_else(tmp_path, runs):
    run = runs["llm"]
    (path,) = export(run, Official(), "last", "fp32", None, tmp_path)
    assert path == tmp_path / "llm.pt" and {file.name for file in tmp_path.iterdir()} == {
        "llm.pt",
        "report.fp32.json",
    }
    found, network = torch.load(path, weights_only=True), build(run.config()["network"])
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
