"""Averages by the command, of a run that keeps a checkpoint of each step."""

from pathlib import Path

import pytest
import torch
import yaml

from cosyexp.run.tensors import read_tensors
from cosyexp.training.evaluate import evaluator
from tests.apps.warm import Warm
from tests.support import MODELS, contents, train_words

STEPS = 5
EACH_STEP = [
    "checkpoint.every=1",
    "checkpoint.keep_last=99",
    "trainer.valid_every=1",
    "trainer.running_sum=true",
    "trainer.ema=0.9",
]


@pytest.fixture(scope="module")
def stepped(data: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run `run`."""
    folder = tmp_path_factory.mktemp("stepped")
    warm(
        "train",
        *train_words("llm", data, f"trainer.steps={STEPS}", *EACH_STEP, "run_dir=run"),
        cwd=folder,
    )
    return folder


def weights(folder: Path, step: int, name: str = "llm") -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"run/checkpoints/step_{step:08d}/{name}.safetensors")


def losses(folder: Path) -> dict[int, float]:
    metas = [
        yaml.safe_load(path.read_text()) for path in folder.glob("run/checkpoints/*/meta.yaml")
    ]
    return {meta["step"]: meta["loss_dict"]["loss"] for meta in metas}


def test_the_running_mean_is_the_mean_of_all_steps_in_between(stepped, warm):
    output = warm(
        "average", "run_dir=run", "select=window", "window=[1,4]", "method=running", cwd=stepped
    ).stdout
    assert "averaging the weights after steps 2 to 4" in output
    found = read_tensors(stepped / "run/averages/window1-4-running/llm.safetensors")
    parts = [weights(stepped, step) for step in (2, 3, 4)]
    for name, tensor in found.items():
        wanted = torch.stack([part[name].double() for part in parts]).mean(0).float()
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-9)
    assert found.keys() == parts[0].keys()


def test_ema_weights_are_those_of_the_newest_checkpoint(stepped, warm):
    warm("average", "run_dir=run", "select=ema", cwd=stepped)
    found, ema = (
        read_tensors(stepped / "run/averages/ema1/llm.safetensors"),
        weights(stepped, STEPS, "ema"),
    )
    assert found.keys() == ema.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in ema.items()
    )


def test_a_greedy_soup_is_no_worse_than_its_best_checkpoint(stepped, warm):
    warm("average", "run_dir=run", "num=3", "method=greedy", cwd=stepped)
    average = stepped / "run/averages/best3-greedy"
    sources = yaml.safe_load((average / "meta.yaml").read_text())["sources"]
    best = min(losses(stepped).values())
    assert best in [source["loss_dict"]["loss"] for source in sources]
    found = evaluator(stepped / "run")(average / "llm.safetensors")["loss"]
    assert found == best if len(sources) == 1 else found < best


def test_the_weights_of_the_checkpoints_are_printed_and_kept(stepped, warm):
    words = ["run_dir=run", "select=last", "num=2", "method=weighted", "method.temperature=0.05"]
    output = warm("average", *words, cwd=stepped).stdout.splitlines()
    path = stepped / "run/averages/last2-weighted0.05/meta.yaml"
    meta, known = yaml.safe_load(path.read_text()), losses(stepped)
    shares = torch.softmax(
        torch.tensor([known[4], known[5]], dtype=torch.float64) / -0.05, 0
    ).tolist()
    assert [source["weight"] for source in meta["sources"]] == pytest.approx(shares)
    assert [line.split() for line in output[1:3]] == [
        [str(n), "0", f"{known[n]:.4f}", f"{s:.3f}"] for n, s in zip((4, 5), shares, strict=True)
    ]
    weighted = "cosyexp.averaging.methods.Weighted"
    assert meta["method"] == {"_target_": weighted, "temperature": 0.05}
    assert (meta["select"], meta["metric"], meta["metric_mode"]) == ("last", "loss", "min")


def test_every_selection_and_method_can_be_repeated(stepped, warm):
    words = ["-m", "run_dir=run", "select=best,last", "num=2,3", "method=uniform,weighted,running"]
    warm("average", *words, cwd=stepped)
    before = contents(stepped / "run/averages")
    assert len({path.split("/")[0] for path in before}) >= 12
    warm("average", *words, cwd=stepped)
    assert contents(stepped / "run/averages") == before


def test_an_average_for_the_original_s_runtime(stepped, warm):
    warm("average", "run_dir=run", "select=last", "num=2", "output=llm.pt", cwd=stepped)
    found, parts = (
        torch.load(stepped / "llm.pt", weights_only=True),
        [weights(stepped, step) for step in (5, 4)],
    )
    assert list(found) == list(parts[0])
    assert all(
        torch.equal(tensor, (parts[0][name] + parts[1][name]) / 2)
        for name, tensor in found.items()
        if tensor.is_floating_point()
    )


@pytest.mark.parametrize("model", MODELS)
def test_an_average_is_validated_exactly_as_in_training(model, trained):
    run = trained / "runs/demo" / model
    measure = evaluator(run)
    for checkpoint in sorted((run / "checkpoints").iterdir())[-2:]:
        meta = yaml.safe_load((checkpoint / "meta.yaml").read_text())
        assert measure(checkpoint / f"{model}.safetensors") == meta["loss_dict"]
