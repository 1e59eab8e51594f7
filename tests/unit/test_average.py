"""Means of checkpoints."""

import math
import subprocess
import sys

import pytest
import torch
import yaml

from cosyexp.averaging.mean import average
from cosyexp.averaging.select import select
from cosyexp.averaging.write import write_average
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import TensorFile, read_tensors, save_tensors
from cosyexp.run.weights import find_weights
from tests.support import environment
from tests.unit.runs import add, cut, make_run


def mean_of(folder, *contents):
    """The average of files, the newest last."""
    files = []
    for i, tensors in enumerate(contents):
        files.append(folder / f"{i}.safetensors")
        save_tensors(files[-1], tensors)
    average(files, folder / "mean.safetensors")
    return read_tensors(folder / "mean.safetensors")


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-15), (torch.float32, 2e-7), (torch.float16, 2**-10), (torch.bfloat16, 2**-7)]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_is_the_plain_mean_in_the_same_dtype(tmp_path, dtype, relative, count):
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(50, 7, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count)]
    found = mean_of(tmp_path, *({"a": part} for part in parts))["a"]
    wanted = torch.stack(parts).double().mean(0)
    assert found.dtype == dtype
    assert ((found.double() - wanted).abs() <= relative * wanted.abs().clamp(min=0.5)).all()


def test_one_file_is_its_own_mean(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(3).bfloat16(), "c": torch.tensor(7)}
    found = mean_of(tmp_path, tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)])
def test_half_precision_is_added_in_fp32(tmp_path, dtype, large):
    values = [large, *[1.0] * 7]  # added in their own type, the ones would be lost
    found = mean_of(tmp_path, *({"a": torch.tensor([value], dtype=dtype)} for value in values))["a"]
    assert found.item() == torch.tensor(sum(values) / 8).to(dtype).item() > large / 8


def test_fp16_does_not_overflow_on_the_way(tmp_path):
    assert mean_of(tmp_path, *[{"a": torch.tensor([60000.0]).half()}] * 3)["a"].item() == torch.tensor(60000.0).half().item()


def test_fp64_keeps_its_digits(tmp_path):
    one, two = torch.tensor([1 + 1e-12], dtype=torch.float64), torch.tensor([1 + 3e-12], dtype=torch.float64)
    assert abs(mean_of(tmp_path, {"a": one}, {"a": two})["a"].item() - (1 + 2e-12)) < 1e-15


def test_integers_and_booleans_are_the_newest(tmp_path):
    old = {"count": torch.tensor(10), "small": torch.tensor([1, 2], dtype=torch.uint8), "flag": torch.tensor([True, False])}
    new = {"count": torch.tensor(13), "small": torch.tensor([5, 6], dtype=torch.uint8), "flag": torch.tensor([False, False])}
    found = mean_of(tmp_path, old, new)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in new.items())


def test_shapes_and_order_are_kept(tmp_path):
    tensors = {"z": torch.randn(()), "a": torch.zeros(0, 3), "m": torch.randn(2, 1, 3)}
    mean_of(tmp_path, tensors, tensors)
    with TensorFile(tmp_path / "mean.safetensors") as file:
        assert file.keys() == ["z", "a", "m"]
        assert all(torch.equal(file[name], tensor) for name, tensor in tensors.items())


A, B = {"a": torch.zeros(2)}, {"b": torch.zeros(2)}


@pytest.mark.parametrize("other", [B, {**A, **B}, {"a": torch.zeros(3)}, {"a": torch.zeros(2).half()}])
def test_files_with_other_tensors_are_refused(tmp_path, other):
    with pytest.raises(UserError, match=r"0\.safetensors holds other tensors than .*1\.safetensors"):
        mean_of(tmp_path, other, A)
    assert not (tmp_path / "mean.safetensors").exists()


