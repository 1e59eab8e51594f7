"""Sets up the reference model of a preference training.

The objective gets either a frozen network or, with `cache_reference`, the log-probabilities of the
reference, which are computed once for both data sets and kept in the run directory. The reference
of an adapter is its base: the policy with the adapter switched off.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cosyexp.config import TrainConfig
from cosyexp.data.dataset import Dataset
from cosyexp.data.draws import Draws
from cosyexp.data.sampler import BatchSampler
from cosyexp.errors import UserError
from cosyexp.objectives.base import ReferenceObjective
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import Fields, read_yaml
from cosyexp.run.files import replacement, write_yaml
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.run.weights import load_weights, weights_of
from cosyexp.training.adapters import AdapterOff
from cosyexp.training.engines.base import Engine

log = logging.getLogger(__name__)
NOTE, LOGPS = "meta.yaml", "logps.safetensors"


def setup_reference(
    objective: ReferenceObjective,
    config: TrainConfig,
    run: RunDirectory,
    datasets: Sequence[Dataset | None],
    engine: Engine,
) -> None:
    """Gives an objective its reference model, if it needs one.

    Args:
        objective: the objective.
        config: the config of the run. `reference`, or else `init_from`, names the run or weights
            file of the reference.
        run: the run directory, which records the reference: a run may not change it.
        datasets: the training and the validation data.
        engine: for its device, precision and communication.

    Raises:
        UserError: the config names no reference or, of an adapter, another one than its base.
    """
    if not objective.needs_reference:
        return
    if config.adapter and config.reference:
        raise UserError(
            "the reference of an adapter is its base, so reference= has no use: leave it out"
        )
    source = config.reference or config.init_from
    if source is None:
        raise UserError(
            "this objective needs a reference model: give reference=<an SFT run or a weights file>"
        )
    key = cache_key(objective, config, datasets)
    if objective.cache_reference and _is_cached(run, source, key, engine):
        return attach_logps(run, datasets)
    path = weights_of(source)
    if config.adapter:
        network: torch.nn.Module = AdapterOff(list(objective.trainables.values())[-1].module)
    else:
        network = objective.frozen_copy()
        load_weights(network, path)
    if engine.rank == 0:
        pin_reference(run, path)
    if not objective.cache_reference:
        objective.frozen_modules = [network]
        return
    if engine.rank == 0:
        network.to(engine.device)
        log.info("computing the log-probabilities of the reference (once for this run)")
        seed, budget = config.seed, config.data.max_frames
        values = {
            name: logps(objective, network, dataset, engine, budget, seed)
            for name, dataset in zip(("train", "valid"), datasets, strict=True)
            if dataset is not None
        }
        with replacement(run.file("reference", LOGPS)) as part:
            save_tensors(part, values)
        write_yaml(run.file("reference", NOTE), {**read_note(run), "cached": key})
    engine.all_gather(None)
    attach_logps(run, datasets)


def cache_key(
    objective: ReferenceObjective, config: TrainConfig, datasets: Sequence[Dataset | None]
) -> str:
    """Returns a key of everything that the cached log-probabilities depend on, except the weights.

    The hash of the weights is recorded by `pin_reference`.
    """
    settings = {name: config.objective.get(name) for name in objective.reference_settings}
    parts = (config.network, config.model.collator, settings, config.trainer.precision.value)
    data = [dataset and dataset.fingerprint for dataset in datasets]
    content = json.dumps([parts, config.seed, data], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def _is_cached(run: RunDirectory, source: str, key: str, engine: Engine) -> bool:
    """Returns whether the log-probabilities are cached, as rank 0 finds it; all ranks call it.

    Weights that are gone are not needed any more.
    """
    cached = engine.rank == 0 and read_note(run).get("cached") == key
    if cached and Path(source).expanduser().exists():
        cached = read_note(run).get("sha256") == file_hash(weights_of(source))
    return bool(engine.all_gather(cached)[0])


def read_note(run: RunDirectory) -> dict[str, str]:
    """Returns what the run directory records about the reference, or {} if there is nothing yet.

    The keys are `weights` (its file), `sha256` (of that file) and, once its log-probabilities are
    cached, `cached` (their `cache_key`); what is not known is empty.
    """
    path = run.reference / NOTE
    try:
        fields = Fields(read_yaml(path), path)
    except FileNotFoundError:
        return {}
    return {name: fields.text(name, "") for name in ("weights", "sha256", "cached")}


def pin_reference(run: RunDirectory, path: Path) -> None:
    """Records the weights of the reference in the run directory.

    Raises:
        UserError: the run has checkpoints and was started with other reference weights.
    """
    before, sha256 = read_note(run), file_hash(path)
    if before.get("sha256") == sha256:
        return
    if before and run.checkpoints.all():
        raise UserError(
            f"{run} was started with the reference {before['weights']}, and {path} holds other "
            f"weights: give the old reference=, or another run_dir="
        )
    write_yaml(run.file("reference", NOTE), {"weights": str(path), "sha256": sha256})


@torch.no_grad()
def logps(
    objective: ReferenceObjective,
    network: torch.nn.Module,
    dataset: Dataset,
    engine: Engine,
    budget: int,
    seed: int,
) -> Tensor:
    """Computes the log-probabilities of all answers of a data set under the reference.

    Args:
        objective: the objective.
        network: the reference network, on the engine's device.
        dataset: the data set of preference pairs.
        engine: for its device and precision.
        budget: size of a batch, as `data.max_frames`.
        seed: of the run.

    Returns:
        (pairs, 2): the log-probability of the chosen and of the rejected answer.
    """
    table = torch.zeros(len(dataset), 2)
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
        table[torch.from_numpy(rows)] = values.float().cpu().view(2, -1).T
    return table


def attach_logps(run: RunDirectory, datasets: Sequence[Dataset | None]) -> None:
    """Adds the cached log-probabilities to the rows of the data sets, as the field `reference`."""
    tables = read_tensors(run.reference / LOGPS)
    for dataset, name in zip(datasets, ("train", "valid"), strict=True):
        if dataset is not None:
            dataset.extra = {"reference": tables[name].numpy()}
