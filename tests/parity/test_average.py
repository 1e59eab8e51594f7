"""Averages of the original's model directories equal those of its average_model.py."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cosyexp.averaging.candidates import CheckpointFolder, candidates_in
from cosyexp.averaging.methods import Uniform, WeightedSum
from cosyexp.averaging.select import Selection, select
from cosyexp.averaging.write import write_file, write_folder
from cosyexp.errors import UserError
from cosyexp.run.checkpoint import BY_LOSS
from tests.support import folder_from

LOSSES = {0: 3.0, 1: 1.5, 2: 2.0, 3: 1.2, 4: 5.0, 5: 1.3}  # of the checkpoint of each epoch


@pytest.fixture
def recorded():
    return folder_from("COSYEXP_PARITY", "average_model")


@pytest.fixture
def models(recorded, tmp_path):
    """A writable copy of the model directory."""
    folder = tmp_path / "models"
    shutil.copytree(recorded / "ckpt", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    return folder


def add(models: Path, name: str, source: int, loss: float | None = None, **progress: int) -> None:
    """Adds a checkpoint with the weights of epoch `source`, and with a loss unless it is None."""
    shutil.copyfile(models / f"epoch_{source}_whole.pt", models / f"{name}.pt")
    if loss is not None:
        (models / f"{name}.yaml").write_text(
            yaml.safe_dump({**progress, "loss_dict": {"loss": loss, "acc": 0.0}})
        )


class Executes:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def selected(models: Path, rule: str = "best", num: int = 1) -> list[str]:
    """Returns the names of the selected checkpoints."""
    return [c.path.name for c in select(candidates_in(models), Selection(rule, num))]


def average_of_best(folder: CheckpointFolder, num: int) -> WeightedSum:
    """Returns the mean of the `num` best checkpoints."""
    sources = select(folder, Selection("best", num))
    return Uniform()(sources, BY_LOSS, lambda _: pytest.fail("a plain mean needs no validation"))


@pytest.mark.parametrize("num", [1, 3, 5])
def test_the_best_are_averaged_as_the_original_did(recorded, models, num):
    average = average_of_best(candidates_in(models), num)
    ours = torch.load(write_file(average, models.parent / "ours.pt"), weights_only=True)
    theirs = torch.load(recorded / f"avg_best{num}.pt", weights_only=True)
    epochs = sorted(LOSSES, key=LOSSES.__getitem__)[:num]
    parts = [
        torch.load(recorded / f"ckpt/epoch_{epoch}_whole.pt", weights_only=True) for epoch in epochs
    ]
    assert list(ours) == list(theirs)  # neither epoch nor step
    for name, tensor in ours.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(0)
        if tensor.dtype == torch.float32:
            assert torch.equal(tensor, theirs[name])
        elif tensor.is_floating_point():
            # the original adds in half precision, with a rounding for each term; ours rounds once
            rounding = torch.finfo(tensor.dtype).eps * mean.abs().max()
            assert tensor.dtype == parts[0][name].dtype
            assert (tensor.double() - mean).abs().max() <= rounding / 2 + 1e-9
            assert (tensor.double() - theirs[name].double()).abs().max() <= num * rounding
        else:  # the original makes fractions of integers
            assert torch.equal(tensor, parts[epochs.index(max(epochs))][name])


def test_a_score_belongs_to_the_file_of_its_own_name(recorded, models):
    """The original looks up the file of an epoch for the score of a step.

    So it took epoch_3, epoch_0, epoch_3 of these.
    """
    add(models, "epoch_3_step_250", 4, 0.5, epoch=3, step=250)
    add(models, "epoch_0_step_50", 2, 0.7, epoch=0, step=50)
    assert selected(models, num=3) == [
        "epoch_3_step_250.pt",
        "epoch_0_step_50.pt",
        "epoch_3_whole.pt",
    ]
    candidates = candidates_in(models)
    path = write_folder(average_of_best(candidates, 3), candidates, "best3", {})
    assert path == models / "averages/best3/model.pt"
    ours = torch.load(path, weights_only=True)
    wrong = torch.load(recorded / "avg_stepyamls_best3.pt", weights_only=True)
    parts = [
        torch.load(recorded / f"ckpt/epoch_{epoch}_whole.pt", weights_only=True)["a.weight"]
        for epoch in (4, 2, 3)
    ]
    assert torch.equal(ours["a.weight"], (parts[0] + parts[1] + parts[2]) / 3) and not torch.equal(
        ours["a.weight"], wrong["a.weight"]
    )
    sources = yaml.safe_load((models / "averages/best3/meta.yaml").read_text())["sources"]
    assert [(s["file"], s["step"], s["epoch"]) for s in sources] == [
        ("epoch_0_step_50.pt", 50, 0),
        ("epoch_3_step_250.pt", 250, 3),
        ("epoch_3_whole.pt", 300, 3),
    ]


def test_init_and_train_have_no_scores_that_count(models):
    for name in ("init", "train"):
        add(models, name, 0, 0.001)
    assert selected(models) == ["epoch_3_whole.pt"] and len(candidates_in(models).found) == 6


def test_checkpoints_without_scores_can_be_the_last_but_not_the_best(models, said):
    add(models, "epoch_6_whole", 5)
    add(models, "epoch_6_step_490", 5)
    (models / "epoch_7_whole.yaml").write_text("loss_dict: {loss: 0.1}\n")
    assert selected(models, "last", 3) == [
        "epoch_6_whole.pt",
        "epoch_6_step_490.pt",
        "epoch_5_whole.pt",
    ]
    assert selected(models) == ["epoch_3_whole.pt"]
    assert "epoch_7_whole.yaml is skipped: there is no epoch_7_whole.pt" in said.text


def test_a_damaged_checkpoint_is_skipped_with_a_warning(models, said):
    path = models / "epoch_3_whole.pt"
    content = path.read_bytes()
    weight = torch.load(path, weights_only=True)["a.weight"].numpy().tobytes()
    at = content.index(weight)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    # torch does not notice that
    assert torch.load(path, weights_only=True)["a.weight"].numpy().tobytes() != weight
    (models / "epoch_5_whole.pt").write_bytes(content[:1000])
    assert selected(models, num=2) == ["epoch_1_whole.pt", "epoch_2_whole.pt"]
    assert "epoch_3_whole.pt is skipped: it is not what was written" in said.text
    assert "epoch_5_whole.pt is skipped: it is cut short" in said.text


def test_what_the_original_does_not_keep_is_a_user_error(models):
    for option in ("sums", "ema"):
        with pytest.raises(
            UserError,
            match="models is a model directory of the original, which keeps weights alone",
        ):
            candidates_in(models, **{option: True})
    for path in models.glob("epoch_*.pt"):
        path.unlink()
    wanted = r"models is not a run directory .* has no checkpoints of the original \(epoch_\*\.pt\)"
    with pytest.raises(UserError, match=wanted):
        candidates_in(models)


def test_a_checkpoint_that_would_run_code_is_not_read(models):
    torch.save(
        {"a": torch.zeros(1), "b": Executes(models / "executed")}, models / "epoch_3_whole.pt"
    )
    with pytest.raises(UserError, match=r"cannot load weights from .*epoch_3_whole\.pt"):
        write_file(average_of_best(candidates_in(models), 2), models / "ours.pt")
    assert not (models / "executed").exists() and not list(models.glob("ours.pt*"))