MEASURE = """
import re, sys
from pathlib import Path
from cosyexp.averaging.mean import average

def most():  # memory so far, in megabytes; ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

small, large, out = map(Path, sys.argv[1:])
average([small] * 3, out)  # the code's own pages count too
before = most()
average([large] * 3, out)
print(most() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    megabytes, count = 8, 6
    for name, size in (("small", 1), ("large", megabytes * 2**18)):
        save_tensors(tmp_path / name, {f"t{i}": torch.ones(size) for i in range(count)})
    words = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large", "out"))]
    env = {**environment(), "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
    found = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 2.5 * megabytes, found.stdout


# which checkpoints


@pytest.fixture
def run(tmp_path):
    run = make_run(tmp_path / "run")
    for step, loss, mse in ((10, 3.0, 0.1), (20, 1.0, 0.3), (30, math.nan, 0.0), (40, 2.0, 0.2), (50, math.inf, math.nan)):
        add(run, step, {"loss": loss, "mse": mse})
    add(run, 60)  # without a validation
    return RunDirectory(run.path)


def chosen(run, how, num, metric="loss", strict=True):
    return [checkpoint.step for checkpoint in select(run, how, num, metric, strict)]


def test_the_best_are_those_with_the_lowest_loss(run):
    assert chosen(run, "best", 1) == [20]
    assert chosen(run, "best", 2) == [20, 40]
    assert chosen(run, "best", 3) == [10, 20, 40]


def test_the_best_may_go_by_another_metric(run):
    assert chosen(run, "best", 2, "mse") == [10, 30]


def test_the_last_need_no_validation(run):
    assert chosen(run, "last", 3) == [40, 50, 60]


def test_too_few_are_refused_unless_not_strict(run):
    with pytest.raises(UserError, match=r"has 3 checkpoints to choose from, not num=4.*strict=false"):
        chosen(run, "best", 4)
    assert chosen(run, "best", 4, strict=False) == [10, 20, 40]


def test_damaged_checkpoints_are_passed_over_aloud(run, said):
    for step in (20, 60):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    assert chosen(run, "best", 2) == [10, 40] and chosen(run, "last", 2) == [40, 50]
    assert "step_00000020 is passed over" in said.text and "step_00000060 is passed over" in said.text


@pytest.mark.parametrize("num", [0, -1])
def test_no_number_of_checkpoints_is_refused(run, num):
    with pytest.raises(UserError, match=f"num={num}"):
        chosen(run, "last", num)


def test_an_unknown_metric_is_a_sentence(run):
    with pytest.raises(UserError, match=r"no checkpoint with a validation nonsense.*select=last"):
        chosen(run, "best", 1, "nonsense")


def test_a_run_without_checkpoints_is_not_told_to_select_the_last_ones(tmp_path):
    with pytest.raises(UserError, match="no checkpoint") as error:
        chosen(make_run(tmp_path / "run"), "last", 1)
    assert "select=last" not in str(error.value)


# where they go


def test_an_average_says_what_it_was_made_of(run):
    path = write_average(run, "best2", "llm", select(run, "best", 2, "loss", True), None)
    assert path == run.averages / "best2" / "llm.safetensors" and read_tensors(path)["weight"].tolist() == [30.0] * 4
    meta = yaml.safe_load((path.parent / "meta.yaml").read_text())
    found = [(source["step"], source["weight"], source["loss_dict"]["loss"]) for source in meta["sources"]]
    assert found == [(20, 0.5, 1.0), (40, 0.5, 2.0)]
    assert meta["sha256"] == {"llm.safetensors": file_hash(path)} and meta["method"]
    assert find_weights(run, "average") == find_weights(run, "best2") == path


def test_an_average_of_the_same_name_is_replaced(run):
    write_average(run, "mine", "llm", select(run, "best", 3, "loss", True), None)
    path = write_average(run, "mine", "llm", select(run, "last", 1, "loss", True), None)
    assert read_tensors(path)["weight"].tolist() == [60.0] * 4
    assert [source["step"] for source in yaml.safe_load((path.parent / "meta.yaml").read_text())["sources"]] == [60]
    assert [folder.name for folder in run.averages.iterdir()] == ["mine"]


def test_an_average_that_fails_leaves_the_old_one(run):
    path = write_average(run, "mine", "llm", select(run, "last", 2, "loss", True), None)
    add(run, 70, tensors={"other": torch.zeros(1)})
    with pytest.raises(UserError, match="holds other tensors"):
        write_average(run, "mine", "llm", select(run, "last", 2, "loss", True), None)
    assert read_tensors(path)["weight"].tolist() == [55.0] * 4 and find_weights(run, "average") == path


def test_an_average_goes_where_output_says(run, tmp_path):
    out = tmp_path / "a" / "b.safetensors"
    assert write_average(run, "mine", "llm", select(run, "last", 2, "loss", True), str(out)) == out
    assert read_tensors(out)["weight"].tolist() == [55.0] * 4
    assert list(out.parent.iterdir()) == [out] and not run.averages.exists()
