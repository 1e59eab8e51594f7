"""Exported files in other runtimes, and in other precisions.

The runtimes are libtorch, the original's, OpenVINO, and torch.export.
"""

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino  # type: ignore[import-untyped]
import pytest
import torch
from onnx import TensorProto
from torch.testing import assert_close
from torch.utils import cpp_extension

from cosyexp.cli.compose import compose_train
from cosyexp.device import CPU_PROVIDER
from cosyexp.errors import UserError
from cosyexp.exporting.components import select_components
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx, run_on_cpu, run_on_gpu
from cosyexp.exporting.pt2 import Pt2
from cosyexp.exporting.source import source_from_run
from cosyexp.exporting.verify import TOLERANCES, compare, eager, error
from cosyexp.models.original import OriginalUpsampler
from cosyexp.registry import build
from tests.support import FAMILIES
from tests.unit.test_export import SMALL, components_of, run_of

FLOW2 = [f"network.{word}" for word in FAMILIES["cosyvoice2"]["flow"]]
WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


@pytest.fixture(scope="module")
def components(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The components of all models, with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    # the llm is wide enough for int8 weights to be smaller with their scales
    sizes: dict[str, list[str]]
    sizes = {"llm": ["network.llm.width=64"], "flow": SMALL["flow"], "hifigan": []}
    return {
        name: part
        for model in sizes
        for name, part in components_of(run_of(model, folder / model, *sizes[model])).items()
    }


# TorchScript


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/unit/libtorch.cpp, compiled against the installed torch."""
    path = tmp_path_factory.mktemp("program") / "libtorch"
    includes, libraries = cpp_extension.include_paths(), cpp_extension.library_paths()
    words = [
        "g++",
        "-std=c++20",
        "-O0",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    words += [
        str(Path(__file__).with_name("libtorch.cpp")),
        "-o",
        str(path),
        *(f"-I{folder}" for folder in includes),
    ]
    words += [word for folder in libraries for word in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    subprocess.run([*words, "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"], check=True)
    return path


def test_an_exported_language_model_runs_in_cpp(components, program, tmp_path):
    component, length = components["llm.llm"], 7
    width = component.encoder.in_width
    Jit().write(component, tmp_path / "llm.zip")
    subprocess.run(
        [program, tmp_path / "llm.zip", str(length), str(width), tmp_path / "found"], check=True
    )
    found = torch.from_numpy(np.fromfile(tmp_path / "found", np.float32)).view(2, length, -1)
    xs = torch.arange(length * width, dtype=torch.float32).sin().view(1, length, width)
    wanted = eager(component, xs, torch.tensor([length]))[0]
    assert_close(found, wanted.expand_as(found), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@torch.no_grad()
def test_the_original_s_runtime_calls_a_language_model(components, tmp_path, precision):
    """With its arguments: a prompt without a cache, then position after position."""
    component = components["llm.llm"]
    Jit().write(component, tmp_path / "llm.zip", precision)
    model = torch.jit.load(str(tmp_path / "llm.zip"))
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    xs, _ = component.example(9, torch.Generator().manual_seed(0))
    cache, nothing = torch.zeros(0, 0, 0, 0), torch.zeros(0, 0, 0, 0)
    found = []
    for begin, end in ((0, 5), *((i, i + 1) for i in range(5, 9))):
        seen = torch.tril(torch.ones(1, end - begin, end - begin)).to(torch.bool)
        piece = xs[:, begin:end].to(dtype)
        out, cache, _ = model.forward_chunk(
            piece,
            offset=begin,
            required_cache_size=-1,
            att_cache=cache,
            cnn_cache=nothing,
            att_mask=seen,
        )
        found.append(out.float())
    assert cache.shape[2] == 9 and cache.dtype == dtype
    wanted = eager(component, xs, torch.tensor([9]))[0]
    assert error(wanted, torch.cat(found, dim=1), precision) < TOLERANCES[precision]
    assert model.forward_chunk(xs[:, :1].to(dtype), 9, 4, cache, nothing)[1].shape[2] == 4
    rows = model(
        xs.to(dtype), torch.tensor([9]), decoding_chunk_size=1, num_decoding_left_chunks=-1
    )[0].float()
    assert error(wanted, rows, precision) < TOLERANCES[precision]


@torch.no_grad()
def test_the_original_s_runtime_calls_an_upsampling_encoder(tmp_path):
    """With the look-ahead as an argument of its own, or, at the end, without it."""
    from cosyexp.models.flow.upsampling import UpsamplingEncoder

    net = torch.nn.Module()
    net.encoder = UpsamplingEncoder(
        width=16, heads=2, hidden=32, blocks=1, up_blocks=1, factor=2, look_ahead=3, chunk=5
    )
    component: Any = OriginalUpsampler(net.eval(), "encoder").eval()
    Jit().write(component, tmp_path / "encoder.zip")
    encoder, xs = torch.jit.load(str(tmp_path / "encoder.zip")), torch.randn(1, 20, 16)
    whole, mask = encoder(xs, torch.tensor([20]), streaming=True)
    assert whole.shape == (1, 40, 16) and mask.shape == (1, 1, 40) and mask.all()
    begun, _ = encoder(xs[:, :10], torch.tensor([10]), context=xs[:, 10:13], streaming=True)
    assert_close(begun, whole[:, :20], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(
        encoder(xs[:, :10], torch.tensor([10]), streaming=True)[0], begun, atol=1e-4
    )


def test_exporting_leaves_torchscript_s_settings_as_they_were(components, tmp_path):
    def settings():
        fusion = torch.jit.set_fusion_strategy([("DYNAMIC", 7)])
        modes = torch._C._jit_set_profiling_mode(True), torch._C._jit_set_profiling_executor(True)
        return fusion, modes

    settings()
    Jit().write(components["flow.encoder"], tmp_path / "file.zip")
    assert settings() == ([("DYNAMIC", 7)], (True, True))


def test_a_precision_that_a_format_lacks_is_refused_before_anything_is_written(tmp_path):
    source = source_from_run(run_of("hifigan", tmp_path / "run"), "last")
    with pytest.raises(
        UserError,
        match=r"hift of .* cannot be exported as format=jit precision=fp16.*: give precision=fp32",
    ):
        Jit().export(source, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()
    llm = source_from_run(run_of("llm", tmp_path / "llm"), "last")
    selected = select_components(llm, None, "jit", "fp16", Jit.precisions)
    assert selected == ["llm.text_encoder", "llm.llm"]


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("llm.llm", "onnx", r"format=onnx precision=fp32: give format=jit$"),
        ("flow.encoder", "pt2", r"format=pt2 precision=fp32: give format=jit$"),
    ],
)
def test_the_formats_of_a_component_are_named_if_it_is_not_for_another(
    tmp_path, name, form, message
):
    source = source_from_run(run_of(name.split(".")[0], tmp_path / "run"), "last")
    with pytest.raises(UserError, match=rf"{name} of .* cannot be exported as {message}"):
        select_components(source, [name], form, "fp32", ("fp32",))
    assert name not in select_components(source, None, form, "fp32", ("fp32",))


# ONNX


@pytest.fixture(scope="module")
def files(
    components: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Writes a component as ONNX in a precision, once, and returns the file."""
    folder, form = tmp_path_factory.mktemp("onnx"), Onnx()
    program = cache(lambda name: form.program(components[name]))  # takes longest

    def write(name: str, precision: str) -> Path:
        path = folder / form.file(name, precision)
        if not path.exists():
            form.save(program(name), components[name], path, precision)
        return path

    return write


# of each input and output, the names of its dynamic axes
AXES = {
    "llm.prefill": {
        "text": {0: "batch", 1: "text_len"},
        "text_lens": {0: "batch"},
        "speech": {0: "batch", 1: "speech_len"},
        "speech_lens": {0: "batch"},
        "speaker": {0: "batch"},
        "logp": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
        "start": {0: "batch"},
    },
    "llm.decode": {
        "token": {0: "batch"},
        "cache": {1: "batch", 3: "past_len"},
        "start": {0: "batch"},
        "logp": {0: "batch"},
        "new_cache": {1: "batch", 3: "past_len + 1"},
    },
    "flow.conditions": {
        "token": {0: "batch", 1: "token_len"},
        "speaker": {0: "batch"},
        "noise": {0: "batch", 2: "frames"},
        "prompt_token_lens": {0: "batch"},
        "prompt_mel_lens": {0: "batch"},
        "mu": {0: "batch", 2: "frames"},
        "spks": {0: "batch"},
    },
    # the estimator of the original has these names too
    "flow.decoder.estimator": {
        "x": {0: "batch", 2: "seq_len"},
        "mask": {0: "batch", 2: "seq_len"},
        "mu": {0: "batch", 2: "seq_len"},
        "t": {0: "batch"},
        "spks": {0: "batch"},
        "cond": {0: "batch", 2: "seq_len"},
        "estimator_out": {0: "batch", 2: "seq_len"},
    },
    "hift": {
        "mel": {0: "batch", 2: "frames"},
        "phase": {0: "batch"},
        "noise": {0: "batch", 2: "samples"},
        "wave": {0: "batch", 1: "samples"},
    },
}


@pytest.mark.parametrize("precision", Onnx.precisions)
@pytest.mark.parametrize("name", AXES)
def test_the_axes_of_a_file_have_names(files, name, precision):
    graph = onnx.load(files(name, precision)).graph
    found = {
        value.name: {
            i: axis.dim_param
            for i, axis in enumerate(value.type.tensor_type.shape.dim)
            if not axis.HasField("dim_value")
        }
        for value in [*graph.input, *graph.output]
    }
    assert found == AXES[name]


@pytest.mark.parametrize("name", AXES)
def test_a_session_on_tensors_in_place_computes_the_same(files, components, name):
    """What a GPU does with its own memory, on the memory of the CPU."""
    session = onnxruntime.InferenceSession(files(name, "fp32"), providers=[CPU_PROVIDER])
    inputs = components[name].example(20, torch.Generator().manual_seed(0), 2)
    found, wanted = run_on_gpu(session, inputs), run_on_cpu(session, inputs)
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ["llm.decode", "flow.decoder.estimator", "hift"])
def test_half_precision_but_for_norms_softmax_and_angles(components, files, name):
    path = files(name, "fp16")
    measured = compare(components[name], Onnx().load(path, "fp16"), "fp16")
    assert 0 < max(measured["largest_error"].values()) < TOLERANCES["fp16"]
    assert output_types(
        path, {"Softmax", "LayerNormalization", "InstanceNormalization", "CumSum"}
    ) <= {
        TensorProto.FLOAT,
        TensorProto.DOUBLE,
    }
    assert TensorProto.FLOAT16 in output_types(path, WEIGHTED)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    "name", ["llm.prefill", "llm.decode", "flow.conditions", "flow.decoder.estimator", "hift"]
)
def test_files_keep_to_the_standard(files, name, precision):
    onnx.checker.check_model(onnx.load(files(name, precision)), full_check=True)


