"""Files of weights: writing, reading, and which one a choice refers to."""

import math
import os
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from cosyexp.errors import UserError
from cosyexp.run.checkpoint import Criterion, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import TensorFile, read_tensors, save_tensors, write_tensors
from cosyexp.run.weights import find_weights, init_weights, load_weights, read_weights, weights_of
from tests.unit.runs import add, cut, make_run, smallest_config

Tensors = dict[str, Tensor]

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def sample(dtype: torch.dtype) -> Tensors:
    """Returns a matrix, a number and an empty tensor, behind one that leaves them unaligned."""
    draw = torch.Generator().manual_seed(0)
    values = [(torch.randn(shape, generator=draw) * 3).to(dtype) for shape in ((3, 5), (), (0, 4))]
    return {
        "byte": torch.tensor([1, 2, 3], dtype=torch.uint8),
        **dict(zip(("matrix", "number", "empty"), values, strict=True)),
    }


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Asserts that names, types and values are the same."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# files


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_safetensors_library_reads_what_we_write(tmp_path, dtype):
    save_tensors(tmp_path / "a.safetensors", sample(dtype))
    assert_equal(load_file(tmp_path / "a.safetensors"), sample(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_we_read_what_the_safetensors_library_writes(tmp_path, dtype):
    save_file(sample(dtype), tmp_path / "a.safetensors")
    assert_equal(read_tensors(tmp_path / "a.safetensors"), sample(dtype))


def test_all_dtypes_live_in_one_file(tmp_path):
    tensors = {
        f"{dtype}.{name}": tensor
        for dtype in DTYPES[::-1]
        for name, tensor in sample(dtype).items()
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert_equal(load_file(tmp_path / "a.safetensors"), tensors)
    assert_equal(read_tensors(tmp_path / "a.safetensors"), tensors)


def test_metadata_is_the_library_s(tmp_path):
    save_tensors(tmp_path / "ours.safetensors", sample(torch.float32), {"made by": "cosyexp ü"})
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "cosyexp ü"}
    save_file(sample(torch.float32), tmp_path / "theirs.safetensors", {"a": "b"})
    with TensorFile(tmp_path / "theirs.safetensors") as file:
        assert file.metadata == {"a": "b"} and sorted(file.keys()) == sorted(sample(torch.float32))


def test_tied_and_strided_tensors_are_written_as_they_look(tmp_path):
    base = nn.Parameter(torch.arange(12.0).reshape(3, 4))
    tensors = {
        "a": base,
        "tied": base,
        "turned": base.t(),
        "sliced": base[:, ::2],
        "wide": base[:1].expand(5, 4),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    assert_equal(
        read_tensors(tmp_path / "a.safetensors"),
        {name: tensor.detach() for name, tensor in tensors.items()},
    )


def test_a_tensor_of_two_names_is_written_once_as_the_library_writes_it(tmp_path):
    """So a large tied embedding takes its place on the disk once."""
    embedding, head = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    head.weight = embedding.weight
    network = nn.ModuleDict({"embedding": embedding, "head": head})
    save_tensors(tmp_path / "ours.safetensors", network.state_dict())
    save_model(network, str(tmp_path / "theirs.safetensors"))
    sizes = [(tmp_path / f"{whose}.safetensors").stat().st_size for whose in ("ours", "theirs")]
    assert abs(sizes[0] - sizes[1]) < 16
    for whose in ("ours", "theirs"):
        assert_equal(read_tensors(tmp_path / f"{whose}.safetensors"), network.state_dict())
    before = head.weight.detach().clone()
    nn.init.zeros_(head.weight)
    load_model(network, str(tmp_path / "ours.safetensors"))
    assert torch.equal(head.weight, before)


def test_one_tensor_is_read_without_the_others(tmp_path):
    save_tensors(tmp_path / "a.safetensors", sample(torch.float16))
    with TensorFile(tmp_path / "a.safetensors") as file:
        assert file.shape("matrix") == (torch.float16, (3, 5))
        assert torch.equal(file["matrix"], sample(torch.float16)["matrix"])


def test_what_is_read_can_be_changed_without_changing_the_file(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(3)})
    with TensorFile(tmp_path / "a.safetensors") as file:
        file["a"].add_(1)
        assert not file["a"].any()


def test_a_tensor_other_than_announced_is_not_written(tmp_path):
    with pytest.raises(AssertionError):
        write_tensors(
            tmp_path / "a.safetensors", {"a": (torch.float32, (2,))}, iter([torch.zeros(3)])
        )


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"weight": torch.randn(5), "bias": torch.randn(2)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"a\.safetensors (is not a valid safetensors file|is truncated)"
        ):
            TensorFile(path)
        with pytest.raises(
            UserError, match=r"a\.safetensors (is not a valid safetensors file|is truncated)"
        ):
            load_weights(nn.Linear(1, 1), path)


# which weights


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with three checkpoints, the second of which is the best."""
    run = make_run(tmp_path / "run")
    for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0)):
        add(run, step, {"loss": loss}, ema={"weight": torch.zeros(4)})
    return run


def add_average(run: RunDirectory, name: str, time: float, **meta: Any) -> None:
    """Adds an average that was written at a time, by default when the run was at step 30."""
    folder = run.averages / name
    folder.mkdir(parents=True)
    save_tensors(folder / "llm.safetensors", {"weight": torch.zeros(4)})
    hashes = {"llm.safetensors": file_hash(folder / "llm.safetensors")}
    about = meta or {"run_step": 30}
    (folder / "meta.yaml").write_text(yaml.safe_dump({**about, "sha256": hashes}))
    os.utime(folder / "meta.yaml", (time, time))


def test_weights_are_found_by_what_they_are_called(run, tmp_path):
    add_average(run, "best2", 2000)
    add_average(run, "last2", 1000)
    save_tensors(tmp_path / "mine.safetensors", {"weight": torch.zeros(4)})
    for choice, place in (
        ("best", "checkpoints/step_00000020/llm"),
        ("last", "checkpoints/step_00000030/llm"),
        ("ema", "checkpoints/step_00000030/ema"),
        ("average", "averages/best2/llm"),
        ("last2", "averages/last2/llm"),
    ):
        assert find_weights(run, choice) == run.path / f"{place}.safetensors", choice
    assert find_weights(run, str(tmp_path / "mine.safetensors")) == tmp_path / "mine.safetensors"


def test_damaged_checkpoints_are_skipped(run):
    for step in (20, 30):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    for choice in ("best", "last", "ema"):
        assert find_weights(RunDirectory(run.path), choice).parent.name == "step_00000010"


def test_a_loss_that_is_not_finite_is_not_the_best(run):
    for step, loss in (
        (5, float("nan")),
        (15, float("nan")),
        (25, float("nan")),
        (40, float("-inf")),
    ):
        add(run, step, {"loss": loss})
    assert find_weights(run, "best").parent.name == "step_00000020"


def test_the_best_is_that_of_the_criterion(tmp_path):
    run = make_run(tmp_path / "run")
    for step, acc in ((10, 0.5), (20, 0.9), (30, 0.1)):
        add(run, step, {"loss": float(step), "acc": acc})
    for criterion, step in (
        (Criterion(), 10),
        (Criterion("loss", "max"), 30),
        (Criterion("acc"), 30),
        (Criterion("acc", "max"), 20),
    ):
        assert find_weights(run, "best", criterion).parent.name == f"step_{step:08d}", criterion
    with pytest.raises(UserError, match="has no checkpoint for weights=best"):
        find_weights(run, "best", Criterion("mse"))


def test_untrained_weights_are_not_the_best_unless_there_are_no_others(tmp_path):
    run = make_run(tmp_path / "run")
    add(run, 0, {"loss": 1.0})
    assert find_weights(run, "best").parent.name == "step_00000000"
    add(run, 10, {"loss": 2.0})
    assert find_weights(run, "best").parent.name == "step_00000010"


@pytest.mark.parametrize("choice", ["best", "last", "ema", "average", "no_such_thing"])
def test_missing_weights_are_a_sentence(tmp_path, choice):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        find_weights(run, choice)
    assert str(run) in str(error.value) and "\n" not in str(error.value)


def test_a_network_starts_from_a_run_s_average_or_else_its_last_checkpoint(run):
    network = nn.Linear(4, 1, bias=False)
    network.weight = nn.Parameter(torch.ones(4))
    networks = {"llm": network}
    assert (
        init_weights(networks, "llm", str(run)).parent.name == "step_00000030"
        and network.weight.tolist() == [30.0] * 4
    )
    add_average(run, "best2", 2000)
    assert (
        init_weights(networks, "llm", str(run)).parent.name == "best2" and not network.weight.any()
    )


STALE = "the run went on from step 20 to 30 after it"


def test_an_average_does_not_stand_for_a_run_that_was_trained_on(run, said):
    add_average(run, "best2", 2000, run_step=20)
    assert weights_of(str(run)).parent.name == "step_00000030"
    assert f"taking the last checkpoint, not the average best2, as {STALE}" in said.text
    assert weights_of(str(run.averages / "best2/llm.safetensors")).parent.name == "best2"
    said.clear()
    assert find_weights(run, "best2").parent.name == "best2" and not said.text
    assert find_weights(run, "average").parent.name == "best2"
    assert f"weights=average takes best2, but {STALE}" in said.text


def test_the_newest_average_is_that_of_the_latest_step(run, said):
    """The time of a file is that of a copy."""
    add_average(run, "best2", 1000)
    add_average(run, "early", 2000, run_step=10)
    assert weights_of(str(run)).parent.name == "best2"
    assert "taking its newest average, best2" in said.text
    said.clear()
    assert find_weights(run, "average").parent.name == "best2" and not said.text


# loading


def load(path: Path, tensors: Tensors) -> nn.Linear:
    """Returns a network with the weights of a file."""
    save_tensors(path, tensors) if path.suffix == ".safetensors" else torch.save(tensors, path)
    network = nn.Linear(2, 3)
    load_weights(network, path)
    return network


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_are_loaded_into_a_network(tmp_path, suffix):
    tensors = {"weight": torch.randn(3, 2), "bias": torch.randn(3)}
    network = load(tmp_path / f"a.{suffix}", tensors)
    assert torch.equal(network.weight, tensors["weight"]) and torch.equal(
        network.bias, tensors["bias"]
    )


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({"weight": torch.zeros(3, 2)}, ["1 missing (such as bias)"]),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "more": torch.zeros(1)},
            ["1 unknown (such as more)"],
        ),
        (
            {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)},
            ["1 of another shape (such as weight, [2, 2] instead of [3, 2])"],
        ),
        (
            {"weight": torch.zeros(2, 2), "more": torch.zeros(1)},
            ["such as bias", "such as more", "such as weight"],
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_that_do_not_fit_are_named_in_one_sentence(tmp_path, suffix, tensors, parts):
    with pytest.raises(UserError) as error:
        load(tmp_path / f"a.{suffix}", tensors)
    assert all(part in str(error.value) for part in [*parts, f"a.{suffix}"]) and "\n" not in str(
        error.value
    )


def test_weights_that_are_not_finite_are_refused(tmp_path):
    for bad in (torch.tensor([0, math.nan, 0]), torch.full((3,), 1e300, dtype=torch.float64)):
        with pytest.raises(
            UserError, match=r"a\.pt holds values that are not finite .*\(in bias\)"
        ):
            load(tmp_path / "a.pt", {"weight": torch.zeros(3, 2), "bias": bad})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_another_precision_are_loaded(tmp_path, dtype):
    tensors = {"weight": torch.ones(3, 2, dtype=dtype), "bias": torch.ones(3, dtype=dtype)}
    network = load(tmp_path / "a.pt", tensors)
    assert network.weight.dtype == torch.float32 and (network.weight == 1).all()


ONES = torch.ones(3, 2)
OTHER_TYPES = {
    "int8": ONES.to(torch.int8),
    "bool": ONES.bool(),
    "complex64": ONES.to(torch.complex64),
    "float8_e4m3fn": ONES.to(torch.float8_e4m3fn),
    "a sparse tensor of float32": ONES.to_sparse(),
    "a meta tensor of float32": ONES.to("meta"),
    "a nested tensor of float32": torch.nested.as_nested_tensor(ONES, layout=torch.strided),
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_a_type_that_loses_something_are_refused(tmp_path, kind, strict):
    torch.save({"weight": OTHER_TYPES[kind], "bias": torch.zeros(3)}, tmp_path / "a.pt")
    network = nn.Linear(2, 3)
    before = network.weight.detach().clone()
    with pytest.raises(UserError, match=f"holds weight as {kind}, which .* loaded as float32: "):
        init_weights({"llm": network}, "llm", str(tmp_path / "a.pt"), strict)
    assert torch.equal(network.weight, before)


def test_a_buffer_keeps_its_type(tmp_path):
    network = nn.BatchNorm1d(2)
    tensors = {**network.state_dict(), "num_batches_tracked": torch.tensor(3.7)}
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"num_batches_tracked as float32.* loaded as int64"):
        load_weights(network, tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float8_e4m3fn])
def test_a_safetensors_file_of_an_unusual_type_is_a_sentence(tmp_path, dtype):
    save_file({"weight": ONES.to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"holds weight as [FU].*, which is not a type of weights"):
        load_weights(nn.Linear(2, 3), tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("generator.weight", "weight"),
        ("weight_g", "parametrizations.weight.original0"),
        ("discriminator.a.weight_v", "discriminator.a.parametrizations.weight.original1"),
    ],
)
def test_two_names_of_one_parameter_must_be_equal(tmp_path, first, second):
    path, prefix = tmp_path / "a.pt", "" if "." in first else "a."
    first, second = prefix + first, prefix + second
    for one, other in ((first, second), (second, first)):
        torch.save({one: torch.zeros(2), other: torch.ones(2)}, path)
        with pytest.raises(UserError, match=f"two different tensors for .*as {one} and as {other}"):
            read_weights(path)
        torch.save({one: torch.ones(2), other: torch.ones(2)}, path)
        (tensors,) = (found for found in read_weights(path).values() if found)
        assert len(tensors) == 1


def test_weights_at_two_places_of_a_file_are_refused(tmp_path):
    network = nn.Linear(2, 3).state_dict()
    torch.save({"model": network, "state_dict": nn.Linear(2, 3).state_dict()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds weights under state_dict and under model: save one"):
        load_weights(nn.Linear(2, 3), tmp_path / "a.pt")


def test_a_tensor_is_not_hidden_by_an_alias(tmp_path):
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    save_file(tensors, tmp_path / "a.safetensors", {"a": "b"})
    assert_equal(read_tensors(tmp_path / "a.safetensors"), tensors)


def test_weights_at_home_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}, tmp_path / "a.pt")
    assert init_weights({"llm": nn.Linear(2, 3)}, "llm", "~/a.pt") == tmp_path / "a.pt"
    with pytest.raises(
        UserError, match=r"there are no weights ~/b\.pt: give a run or a weights file"
    ):
        init_weights({"llm": nn.Linear(2, 3)}, "llm", "~/b.pt")


class Executes:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "write",
    [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))],
    ids=["torch", "pickle"],
)
def test_a_pickle_that_would_run_code_is_refused(tmp_path, write):
    write({"weight": torch.zeros(3, 2), "bias": Executes(tmp_path / "executed")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"cannot load weights from .*a\.pt") as error:
        load_weights(nn.Linear(2, 3), tmp_path / "a.pt")
    assert not (tmp_path / "executed").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot load weights|is not a valid safe"),
        (b"PK\3\4", "cannot load weights|is not a valid safe"),
    ],
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_file_that_holds_no_weights_is_named(tmp_path, suffix, content, message):
    path = tmp_path / f"a.{suffix}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_weights(nn.Linear(2, 3), path)


def test_a_pt_that_is_not_a_mapping_is_refused(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds a list"):
        load_weights(nn.Linear(2, 3), tmp_path / "a.pt")


# the original's files


def normed() -> nn.Module:
    """Returns a layer with a weight norm."""
    return nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))


@pytest.fixture
def trainables() -> dict[str, nn.Module]:
    """A vocoder and its discriminator, both with weight norms."""
    torch.manual_seed(0)
    return {
        "hifigan": nn.Sequential(normed()),
        "discriminator": nn.Sequential(normed(), nn.Linear(3, 1)),
    }


def old(tensors: Tensors, prefix: str = "", legacy: bool = True) -> Tensors:
    """Returns tensors under the names that a checkpoint of the original has."""
    names = (
        {
            "parametrizations.weight.original0": "weight_g",
            "parametrizations.weight.original1": "weight_v",
        }
        if legacy
        else {}
    )
    found = {}
    for name, tensor in tensors.items():
        for modern, older in names.items():
            name = name.replace(modern, older)
        found[f"{prefix}{name}"] = tensor + 1
    return found


def are_loaded(networks: Mapping[str, nn.Module], names: Iterable[str]) -> bool:
    """Whether all weights of some networks are whole numbers."""
    return all(
        all((tensor % 1 == 0).all() for tensor in networks[name].state_dict().values())
        for name in names
    )


@pytest.fixture
def whole(trainables: dict[str, nn.Module]) -> dict[str, Any]:
    """A training checkpoint of the original's GAN, in which every number is whole."""
    tensors = {
        name: {n: x.round() for n, x in net.state_dict().items()}
        for name, net in trainables.items()
    }
    return {
        **old(tensors["hifigan"], "generator.", legacy=False),
        **old(tensors["discriminator"], "discriminator."),
        "epoch": 3,
        "step": 70,
    }


WRAPPED = [
    lambda x: x,
    lambda x: {"module": x},
    lambda x: {"state_dict": x},
    lambda x: {"model_state_dict": x, "optimizer_state_dict": {}},
    lambda x: {f"module.{n}": t for n, t in x.items()},
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_training_checkpoint_of_the_original_brings_both_networks(
    tmp_path, trainables, whole, wrap
):
    torch.save(wrap(whole), tmp_path / "epoch_3.pt")
    assert not are_loaded(trainables, ["hifigan"]) and not are_loaded(trainables, ["discriminator"])
    assert (
        init_weights(trainables, "hifigan", str(tmp_path / "epoch_3.pt")) == tmp_path / "epoch_3.pt"
    )
    assert are_loaded(trainables, trainables)


def test_a_release_brings_the_generator_alone(tmp_path, trainables, whole, caplog):
    release = {
        name.removeprefix("generator."): tensor
        for name, tensor in whole.items()
        if name.startswith("generator.")
    }
    torch.save(release, tmp_path / "hift.pt")
    before = {
        name: tensor.clone() for name, tensor in trainables["discriminator"].state_dict().items()
    }
    with caplog.at_level("INFO"):
        init_weights(trainables, "hifigan", str(tmp_path / "hift.pt"))
    assert are_loaded(trainables, ["hifigan"])
    assert_equal(trainables["discriminator"].state_dict(), before)
    assert (
        "hift.pt: 3 tensors loaded" in caplog.text
        and "no discriminator, which starts from scratch" in caplog.text
    )


def test_a_run_brings_the_discriminator_beside_its_model(tmp_path, trainables):
    run = make_run(tmp_path / "run", smallest_config({"model": {"name": "hifigan"}}))
    tensors = {
        name: {n: x.round() for n, x in net.state_dict().items()}
        for name, net in trainables.items()
    }
    add(run, 10, {"loss": 1.0}, tensors["hifigan"], discriminator=tensors["discriminator"])
    init_weights(trainables, "hifigan", str(run))
    assert are_loaded(trainables, trainables)


def test_what_is_new_is_taken_as_it_is_only_if_allowed(tmp_path, caplog):
    torch.save({"weight": torch.ones(3, 2), "more": torch.zeros(1)}, tmp_path / "a.pt")
    network = nn.Linear(2, 3)
    bias = network.bias.detach().clone()
    with pytest.raises(
        UserError,
        match=r"1 missing .such as bias., 1 unknown .such as more.; init_strict=false loads only",
    ):
        init_weights({"llm": network}, "llm", str(tmp_path / "a.pt"))
    assert not (network.weight == 1).any()
    with caplog.at_level("INFO"):
        init_weights({"llm": network}, "llm", str(tmp_path / "a.pt"), strict=False)
    assert (network.weight == 1).all() and torch.equal(network.bias, bias)
    assert "1 newly initialized: bias" in caplog.text and "1 not used: more" in caplog.text


def test_another_shape_is_left_out_if_allowed(tmp_path, caplog):
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.full((3,), 7.0)}, tmp_path / "a.pt")
    network = nn.Linear(2, 3)
    weight = network.weight.detach().clone()
    with caplog.at_level("INFO"):
        init_weights({"llm": network}, "llm", str(tmp_path / "a.pt"), strict=False)
    assert torch.equal(network.weight, weight) and (network.bias == 7).all()
    assert "1 newly initialized: weight" in caplog.text and "1 not used: weight" in caplog.text


@pytest.mark.parametrize("tensors", [{"weight": torch.zeros(2, 2)}, {"other": torch.zeros(1)}])
def test_a_file_with_nothing_that_fits_is_refused_in_any_case(tmp_path, tensors):
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"the tensors of .*a\.pt do not fit the network"):
        init_weights({"llm": nn.Linear(2, 3)}, "llm", str(tmp_path / "a.pt"), strict=False)
