"""Means of checkpoints."""

import math
import os
import random
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml

from cosyexp.averaging.candidates import candidates_in
from cosyexp.averaging.mean import PIECE, combine
from cosyexp.averaging.methods import mix
from cosyexp.averaging.select import Choice, select
from cosyexp.averaging.write import folder_name, write_file, write_folder
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.tensors import TensorFile, read_tensors, save_tensors
from cosyexp.run.weights import find_weights
from tests.support import contents, environment
from tests.unit.runs import add, cut, make_run


def average(files, out, pickled=False):
    combine([(file, 1.0) for file in files], len(files), files[-1], out, pickled)


def mean_of(folder, *contents):
    """The average of files, the newest last."""
    files = []
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


def pt_mean_of(folder, *contents):
    files = [folder / f"{i}.pt" for i in range(len(contents))]
    for file, tensors in zip(files, contents, strict=True):
        torch.save(tensors, file)
    average(files, folder / "mean.pt", pickled=True)
    return torch.load(folder / "mean.pt", weights_only=True)


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


def test_step_and_epoch_are_no_weights(tmp_path):
    contents = [
        {"a": torch.ones(2), "step": step, "epoch": torch.tensor(epoch)}
        for step, epoch in ((1, 1), (5, 2))
    ]
    assert list(pt_mean_of(tmp_path, *contents)) == ["a"]


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


MEASURE = """
import re, sys
from pathlib import Path
from cosyexp.averaging.mean import combine

def most():  # memory so far, in megabytes; ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

small, large, out = map(Path, sys.argv[1:])
pickled = out.suffix == ".pt"
combine([(small, 1.0)] * 3, 3, small, out, pickled)  # the code's own pages count too
before = most()
combine([(large, 1.0)] * 3, 3, large, out, pickled)
print(most() - before)
"""


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_memory_grows_with_nothing(tmp_path, kind):
    """Not even with the largest tensor."""
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
def run(tmp_path):
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


def chosen(run, how, num=None, **options):
    return [
        candidate.step for candidate in select(candidates_in(run.path), Choice(how, num, **options))
    ]


def test_the_best_are_those_with_the_lowest_loss(run):
    assert chosen(run, "best", 1) == [20]
    assert chosen(run, "best", 2) == [20, 40]
    assert chosen(run, "best", 3) == [20, 40, 10]


def test_the_best_may_go_by_another_metric(run):
    assert chosen(run, "best", 2, metric="mse") == [30, 10]


def test_the_last_need_no_validation(run):
    assert chosen(run, "last", 3) == [60, 50, 40] and chosen(run, "last") == [60, 50, 40, 30, 20]


def test_a_window_has_all_from_a_step_to_a_step(run):
    assert chosen(run, "window", window=(20, 50)) == [50, 40, 30, 20]
    assert chosen(run, "window", 2, window=(20, 50)) == [50, 40]
    assert chosen(run, "best", 1, window=(30, 60)) == [40]


def test_too_few_are_refused_unless_not_strict(run, said):
    with pytest.raises(
        UserError, match=r"has 3 checkpoints to choose from, not num=4.*strict=false"
    ):
        chosen(run, "best", 4)
    assert (
        chosen(run, "best", 4, strict=False) == [20, 40, 10]
        and "has 3 checkpoints to choose from, not num=4" in said.text
    )


def test_damaged_checkpoints_are_passed_over_aloud(run, said):
    for step in (20, 60):
        cut(run.path / "checkpoints" / f"step_{step:08d}" / "llm.safetensors")
    assert chosen(run, "best", 2) == [40, 10] and chosen(run, "last", 2) == [50, 40]
    assert (
        "step_00000020 is passed over" in said.text and "step_00000060 is passed over" in said.text
    )


def test_one_flipped_bit_is_noticed(run, said):
    path = run.path / "checkpoints/step_00000020/llm.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert (
        chosen(run, "best", 1) == [40]
        and "step_00000020" in said.text
        and "llm.safetensors does not match its checksum" in said.text
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"how": "last", "num": 0}, "num=0"),
        ({"how": "last", "num": -1}, "num=-1"),
        (
            {"how": "best", "num": 1, "metric": "nonsense"},
            "no checkpoint with a validation nonsense.*select=last",
        ),
        ({"how": "window"}, r"give window=\[from,to\]"),
        ({"how": "window", "window": (5,)}, r"window=\[5\] is no stretch"),
        ({"how": "last", "window": (5, 4)}, r"window=\[5, 4\] is no stretch"),
        (
            {"how": "window", "window": (61, 99)},
            "no checkpoint from step 61 to 99: it has those of steps 10 to 60",
        ),
    ],
)
def test_what_cannot_be_chosen_is_a_sentence(run, options, message):
    with pytest.raises(UserError, match=message):
        chosen(run, **options)


