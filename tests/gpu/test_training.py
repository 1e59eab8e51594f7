"""Training on one GPU: the losses of the CPU, in every engine and precision; resume; compile."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import command, config, metrics, no_dropout, train_words

STEPS = 3
ENGINES = ("ddp", "fsdp", "deepspeed")
# relative, to the losses in fp32 on the CPU; convolutions round to TF32 on a GPU
TOLERANCES = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 2e-2}
CASES = [
    (model, engine)
    for model in ("llm", "flow", "hifigan")
    for engine in ENGINES
    if (model, engine) != ("hifigan", "fsdp")
]


def words(model: str, data: Path, *more: str) -> list[str]:
    """Words of a training without dropout, which draws other numbers on a GPU."""
    return train_words(model, data, *no_dropout(model), f"trainer.steps={STEPS}", *more)


def losses(run: Path) -> list[float]:
    """The training losses of a run."""
    return [line["train/loss"] for line in metrics(run) if "train/loss" in line]


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[float]]:
    """The losses of a model in fp32 on the CPU, computed once."""
    folder, found = tmp_path_factory.mktemp("cpu"), dict[str, list[float]]()

    def of(model: str) -> list[float]:
        if model not in found:
            hidden = {"CUDA_VISIBLE_DEVICES": ""}
            command("train", *words(model, data), f"run_dir={model}", cwd=folder, env=hidden)
            found[model] = losses(folder / model)
        return found[model]

    return of


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(("model", "engine"), CASES)
def test_losses_are_those_of_the_cpu(model, engine, precision, on_cpu, data, tmp_path):
    more = [f"engine={engine}", f"trainer.precision={precision}", "run_dir=run"]
    command("train", *words(model, data, *more), cwd=tmp_path)
    environment = (tmp_path / "run/environment.json").read_text()
    assert torch.cuda.get_device_name(0) in environment
    found = losses(tmp_path / "run")
    assert len(found) == STEPS
    assert found == pytest.approx(on_cpu(model), rel=TOLERANCES[precision])


@pytest.mark.parametrize("model", ["llm", "flow", "hifigan"])
def test_compiled_blocks_learn_the_same(model, on_cpu, data, tmp_path):
    command("train", *words(model, data, "engine.compile=true", "run_dir=run"), cwd=tmp_path)
    assert losses(tmp_path / "run") == pytest.approx(on_cpu(model), rel=TOLERANCES["fp32"])


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_fp16_lowers_its_loss_scale_at_an_overflow(engine, data, tmp_path):
    """A scale of 2^16 overflows in fp16 for a loss of this size; the update is skipped."""
    more = [f"engine={engine}", "trainer.precision=fp16", "trainer.accumulate=1", "run_dir=run"]
    command("train", *words("llm", data, *more), cwd=tmp_path)
    path = tmp_path / f"run/checkpoints/step_{STEPS:08d}/trainer/rank_0.pt"
    scaler = torch.load(path, weights_only=True)["engine"]["scalers"]["llm"]
    assert 1 <= scaler["scale"] <= 2**16


@pytest.mark.parametrize(
    ("model", "engine"), [("llm", "ddp"), ("flow", "ddp"), ("hifigan", "ddp"), ("llm", "fsdp")]
)
def test_a_resumed_run_ends_with_the_same_bits(model, engine, data, tmp_path):
    more = ["trainer.deterministic=true", f"engine={engine}", "trainer.valid_every=2"]
    steps = train_words(model, data, *more)  # with dropout, whose generator must go on too
    command("train", *steps, "trainer.steps=4", "run_dir=straight", cwd=tmp_path)
    command("train", *steps, "trainer.steps=2", "run_dir=resumed", cwd=tmp_path)
    command("train", *steps, "trainer.steps=4", "run_dir=resumed", cwd=tmp_path)
    last = f"checkpoints/step_00000004/{model}.safetensors"
    assert (tmp_path / "straight" / last).read_bytes() == (tmp_path / "resumed" / last).read_bytes()


def test_one_rank_of_torchrun_communicates_with_nccl(data, tmp_path):
    """FSDP needs a process group even for one rank."""
    from cosyexp.distributed import init_distributed

    info = init_distributed(60, needs_group=True)
    try:
        assert info.device == torch.device("cuda", 0) and info.owns_group
        total = torch.ones(4, device=info.device)
        torch.distributed.all_reduce(total)
        assert total.tolist() == [1.0] * 4
        assert "nccl" in str(torch.distributed.get_backend_config())
    finally:
        torch.distributed.destroy_process_group()


def test_batches_are_copied_from_pinned_memory(data):
    from cosyexp.run.directory import RunDirectory
    from cosyexp.training.build import assemble, build_engine

    settings = config("flow", data, "data.workers=1", "run_dir=unused")
    trainer = assemble(settings, RunDirectory("unused"), build_engine(settings))
    try:
        batch = trainer.loader.next_step()[0].batch
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert tensors and all(tensor.is_pinned() for tensor in tensors)
    finally:
        trainer.loader.close()
