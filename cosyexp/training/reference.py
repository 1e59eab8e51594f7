"""The reference of a preference training: a frozen network beside the policy, or its log-probabilities, computed once and kept."""

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import Draws
from cosyexp.data.sampler import BatchSampler
from cosyexp.errors import UserError
from cosyexp.objectives.base import ReferenceObjective
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import write_text
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.run.weights import load_weights, weights_of
from cosyexp.training.engines.base import Engine

log = logging.getLogger(__name__)
NOTE, LOGPS = "meta.yaml", "logps.safetensors"


def setup_reference(
    objective: ReferenceObjective,
    config: Mapping[str, Any],
    run: RunDirectory,
    datasets: Sequence[Dataset],
    engine: Engine,
) -> None:
    """Gives the objective its reference: weights of a run or a file, the same for as long as the run lasts."""
    if not objective.needs_reference:
        return
    source = config["reference"] or config["init_from"]
    if source is None:
        raise UserError(
            "a preference is measured against a reference: give reference=<an sft run, or a file of weights>"
        )
    key = cache_key(config, datasets)
    if objective.cache_reference and read_note(run).get("cached") == key:
        return attach_logps(run, datasets)
    path = weights_of(source)
    network = objective.frozen_copy()
    load_weights(network, path)
    if engine.rank == 0:
        pin_reference(run, path)
    if not objective.cache_reference:
        objective.frozen_modules = [network]
        return
    if engine.rank == 0:
        network.to(engine.device)
        log.info("computing the log-probabilities of the reference, once")
        seed, budget = config["seed"], config["data"]["max_frames"]
        values = [logps(objective, network, dataset, engine, budget, seed) for dataset in datasets]
        part = run.reference / "logps.part"
        save_tensors(part, dict(zip(("train", "valid"), values, strict=True)))
        part.replace(run.reference / LOGPS)
        write_text(run.reference / NOTE, yaml.safe_dump({**read_note(run), "cached": key}))
    engine.all_gather(None)
    attach_logps(run, datasets)


def cache_key(config: Mapping[str, Any], datasets: Sequence[Dataset]) -> str:
    """Of all that the log-probabilities depend on, but for the weights, whose hash stands beside it."""
    settings = (
        config["network"],
        config["objective"],
        config["trainer"]["precision"],
        config["seed"],
    )
    sizes = [zlib.crc32(dataset.lengths.tobytes()) for dataset in datasets]
    return hashlib.blake2b(
        json.dumps([settings, sizes], sort_keys=True).encode(), digest_size=8
    ).hexdigest()


def read_note(run: RunDirectory) -> dict[str, str]:
    """weights, sha256: of the reference. cached: the key of its log-probabilities, once they are there."""
    try:
        return dict(yaml.safe_load((run.reference / NOTE).read_text()))
    except FileNotFoundError:
        return {}


def pin_reference(run: RunDirectory, path: Path) -> None:
    """Notes which weights the reference has; UserError where a run that has begun goes on with others."""
    before, sha256 = read_note(run), file_hash(path)
    if before.get("sha256") == sha256:
        return
    if before and run.checkpoints.all():
        raise UserError(
            f"{run} was begun with the reference {before['weights']}, and {path} has other weights: give the former, or another run_dir="
        )
    write_text(run.reference / NOTE, yaml.safe_dump({"weights": str(path), "sha256": sha256}))


@torch.no_grad()
def logps(
    objective: ReferenceObjective,
    network: torch.nn.Module,
    dataset: Dataset,
    engine: Engine,
    budget: int,
    seed: int,
) -> Tensor:
    """(pairs, 2) of a whole dataset: log-probability of the chosen and of the rejected answer."""
    found = torch.zeros(len(dataset), 2)
    draws = Draws(seed, 0)
    for rows in tqdm(
        BatchSampler(lengths=dataset.lengths, budget=budget, seed=seed).epoch(0, 1),
        "reference",
        unit="batch",
        disable=None,
    ):
        with engine.autocast():
            values = objective.reference(
                dataset.batch(rows.tolist(), draws).to(engine.device), network
            )
        found[torch.from_numpy(rows)] = values.float().cpu().view(2, -1).T
    return found


def attach_logps(run: RunDirectory, datasets: Sequence[Dataset]) -> None:
    """The views put the log-probabilities into their batches."""
    tables = read_tensors(run.reference / LOGPS)
    for dataset, name in zip(datasets, ("train", "valid"), strict=True):
        dataset.extra = {"reference": tables[name].numpy()}