def output_types(path: Path, kinds: set[str]) -> set[int]:
    """Returns the types of the outputs of some kinds of nodes."""
    graph = onnx.shape_inference.infer_shapes(
        onnx.load(path), check_type=True, strict_mode=True
    ).graph
    types = {
        info.name: info.type.tensor_type.elem_type for info in [*graph.value_info, *graph.output]
    }
    return {
        types[name]
        for node in graph.node
        if node.op_type in kinds
        for name in node.output
        if name in types
    }


def test_a_time_keeps_its_digits_in_half_precision(components, files):
    """Its sines have a thousand times the frequency."""
    component = components["flow.decoder.estimator"]
    exported = Onnx().load(files("flow.decoder.estimator", "fp16"))
    x, mask, mu, t, spks, cond = component.example(50, torch.Generator().manual_seed(0), 2)
    near = t + 1e-4  # less than fp16 tells apart
    inputs = [(x, mask, mu, at, spks, cond) for at in (t, near)]
    wanted, found = (
        [function(*given)[0] for given in inputs]
        for function in (lambda *given: eager(component, *given), exported)
    )
    assert_close(
        found[1] - found[0],
        wanted[1] - wanted[0],
        rtol=0.2,
        atol=float((wanted[1] - wanted[0]).abs().max()) / 2,
    )


