"""What LoRA costs and gains beside full fine-tuning: the demo llm learns a voice it never heard.

Usage: python benchmarks/adapters.py <folder> [seed]

The llm is trained on three of the four demo voices, then fine-tuned on the fourth, whole and by an
adapter. The seed is that of the sentences, of the initial weights and of the batches. Runs in the
folder are resumed, so that the script can be stopped.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cosyexp.cli.compose import compose_train
from cosyexp.config.names import ADAPTER
from cosyexp.data.preparation import prepare_corpus
from cosyexp.data.shards import read_list
from cosyexp.registry import build
from cosyexp.run.adapters import adapter_note
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import read_json_lines
from cosyexp.run.tensors import read_tensors
from cosyexp.run.weights import find_weights, read_weights
from cosyexp.training.build import Job, train

VOICE = "dora"
CORPUS = {"minutes": 25, "held_out": 0.2}
BASE = ["trainer.steps=400"]
STEPS = ["trainer.steps=480", "trainer.valid_every=20", "model.warmup=20", "data.max_frames=300"]
FULL = ["optimizer.lr=1e-3"]
LORA = [
    "adapter=lora",
    "adapter.rank=6",
    "adapter.targets=[linear_q,linear_k,linear_v,linear_out,feed_forward,llm_decoder,spk_embed_affine_layer]",
    "optimizer.lr=3e-3",
    "trainer.lr_scales={lora_B:5}",
]


def make_data(folder: Path, seed: int) -> None:
    """Prepares the demo corpus, and splits it into the voice and the others."""
    demo = compose_train(["model=llm"])
    prepare_corpus({**demo.data.corpus, **CORPUS, "seed": seed}, demo.family, folder / "demo")
    for split in ("train", "valid"):
        table = pa.concat_tables(map(pq.read_table, read_list(str(folder / f"demo/{split}.list"))))
        own = pc.equal(table["spk"], VOICE)
        pq.write_table(table.filter(own), folder / f"voice_{split}.parquet")
        pq.write_table(table.filter(pc.invert(own)), folder / f"others_{split}.parquet")


def words(folder: Path, data: str, run: str, *more: str) -> list[str]:
    """Returns the overrides of a training on some of the voices."""
    lists = [f"data.{split}={folder}/{data}_{split}.parquet" for split in ("train", "valid")]
    common = ["model=llm", "data=parquet", *lists, "data.use_spk_embedding=true"]
    return [*common, f"run_dir={folder}/{run}", "logger=jsonl", *more]


def fit(overrides: Sequence[str]) -> RunDirectory:
    """Trains a run to its end, and returns it."""
    config = compose_train(overrides)
    train(Job(config))
    return RunDirectory(config.run_dir)


def killed_and_resumed(overrides: Sequence[str], run: RunDirectory) -> None:
    """Trains by the command, which is killed after its second checkpoint and started again."""
    command = [sys.executable, "-m", "cosyexp.train", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(run.checkpoints.folder.glob("step_*[0-9]"))) < 2 and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def losses(run: RunDirectory) -> dict[int, float]:
    """Returns the validation loss by step."""
    lines = (line for _, line in read_json_lines(run.metrics))
    return {line["step"]: line["valid/loss"] for line in lines if "valid/loss" in line}


def sizes(run: RunDirectory) -> tuple[int, int]:
    """Returns the bytes of the newest checkpoint, and of the optimizer state in it."""
    folder = run.checkpoints.all()[-1].path
    state = torch.load(folder / "trainer/rank_0.pt", weights_only=True)["engine"]["optimizers"]
    moments = [value for entry in state["llm"]["state"].values() for value in entry.values()]
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return whole, sum(moment.nbytes for moment in moments)


def products(path: Path) -> dict[str, Tensor]:
    """Returns the change of each layer, up to its scaling."""
    tensors, end = read_tensors(path), ".lora_A.weight"
    names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    return {name: tensors[f"{name}.lora_B.weight"] @ tensors[name + end] for name in names}


def mean_error(paths: Sequence[Path]) -> float:
    """Returns how far the product of mean factors is from the mean product, relatively."""
    factors = [read_tensors(path) for path in paths]
    mean = {name: torch.stack([f[name] for f in factors]).mean(0) for name in factors[0]}
    each = [products(path) for path in paths]
    exact = {name: torch.stack([e[name] for e in each]).mean(0) for name in each[0]}
    wrong = [mean[f"{n}.lora_B.weight"] @ mean[f"{n}.lora_A.weight"] - exact[n] for n in exact]
    norm = torch.cat([value.flatten() for value in exact.values()]).norm()
    return float(torch.cat([value.flatten() for value in wrong]).norm() / norm)


@torch.no_grad()
def mixed_batch_error(run: RunDirectory, paths: Sequence[Path]) -> float:
    """Returns how far rows with two adapters in one batch are from each adapter alone."""
    import peft

    note = adapter_note(paths[0] / ADAPTER)
    assert note is not None
    network = build(run.config().network, "network")
    network.load_state_dict(read_weights(Path(note.base))["model"])
    model = peft.PeftModel.from_pretrained(network, str(paths[0])).eval()
    model.load_adapter(str(paths[1]), "other")
    draw = torch.Generator().manual_seed(0)
    text, speech = (torch.randint(n, (4, 20), generator=draw) for n in (30, 512))
    lens = torch.full((4,), 20)
    order = torch.cat(
        [torch.tensor([40, 42]), torch.arange(20), torch.tensor([41]), torch.arange(20, 40)]
    )
    speaker = torch.randn(4, 192, generator=draw)
    inputs = (
        text,
        lens,
        speech,
        speaker,
        order.repeat(4, 1),
        lens + 23,
        torch.arange(22, 43).repeat(4, 1),
    )
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = model(*inputs)
    names = ["default", "other", "other", "default"]
    both = model(*inputs, adapter_names=names)
    expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
    return float((both - expected).abs().max())


def main() -> None:
    """Trains, and prints the numbers."""
    folder, seed = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_data(folder, seed)
    base = find_weights(fit(words(folder, "others", "base", *BASE, f"seed={seed}")), "best")
    start = [f"init_from={base}", *STEPS, f"seed={seed}"]
    runs = {
        "full": fit(words(folder, "voice", "full", *start, *FULL)),
        "lora": fit(words(folder, "voice", "lora", *start, *LORA)),
    }
    before = losses(runs["full"])[0]
    best = {name: min(losses(run).values()) for name, run in runs.items()}
    print(f"validation loss of the voice: base {before:.4f}")
    for name, run in runs.items():
        whole, optimizer = sizes(run)
        print(
            f"{name}: best {best[name]:.4f}, checkpoint {whole / 1e6:.2f} MB, optimizer state "
            f"{optimizer / 1e6:.2f} MB"
        )
    gain = (before - best["lora"]) / (before - best["full"])
    shares = [lora / full for full, lora in zip(*map(sizes, runs.values()), strict=True)]
    print(
        f"lora : full: gain {gain:.3f}, checkpoint {shares[0]:.3f}, optimizer state {shares[1]:.3f}"
    )
    paths = [checkpoint.path for checkpoint in runs["lora"].checkpoints.all()][-5:]
    error = mean_error([path / ADAPTER for path in paths])
    print(f"mean of the last {len(paths)} adapters: {error:.4f} of the mean change")
    print(f"two adapters in one batch: {mixed_batch_error(runs['lora'], paths[-2:]):.1e}")
    again = words(folder, "voice", "killed", *start, *LORA, "trainer.steps=40")
    killed_and_resumed(again, RunDirectory(folder / "killed"))
    ours, theirs = losses(RunDirectory(folder / "killed")), losses(runs["lora"])
    equal = all(loss == theirs[step] for step, loss in ours.items())
    print(f"killed and resumed: {'equal' if equal else 'NOT EQUAL'} after {max(ours)} steps")


if __name__ == "__main__":
    main()
