"""The reference of a preference training: a frozen network beside the policy, or its log-probabilities, computed once and kept."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from cosyexp.data.corpus import Corpus
from cosyexp.data.draws import Draws
from cosyexp.data.sampler import Plan
from cosyexp.errors import UserError
from cosyexp.objectives.base import Comparing
from cosyexp.run.checkpoint import file_hash
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import write_text
from cosyexp.run.tensors import read_tensors, save_tensors
from cosyexp.run.weights import load_weights, weights_of
from cosyexp.training.engines.base import Engine

log = logging.getLogger(__name__)


def take_reference(
    objective: Comparing, source: str | None, run: RunDirectory, corpora: Sequence[Corpus], engine: Engine, *, budget: int, seed: int
) -> None:
    """Gives the objective its reference: weights of a run or a file, the same for as long as the run lasts.

    budget: padded tokens of a batch, where the log-probabilities are cached.
    """
    if not objective.needs_reference:
        return
    if source is None:
        raise UserError("a preference is measured against a reference: give reference=<an sft run, or a file of weights>")
    cached = run.reference / "logps.safetensors"
    if objective.cache_reference and cached.exists():
        return hand_out(read_tensors(cached), corpora)
    path = weights_of(source)
    network = objective.frozen_copy()
    load_weights(network, path)
    if engine.rank == 0:
        keep_identity(run, path)
    if not objective.cache_reference:
        objective.helpers = [network]
        return
    if engine.rank == 0:
        network.to(engine.device)
        log.info("computing the log-probabilities of the reference, once")
        values = [logps(objective, network, corpus, engine, budget, seed) for corpus in corpora]
        run.reference.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part")
        save_tensors(part, dict(zip(("train", "valid"), values, strict=True)))
        part.replace(cached)
    engine.gather(None)
    hand_out(read_tensors(cached), corpora)


def keep_identity(run: RunDirectory, path: Path) -> None:
    """Notes which weights the reference has; UserError where a run goes on with others."""
    note, sha256 = run.reference / "meta.yaml", file_hash(path)
    if not note.exists():
        return write_text(note, yaml.safe_dump({"weights": str(path), "sha256": sha256}))
    before = yaml.safe_load(note.read_text())
    if before["sha256"] != sha256:
        raise UserError(
            f"{run} was begun with the reference {before['weights']}, and {path} has other weights: give the former, or another run_dir="
        )


@torch.no_grad()
def logps(objective: Comparing, network: torch.nn.Module, corpus: Corpus, engine: Engine, budget: int, seed: int) -> Tensor:
    """(pairs, 2) of a whole corpus: log-probability of the chosen and of the rejected answer."""
    found = torch.zeros(len(corpus), 2)
    draws = Draws(seed, 0)
    for rows in tqdm(Plan(lengths=corpus.lengths, budget=budget, seed=seed).epoch(0, 1), "reference", unit="batch", disable=None):
        with engine.autocast():
            values = objective.reference(corpus.batch(rows.tolist(), draws).to(engine.device), network)
        found[torch.from_numpy(rows)] = values.float().cpu().view(2, -1).T
    return found


def hand_out(tables: dict[str, Tensor], corpora: Sequence[Corpus]) -> None:
    """The views put the log-probabilities into their batches."""
    for corpus, table in zip(corpora, (tables["train"], tables["valid"]), strict=True):
        if len(table) != len(corpus):
            raise UserError("the log-probabilities of the reference were computed on other data: give the former, or another run_dir=")
        corpus.extra = {"reference": table.numpy()}