def test_weights_of_eight_bits(components, files):
    path, whole = files("llm.decode", "int8"), files("llm.decode", "fp32")
    measured = compare(components["llm.decode"], Onnx().load(path, "int8"), "int8")
    assert 0 < max(measured["largest_error"].values()) < TOLERANCES["int8"]
    kept = [
        sum(tensor.ByteSize() for tensor in onnx.load(file).graph.initializer)
        for file in (path, whole)
    ]
    assert kept[0] < 0.5 * kept[1]


@pytest.mark.parametrize(
    ("name", "precision"), [("llm.decode", "fp32"), ("llm.decode", "int8"), ("hift", "fp32")]
)
def test_exported_files_run_in_openvino(components, files, name, precision):
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(files(name, precision)), "CPU", settings)
    for size, batch in ((16, 1), (51, 2)):
        given = components[name].example(size, torch.Generator().manual_seed(size), batch)
        found = compiled([x.numpy() for x in given])
        for i, wanted in enumerate(eager(components[name], *given)):
            assert error(wanted, torch.from_numpy(found[i]), precision) < TOLERANCES[precision]


# programs of torch.export


@pytest.mark.parametrize("name", ["llm.decode", "flow.decoder.estimator"])
def test_a_program_takes_any_size(components, tmp_path, name):
    Pt2().write(components[name], tmp_path / "program.pt2")
    exported = Pt2().load(tmp_path / "program.pt2")
    assert max(compare(components[name], exported)["largest_error"].values()) < TOLERANCES["fp32"]


def test_a_program_whose_sizes_depend_on_each_other(tmp_path):
    """The v2 encoder makes two frames of a token: in a program there are always as many."""
    words = ["family=cosyvoice2", "model=flow", "tokenizer@family.tokenizer=characters"]
    config = compose_train([*words, *FLOW2])
    torch.manual_seed(0)
    network = build(config.network, "network").requires_grad_(False)
    component = build(config.components["flow.conditions"], "component", network).eval()
    Pt2().write(component, tmp_path / "program.pt2")
    assert (
        max(compare(component, Pt2().load(tmp_path / "program.pt2"))["largest_error"].values())
        < TOLERANCES["fp32"]
    )


def test_a_program_can_be_compiled_for_this_machine(components, tmp_path):
    component, form = components["llm.decode"], Pt2(compile=True)
    form.write(component, tmp_path / "program.pt2")
    compared = compare(component, form.load(tmp_path / "program.pt2"))
    assert max(compared["largest_error"].values()) < TOLERANCES["fp32"]


def test_without_a_compiler_nothing_is_compiled(components, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/gone/g++"))
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler, and there is none"):
        Pt2(compile=True).write(components["llm.decode"], tmp_path / "program.pt2")
    assert not (tmp_path / "program.pt2").exists()
