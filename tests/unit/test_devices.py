"""What only breaks on a GPU, as far as a machine without one can tell.

Fake tensors have a device, a type and a shape, but no numbers: an operation on tensors of two
devices raises, and so does one that needs a number on the host, such as `.item()`.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)

from cosyexp.cli.compose import compose_train
from cosyexp.device import onnx_providers, select_device
from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.training.build import Job, assemble, build_engine, train
from cosyexp.training.engines import common
from cosyexp.training.validation import eval_mode
from tests.tones import RATES, TASKS, train_words

DEVICE = torch.device("meta")  # stands for a GPU; a build without CUDA cannot run autograd for one


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Lets `.to` make fake tensors on a GPU that is not there, inside the mode."""
    real = Tensor.to

    def to(self: Tensor, *args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], torch.device) and args[0].type == "meta":
            return self if self.is_meta else torch.empty_like(self, device=DEVICE)
        return real(self, *args, **options)

    def update(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        assert {x.device for x in (applied, *gradients)} == {DEVICE}

    monkeypatch.setattr(Tensor, "to", to)
    # fused optimizers and autocast do not know the device
    monkeypatch.setattr(common, "update_or_skip", update)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    yield FakeTensorMode(allow_non_fake_inputs=True)


def test_fake_tensors_notice_mixed_devices_and_numbers_on_the_host(fake_gpu):
    with fake_gpu:
        on_gpu = torch.zeros(3).to(DEVICE)
        with pytest.raises(FakeTensorDeviceMismatchError):
            on_gpu + torch.zeros(3)
        with pytest.raises(DataDependentOutputException):
            on_gpu.sum().item()


@pytest.mark.parametrize("family", RATES)
@pytest.mark.parametrize(("mode", "model"), TASKS)
def test_a_step_stays_on_the_gpu(mode, model, family, lists, fake_gpu, monkeypatch, tmp_path):
    words = [*train_words(mode, model, family, lists[RATES[family]]), f"run_dir={tmp_path}/run"]
    if mode == "dpo":
        start = train_words("sft", model, family, lists[RATES[family]])
        sft = compose_train([*start, f"run_dir={tmp_path}/sft", "trainer.steps=0"])
        train(Job(sft))
        words.append(f"init_from={tmp_path}/sft")
    config = compose_train([*words, "trainer.steps=2", "trainer.accumulate=2"])
    trainer = assemble(config, RunDirectory(config.run_dir), build_engine(config))
    # reads the outcome of an update from pinned memory, one step later
    monkeypatch.setattr(trainer.nonfinite_guard, "add", lambda *update: None)
    steps = [trainer.loader.next_step() for _ in range(2)]
    # counted on the host, where numbers are not fake
    counts = iter([trainer._totals([micro.batch for micro in step]) for step in steps])
    monkeypatch.setattr(trainer, "_totals", lambda batches: next(counts))
    trainer.engine.device = DEVICE
    with fake_gpu:
        trainer.setup()
        for step in steps:
            trainer.step(step)
        with eval_mode(trainer.objective):
            trainer.objective.validate(steps[0][0].batch.to(DEVICE))
    for trainable in trainer.objective.trainables.values():
        assert {p.device for p in trainable.module.parameters()} == {DEVICE}
    trainer.loader.close()


# the key device= ---------------------------------------------------------------------------------


def test_the_device_is_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("auto") == torch.device("cuda")
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert select_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match=r"device=cuda:2 is not available.*cuda:0, cuda:1"):
        select_device("cuda:2")


@pytest.mark.parametrize("word", ["gpu", "cuda:x", "cuda:-1", "", "cpu:1x"])
def test_a_word_that_is_no_device(word):
    with pytest.raises(UserError, match=f"device={word} is unknown: give auto, cpu"):
        select_device(word)


def test_onnx_runtime_follows_the_device():
    assert onnx_providers(torch.device("cpu")) == ["CPUExecutionProvider"]
    (first, options), last = onnx_providers(torch.device("cuda", 1), tf32=False)
    assert (first, last) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert options == {"device_id": 1, "use_tf32": 0}