def test_a_run_without_checkpoints_is_not_told_to_select_the_last_ones(tmp_path):
    with pytest.raises(UserError, match="no checkpoint") as error:
        chosen(make_run(tmp_path / "run"), "last", 1)
    assert "select=last" not in str(error.value)


def test_what_was_not_kept_in_training_is_named_with_its_option(run):
    for option, key in (("ema", "trainer.ema="), ("sums", "trainer.running_sum=true")):
        with pytest.raises(UserError, match=f"no checkpoint with .*{key}"):
            candidates_in(run.path, **{option: True})


# how much of each


def mixed(run, method="uniform", num=3, how="best", evaluate=None, **options):
    candidates = candidates_in(run.path, sums=method == "running")
    return mix(
        select(candidates, Choice(how, num)),
        method,
        "loss",
        options.get("temperature", 1.0),
        evaluate,
    )


def written(average, folder):
    return read_tensors(write_file(average, folder / "out.safetensors"))["weight"].tolist()


def test_weights_are_the_softmax_of_the_losses(run, tmp_path):
    average = mixed(run, "weighted", temperature=0.5)
    shares = torch.softmax(
        torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64) / -0.5, 0
    ).tolist()  # of the steps 10, 20, 40
    assert [weight for _, weight in average.rows()] == pytest.approx(shares, rel=1e-12)
    assert written(average, tmp_path) == pytest.approx(
        [10 * shares[0] + 20 * shares[1] + 40 * shares[2]] * 4
    )


def test_a_low_temperature_takes_the_best_alone(run, tmp_path):
    assert written(mixed(run, "weighted", temperature=1e-6), tmp_path) == [20.0] * 4


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_weighs_nothing_is_refused(run, temperature):
    with pytest.raises(UserError, match="temperature="):
        mixed(run, "weighted", temperature=temperature)


@pytest.mark.parametrize("method", ["weighted", "greedy"])
def test_what_has_no_finite_loss_cannot_be_gone_by(run, method):
    with pytest.raises(
        UserError, match=r"step_000000.0/llm\.safetensors has no finite validation loss"
    ):
        mixed(run, method, how="last")


def test_a_soup_takes_what_lowers_the_loss_and_nothing_else(run, tmp_path):
    """The loss is a bowl around 14: 20 alone, then with 40, which is worse, then with 10, which is better."""
    tried = []

    def evaluate(path):
        tried.append(read_tensors(path)["weight"][0].item())
        return {"loss": abs(tried[-1] - 14)}

    average = mixed(run, "greedy", evaluate=evaluate)
    assert tried == [20, 30, 15] and [source.step for source, _ in average.rows()] == [10, 20]
    assert written(average, tmp_path) == [15.0] * 4


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
        write_file(mixed(run, "running", how="last"), tmp_path / "out.safetensors")
    )
    torch.testing.assert_close(found["weight"], torch.stack(kept[20:]).mean(0), rtol=0, atol=1e-7)
    assert found["weight"].dtype == torch.float32 and found["count"] == 40
    with pytest.raises(UserError, match="between two checkpoints"):
        mixed(run, "running", num=1, how="last")


# where they go


def write(run, how="last", num=2, name=None):
    candidates = candidates_in(run.path)
    average = mix(select(candidates, Choice(how, num)), "uniform", "loss", 1.0, None)
    return write_folder(average, candidates, name or f"{how}{num}", {"method": "uniform"})


def test_folders_are_named_by_all_that_makes_them_differ():
    names = {
        folder_name(Choice(how, num, metric, window), method, temperature)
        for how, window in (
            ("best", None),
            ("last", None),
            ("ema", None),
            ("window", (1, 2)),
            ("last", (1, 2)),
        )
        for num in (None, 3)
        for metric in ("loss", "mse")
        for method in ("uniform", "weighted", "greedy", "running")
        for temperature in (0.1, 0.25)
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
    } <= names
    # the metric matters for best, and for what goes by it, the temperature for weighted; 3 of a window are the last 3 in it
    assert len(names) == 2 * 10 + 7 * 8


def test_an_average_says_what_it_was_made_of(run):
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
    assert found == [(20, 0.5, 1.0), (40, 0.5, 2.0)]
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


def forked(work):
    """Begins it in a process of its own; returns what waits for its exit status."""
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

    def die(*_):
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
            match=r"averages/last2 is damaged \(llm\.safetensors does not match its checksum\): create it again",
        ):
            find_weights(run, choice)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_average_goes_where_output_says(run, tmp_path, suffix):
    out = tmp_path / "a" / f"b.{suffix}"
    assert write_file(mixed(run, how="last", num=2), out) == out
    found = read_tensors(out) if suffix == "safetensors" else torch.load(out, weights_only=True)
    assert found["weight"].tolist() == [55.0] * 4
    assert list(out.parent.iterdir()) == [out] and not run.averages.exists()
