"""Means of checkpoints."""

import math
import os
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from cosyexp.averaging.candidates import candidates_in
from cosyexp.averaging.mean import PIECE, combine
from cosyexp.averaging.methods import (
    Evaluate,
    Greedy,
    Method,
    Running,
    Uniform,
    Weighted,
    WeightedSum,
)
from cosyexp.averaging.select import Selection, select
from cosyexp.averaging.write import folder_name, write_file, write_folder
from cosyexp.errors import UserError
from cosyexp.registry import build
from cosyexp.run.checkpoint import BY_LOSS, Criterion, file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import TensorFile, read_tensors, save_tensors
from cosyexp.run.weights import find_weights
from tests.support import contents, environment
from tests.unit.runs import add, cut, make_run


def average(files: list[Path], out: Path, pickled: bool = False) -> None:
    """Writes the plain mean of files, the newest last."""
    combine([(file, 1.0) for file in files], len(files), files[-1], out, pickled)


def mean_of(folder: Path, *contents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the average of safetensors files, the newest last."""
    files: list[Path] = []
    for i, tensors in enumerate(contents):
        files.append(folder / f"{i}.safetensors")
        save_tensors(files[-1], tensors)
    average(files, folder / "mean.safetensors")
    return read_tensors(folder / "mean.safetensors")


@pytest.mark.parametrize(
    ("dtype", "relative"),
    [
        (torch.float64, 1e-15),
        (torch.float32, 2e-7),
        (torch.float16, 2**-10),
        (torch.bfloat16, 2**-7),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_is_the_plain_mean_in_the_same_dtype(tmp_path, dtype, relative, count):
    draw = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(50, 7, generator=draw, dtype=torch.float64).to(dtype) for _ in range(count)
    ]
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
    assert (
        mean_of(tmp_path, *[{"a": torch.tensor([60000.0]).half()}] * 3)["a"].item()
        == torch.tensor(60000.0).half().item()
    )


def test_fp64_keeps_its_digits(tmp_path):
    one, two = (
        torch.tensor([1 + 1e-12], dtype=torch.float64),
        torch.tensor([1 + 3e-12], dtype=torch.float64),
    )
    assert abs(mean_of(tmp_path, {"a": one}, {"a": two})["a"].item() - (1 + 2e-12)) < 1e-15


def test_integers_and_booleans_are_the_newest(tmp_path):
    old = {
        "count": torch.tensor(10),
        "small": torch.tensor([1, 2], dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
    }
    new = {
        "count": torch.tensor(13),
        "small": torch.tensor([5, 6], dtype=torch.uint8),
        "flag": torch.tensor([False, False]),
    }
    found = mean_of(tmp_path, old, new)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in new.items()
    )


def test_shapes_and_order_are_kept(tmp_path):
    tensors = {"z": torch.randn(()), "a": torch.zeros(0, 3), "m": torch.randn(2, 1, 3)}
    mean_of(tmp_path, tensors, tensors)
    with TensorFile(tmp_path / "mean.safetensors") as file:
        assert file.keys() == ["z", "a", "m"]
        assert all(torch.equal(file[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_of_many_pieces_is_whole(tmp_path):
    parts = [torch.randn(2 * PIECE + 3) for _ in range(3)]
    found = mean_of(
        tmp_path,
        *({"a": part, "n": torch.arange(PIECE + i)[:PIECE]} for i, part in enumerate(parts)),
    )
    assert torch.equal(found["a"], (parts[0] + parts[1] + parts[2]) / 3) and torch.equal(
        found["n"], torch.arange(PIECE)
    )


# .pt


def pt_mean_of(folder: Path, *contents: Any) -> dict[str, Tensor]:
    """Returns the average of .pt files, the newest last."""
    files = [folder / f"{i}.pt" for i in range(len(contents))]
    for file, tensors in zip(files, contents, strict=True):
        torch.save(tensors, file)
    average(files, folder / "mean.pt", pickled=True)
    mean: dict[str, Tensor] = torch.load(folder / "mean.pt", weights_only=True)
    return mean


def test_a_pt_comes_back_as_torch_would_have_written_it(tmp_path):
    tensors = {
        **{
            f"{dtype}": torch.ones(3, 5).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        },
        **{
            f"{dtype}": torch.ones(3).to(dtype)
            for dtype in (
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint8,
                torch.bool,
            )
        },
        "scalar": torch.tensor(2.0),
        "empty": torch.zeros(0, 4),
        "large": torch.randn(3, PIECE),
        "view": torch.randn(4, 6)[1:3],
    }
    found = pt_mean_of(tmp_path, tensors, tensors)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and (found[name].dtype, found[name].stride()) == (
            tensor.dtype,
            tensor.stride(),
        )
    mapped = torch.load(tmp_path / "mean.pt", weights_only=True, mmap=True)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in mapped.values() if tensor.numel())
    with zipfile.ZipFile(tmp_path / "mean.pt") as archive:
        assert archive.testzip() is None


def test_step_and_epoch_are_not_averaged(tmp_path):
    contents = [
        {"a": torch.ones(2), "step": step, "epoch": torch.tensor(epoch)}
        for step, epoch in ((1, 1), (5, 2))
    ]
    assert list(pt_mean_of(tmp_path, *contents)) == ["a"]


NESTED = {
    "plain": lambda x: x,
    "of DataParallel": lambda x: {f"module.{name}": tensor for name, tensor in x.items()},
    "moving average": lambda x: {f"ema_model.{name}": tensor for name, tensor in x.items()},
    "model": lambda x: {"model": x, "epoch": 2},
    "model_state_dict": lambda x: {"model_state_dict": x, "optimizer_state_dict": {"state": {}}},
    "two levels": lambda x: {"state_dict": {"model": x}},
}


@pytest.mark.parametrize("first", NESTED)
@pytest.mark.parametrize("second", ["plain", "of DataParallel"])
def test_nested_state_dicts_are_averaged_under_plain_names(tmp_path, first, second):
    contents = {"a.weight": torch.ones(2)}, {"a.weight": torch.full((2,), 3.0)}
    found = pt_mean_of(tmp_path, NESTED[first](contents[0]), NESTED[second](contents[1]))
    assert list(found) == ["a.weight"] and found["a.weight"].tolist() == [2.0, 2.0]


def test_a_prefix_that_only_some_names_have_is_kept(tmp_path):
    tensors = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(pt_mean_of(tmp_path, tensors, tensors)) == ["module.a", "b"]


def test_a_state_dict_at_an_unknown_place_is_answered_with_the_keys_of_the_file(tmp_path):
    content = {"weights": {"a": torch.ones(1)}, "optimizer": {}}
    with pytest.raises(UserError, match=r"0\.pt holds no tensors .*keys are weights, optimizer"):
        pt_mean_of(tmp_path, content)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_tensor_of_two_names_is_averaged_and_written_once(tmp_path, kind):
    parts = []
    for _ in range(2):
        weight = torch.randn(40, 50)
        parts.append({"embedding": weight, "head": weight, "other": torch.randn(3)})
    found = (mean_of if kind == "safetensors" else pt_mean_of)(tmp_path, *parts)
    wanted = (parts[0]["head"] + parts[1]["head"]) / 2
    assert (
        found.keys() == parts[0].keys()
        and torch.equal(found["head"], wanted)
        and torch.equal(found["embedding"], wanted)
    )
    assert found["head"].data_ptr() == found["embedding"].data_ptr() or kind == "safetensors"
    assert (tmp_path / f"mean.{kind}").stat().st_size < 2 * wanted.nbytes


def test_what_is_one_tensor_in_some_files_alone_stays_two(tmp_path):
    one, two, three = torch.ones(4), torch.zeros(4), torch.full((4,), 2.0)
    found = mean_of(tmp_path, {"a": one, "b": one}, {"a": two, "b": three})
    assert found["a"].tolist() == [0.5] * 4 and found["b"].tolist() == [1.5] * 4


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(1)],
        {"a": torch.randn(3, 4).t()},
        {"a": torch.zeros(2, dtype=torch.complex64)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": 1},
    ],
)
def test_a_pt_that_cannot_be_averaged_is_a_sentence(tmp_path, content):
    with pytest.raises(UserError, match=r"0\.pt holds"):
        pt_mean_of(tmp_path, content)
    assert not (tmp_path / "mean.pt").exists()


A, B = {"a": torch.zeros(2)}, {"b": torch.zeros(2)}


@pytest.mark.parametrize(
    "other", [B, {**A, **B}, {"a": torch.zeros(3)}, {"a": torch.zeros(2).half()}]
)
def test_files_with_other_tensors_are_refused(tmp_path, other):
    with pytest.raises(
        UserError, match=r"0\.safetensors holds other tensors than .*1\.safetensors"
    ):
        mean_of(tmp_path, other, A)
    assert not (tmp_path / "mean.safetensors").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.0, -1.0), (0.0, 1.0)], ids=str)
def test_a_value_that_is_not_finite_is_named_with_its_file(tmp_path, bad, kind, factors):
    wrong = torch.ones(PIECE + 3)
    wrong[-1] = bad
    files = [tmp_path / f"{name}.{kind}" for name in ("wrong", "good")]
    for file, values in zip(files, (wrong, torch.ones(PIECE + 3)), strict=True):
        tensors = {"first": torch.ones(2), "layer.bias": values}
        save_tensors(file, tensors) if kind == "safetensors" else torch.save(tensors, file)
    parts = list(zip(files, factors, strict=True))
    with pytest.raises(UserError, match=rf"wrong\.{kind} holds .* not finite \(in layer\.bias\)"):
        combine(parts, 2, files[-1], tmp_path / f"mean.{kind}", kind == "pt")


def test_an_average_too_large_for_its_type_is_refused(tmp_path):
    tensors = {"a": torch.full((3,), 6e4, dtype=torch.float16)}
    save_tensors(tmp_path / "a.safetensors", tensors)
    file, out = tmp_path / "a.safetensors", tmp_path / "mean.safetensors"
    with pytest.raises(UserError, match="the average of a is too large for its type"):
        combine([(file, 1.0), (file, 1.0)], 1, file, out)


def test_finite_values_of_any_size_are_averaged(tmp_path):
    """Their sum overflows, they do not."""
    largest = {"a": torch.full((9,), 3e38)}
    assert torch.equal(mean_of(tmp_path, largest)["a"], largest["a"])


def test_an_average_that_is_not_finite_leaves_nothing(run, tmp_path):
    add(run, 70, {"loss": 0.1}, {"weight": torch.tensor([1.0, math.nan, 1.0, 1.0])})
    last = select(candidates_in(run.path), Selection("last", 2))
    average = Uniform()(last, BY_LOSS, lambda _: {})
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"step_0*70/llm\.safetensors holds .* not finite"):
        write_folder(average, candidates_in(run.path), "last2", {})
    with pytest.raises(UserError, match="not finite"):
        write_file(average, tmp_path / "out.pt")
    assert contents(tmp_path) == before and not any(run.averages.glob("last2*"))


MEASURE = """
import re, sys
from pathlib import Path
from cosyexp.averaging.mean import combine

def peak():  # memory so far, in megabytes; ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

small, large, out = map(Path, sys.argv[1:])
pickled = out.suffix == ".pt"
combine([(small, 1.0)] * 3, 3, small, out, pickled)  # the code's own pages count too
before = peak()
combine([(large, 1.0)] * 3, 3, large, out, pickled)
print(peak() - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path, kind):
    megabytes, count = 16, 3
    for name, size in (("small", 1), ("large", megabytes * 2**18)):
        tensors = {f"t{i}": torch.ones(size) for i in range(count)}
        (
            save_tensors
            if kind == "safetensors"
            else lambda path, tensors: torch.save(tensors, path)
        )(tmp_path / f"{name}.{kind}", tensors)
    words = [
        sys.executable,
        "-c",
        MEASURE,
        *(str(tmp_path / f"{name}.{kind}") for name in ("small", "large", "out")),
    ]
    env = {**environment(), "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
    found = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 0.5 * megabytes, found.stdout


# which checkpoints


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with six checkpoints, some of whose losses are not finite."""
    run = make_run(tmp_path / "run")
    for step, loss, mse in (
        (10, 3.0, 0.1),
        (20, 1.0, 0.3),
        (30, math.nan, 0.0),
        (40, 2.0, 0.2),
        (50, math.inf, math.nan),
    ):
        add(run, step, {"loss": loss, "mse": mse})
    add(run, 60)  # without a validation
    return RunDirectory(run.path)


def selected(run: RunDirectory, rule: str, num: int | None = None, **options: Any) -> list[int]:
    """Returns the steps of the selected checkpoints, in order."""
    return [c.step for c in select(candidates_in(run.path), Selection(rule, num, **options))]


def test_the_best_are_those_with_the_lowest_loss(run):
    assert selected(run, "best", 1) == [20]
    assert selected(run, "best", 2) == [20, 40]
    assert selected(run, "best", 3) == [20, 40, 10]


def test_the_best_may_be_those_by_another_metric(run):
    assert selected(run, "best", 2, criterion=Criterion("mse")) == [30, 10]
    assert selected(run, "best", 2, criterion=Criterion("mse", "max")) == [20, 40]


def test_untrained_weights_are_not_among_the_best_unless_there_are_no_others(tmp_path):
    run = make_run(tmp_path / "run")
    add(run, 0, {"loss": 0.5})
    assert selected(run, "best", 1) == [0]
    add(run, 10, {"loss": 2.0})
    assert selected(run, "best", 1) == [10] and selected(run, "last", 2) == [10, 0]
    with pytest.raises(UserError, match="has 1 such checkpoints, not num=2"):
        selected(run, "best", 2)


def test_the_last_need_no_validation(run):
    assert selected(run, "last", 3) == [60, 50, 40] and selected(run, "last") == [
        60,
        50,
        40,
        30,
        20,
    ]


def test_a_window_has_all_from_a_step_to_a_step(run):
    assert selected(run, "window", window=(20, 50)) == [50, 40, 30, 20]
    assert selected(run, "window", 2, window=(20, 50)) == [50, 40]
    assert selected(run, "best", 1, window=(30, 60)) == [40]


def test_too_few_are_refused_unless_not_strict(run, said):
    with pytest.raises(
        UserError, match=r"has 3 such checkpoints, not num=4: give a smaller num, or strict=false"
    ):
        selected(run, "best", 4)
    assert (
        selected(run, "best", 4, strict=False) == [20, 40, 10]
        and "has 3 such checkpoints, not num=4: averaging these" in said.text
    )


def test_damaged_checkpoints_are_skipped_with_a_warning(run, said):
    for step in (20, 60):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    assert selected(run, "best", 2) == [40, 10] and selected(run, "last", 2) == [50, 40]
    for step in (20, 60):
        assert f"step_{step:08d} is skipped: llm.safetensors does not match" in said.text


def test_one_flipped_bit_is_noticed(run, said):
    path = run.path / "checkpoints/step_00000020/llm.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert (
        selected(run, "best", 1) == [40]
        and "step_00000020" in said.text
        and "llm.safetensors does not match its checksum" in said.text
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rule": "best", "num": 1, "criterion": Criterion("nonsense")},
            "no checkpoint with a validation nonsense.*select=last",
        ),
        ({"rule": "window"}, r"give window=\[from,to\]"),
        ({"rule": "window", "window": (5,)}, r"window=\[5\] is not a range of steps"),
        ({"rule": "last", "window": (5, 4)}, r"window=\[5, 4\] is not a range of steps"),
        (
            {"rule": "window", "window": (61, 99)},
            "no checkpoint from step 61 to 99: its checkpoints are of steps 10 to 60",
        ),
    ],
)
def test_a_selection_that_is_not_possible_is_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        selected(run, **options)


def test_the_error_of_a_run_without_checkpoints_does_not_propose_the_last_ones(tmp_path):
    with pytest.raises(UserError, match="has no readable checkpoint: train it further") as error:
        selected(make_run(tmp_path / "run"), "last", 1)
    assert "select=last" not in str(error.value)


def test_what_was_not_kept_in_training_is_named_with_its_option(run):
    for option, key in (("ema", "trainer.ema="), ("sums", "trainer.running_sum=true")):
        with pytest.raises(UserError, match=f"no checkpoint with .*{key}"):
            candidates_in(run.path, **{option: True})


# how much of each


def no_evaluation(_: Path) -> Mapping[str, float]:
    """Fails, as most methods validate nothing."""
    raise AssertionError("nothing is validated")


def mixed(
    run: RunDirectory,
    method: Method,
    num: int = 3,
    rule: str = "best",
    evaluate: Evaluate = no_evaluation,
    criterion: Criterion = BY_LOSS,
) -> WeightedSum:
    """Returns the average that a method makes of selected checkpoints."""
    candidates = candidates_in(run.path, sums=method.running_sums)
    sources = select(candidates, Selection(rule, num, criterion))
    return method(sources, criterion, evaluate)


def written(average: WeightedSum, folder: Path) -> list[float]:
    """Returns the weights of an average, which is written to a file."""
    weights: list[float] = read_tensors(write_file(average, folder / "out.safetensors"))[
        "weight"
    ].tolist()
    return weights


def test_weights_are_the_softmax_of_the_losses(run, tmp_path):
    average = mixed(run, Weighted(temperature=0.5))
    shares = torch.softmax(
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64) / -0.5, 0
    ).tolist()  # of the steps 10, 20, 40
    assert [weight for _, weight in average.rows()] == pytest.approx(shares, rel=1e-12)
    assert written(average, tmp_path) == pytest.approx(
        [10 * shares[0] + 20 * shares[1] + 40 * shares[2]] * 4
    )


def test_a_low_temperature_takes_the_best_alone(run, tmp_path):
    assert written(mixed(run, Weighted(temperature=1e-6)), tmp_path) == [20.0] * 4


def test_weights_follow_the_direction_of_the_metric(run):
    """Of the greatest mse, as of the lowest: 0.1, 0.3 and 0.2 at the steps 10, 20 and 40."""
    average = mixed(run, Weighted(temperature=0.1), criterion=Criterion("mse", "max"))
    shares = torch.softmax(torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64) / 0.1, 0)
    assert [source.step for source, _ in average.rows()] == [10, 20, 40]
    assert [weight for _, weight in average.rows()] == pytest.approx(shares.tolist(), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_not_a_positive_number_is_refused(temperature):
    node = {"_target_": "cosyexp.averaging.methods.Weighted", "temperature": temperature}
    with pytest.raises(UserError, match=r"method\.temperature=.* must be a (finite )?number > 0"):
        build(node, "method")


@pytest.mark.parametrize("method", [Weighted(), Greedy()], ids=["weighted", "greedy"])
def test_checkpoints_without_a_finite_loss_cannot_be_ranked(run, method):
    with pytest.raises(
        UserError, match=r"step_000000.0/llm\.safetensors has no finite validation loss"
    ):
        mixed(run, method, rule="last")


def test_a_soup_takes_what_lowers_the_loss_and_nothing_else(run, tmp_path):
    """The loss is a bowl around 14: 20 alone, with 40, which is worse, with 10, which is better."""
    tried: list[float] = []

    def evaluate(path):
        tried.append(read_tensors(path)["weight"][0].item())
        return {"loss": abs(tried[-1] - 14)}

    average = mixed(run, Greedy(), evaluate=evaluate)
    assert tried == [20, 30, 15] and [source.step for source, _ in average.rows()] == [10, 20]
    assert written(average, tmp_path) == [15.0] * 4


def test_a_soup_may_raise_a_metric(run):
    """The accuracy is highest at 14; the order is that of the greatest mse: 20, 40, 10."""
    tried: list[float] = []

    def evaluate(path):
        tried.append(read_tensors(path)["weight"][0].item())
        return {"mse": -abs(tried[-1] - 14)}

    average = mixed(run, Greedy(), evaluate=evaluate, criterion=Criterion("mse", "max"))
    assert tried == [20, 30, 15] and [source.step for source, _ in average.rows()] == [10, 20]


def test_running_sums_give_the_mean_of_all_steps_in_between(tmp_path):
    run, draw, total = (
        make_run(tmp_path / "run"),
        torch.Generator().manual_seed(0),
        torch.zeros(4, dtype=torch.float64),
    )
    kept = []
    for step in range(1, 41):
        weight = torch.randn(4, generator=draw)
        total += weight
        kept.append(weight)
        if step % 10 == 0:
            add(
                run,
                step,
                tensors={"weight": weight, "count": torch.tensor(step)},
                sum={"weight": total.clone()},
            )
    found = read_tensors(
        write_file(mixed(run, Running(), rule="last"), tmp_path / "out.safetensors")
    )
    torch.testing.assert_close(found["weight"], torch.stack(kept[20:]).mean(0), rtol=0, atol=1e-7)
    assert found["weight"].dtype == torch.float32 and found["count"] == 40
    with pytest.raises(UserError, match=r"between two checkpoints, and there is only .* step 40"):
        mixed(run, Running(), num=1, rule="last")


# where they go


def write(run: RunDirectory, rule: str = "last", num: int = 2, name: str | None = None) -> Path:
    """Writes the mean of some checkpoints into the run."""
    candidates = candidates_in(run.path)
    average = Uniform()(select(candidates, Selection(rule, num)), BY_LOSS, no_evaluation)
    return write_folder(average, candidates, name or f"{rule}{num}", {"method": "uniform"})


def test_folders_are_named_by_all_that_makes_them_differ():
    methods: dict[str, Method] = {
        "uniform": Uniform(),
        "weighted0.1": Weighted(temperature=0.1),
        "weighted0.25": Weighted(temperature=0.25),
        "greedy": Greedy(),
        "running": Running(),
    }
    names = {
        (rule, num, metric, window, method): folder_name(
            Selection(rule, num, Criterion(metric), window), methods[method]
        )
        for rule, window in (
            ("best", None),
            ("last", None),
            ("ema", None),
            ("window", (1, 2)),
            ("last", (1, 2)),
        )
        for num in (None, 3)
        for metric in ("loss", "mse")
        for method in methods
    }
    assert {
        "best5",
        "last3",
        "ema1",
        "window1-2",
        "last3-window1-2",
        "best5-mse",
        "last5-weighted0.1",
        "last3-mse-greedy",
    } <= set(names.values())

    def content(key):
        """Returns what the average is made of."""
        rule, num, metric, window, method = key
        # the metric matters for the best and for the methods that use it
        uses_metric = rule == "best" or methods[method].uses_metric
        # 3 of a window are the last 3 in it
        rule = "last" if rule == "window" and num else rule
        return rule, num, metric if uses_metric else None, window, method

    by_name: dict[str, set[Any]] = {}
    for key, name in names.items():
        by_name.setdefault(name, set()).add(content(key))
    assert all(len(contents) == 1 for contents in by_name.values())
    assert len(by_name) == len({content(key) for key in names})


def test_the_meta_of_an_average_lists_its_checkpoints(run):
    path = write(run, "best")
    assert (
        path == run.averages / "best2" / "llm.safetensors"
        and read_tensors(path)["weight"].tolist() == [30.0] * 4
    )
    meta = yaml.safe_load((path.parent / "meta.yaml").read_text())
    found = [
        (source["step"], source["weight"], source["loss_dict"]["loss"])
        for source in meta["sources"]
    ]
    assert found == [(20, 0.5, 1.0), (40, 0.5, 2.0)] and meta["run_step"] == 60
    assert all((run.path / source["file"]).is_file() for source in meta["sources"])
    assert meta["sha256"] == {"llm.safetensors": file_hash(path)} and meta["method"]
    assert find_weights(run, "average") == find_weights(run, "best2") == path


def test_an_average_of_the_same_name_is_replaced(run):
    write(run, num=3, name="mine")
    path = write(run, num=1, name="mine")
    assert read_tensors(path)["weight"].tolist() == [60.0] * 4
    assert [
        source["step"]
        for source in yaml.safe_load((path.parent / "meta.yaml").read_text())["sources"]
    ] == [60]
    assert [folder.name for folder in run.averages.glob("*/")] == ["mine"]


def test_an_average_that_fails_leaves_the_old_one(run):
    path = write(run)
    add(run, 70, tensors={"other": torch.zeros(1)})
    before = contents(run.path)
    with pytest.raises(UserError, match="holds other tensors"):
        write(run)
    assert contents(run.path) == before and find_weights(run, "average") == path


def forked(work: Callable[[], object]) -> Callable[[], int]:
    """Starts work in another process; returns a function that waits for its exit status."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("point", ["the weights", "the meta", "the old one's rename"])
def test_an_average_that_is_killed_leaves_the_old_one(run, point, monkeypatch):
    path = write(run)
    old, before = path.read_bytes(), contents(run.averages)
    add(run, 70)
    calls = iter(range(100))

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed():
        if point == "the weights":
            monkeypatch.setattr(os, "fsync", die)
        else:
            dying = {"the meta": 0, "the old one's rename": 1}[point]
            replace = os.replace
            monkeypatch.setattr(
                os, "replace", lambda *names: (die if next(calls) == dying else replace)(*names)
            )
        write(run)

    assert forked(killed)() == -signal.SIGKILL
    assert find_weights(run, "average").read_bytes() == old
    assert {
        name: found for name, found in contents(run.averages).items() if ".tmp/" not in name
    } == before
    assert read_tensors(write(run))["weight"].tolist() == [65.0] * 4
    assert [folder.name for folder in run.averages.glob("*/")] == ["last2"]


def test_two_at_once_do_not_mix(run):
    other = forked(lambda: [write(run, num=1, name="mine") for _ in range(5)])
    for _ in range(5):
        write(run, num=3, name="mine")
    assert other() == 0
    meta = yaml.safe_load((run.averages / "mine/meta.yaml").read_text())
    assert (
        read_tensors(find_weights(run, "mine"))["weight"].tolist()
        == [60.0 if len(meta["sources"]) == 1 else 50.0] * 4
    )


def test_a_kill_between_the_renames_is_mended(run):
    path = write(run)
    (path.parent).rename(run.averages / "last2.old.tmp")
    add(run, 70, tensors={"other": torch.zeros(1)})
    with pytest.raises(UserError, match="holds other tensors"):
        write(run)
    assert find_weights(run, "average") == path


def test_an_average_with_a_flipped_bit_is_not_used(run):
    path = write(run)
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes(content)
    for choice in ("average", "last2"):
        with pytest.raises(
            UserError,
            match=r"averages/last2 is damaged \(llm\.safetensors does not match its checksum\): "
            r"create it again",
        ):
            find_weights(run, choice)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_average_goes_where_output_says(run, tmp_path, suffix):
    out = tmp_path / "a" / f"b.{suffix}"
    assert write_file(mixed(run, Uniform(), rule="last", num=2), out) == out
    found = read_tensors(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    assert found["weight"].tolist() == [55.0] * 4
    assert list(out.parent.iterdir()) == [out] and not run.averages.exists()
