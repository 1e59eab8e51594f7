"""Which parameters of a network are trained, and with which learning rate and weight decay."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from cosyexp.config import TrainerConfig
from cosyexp.errors import UserError
from cosyexp.objectives.base import ParameterRule, Trainable
from cosyexp.training.engines.blocks import repeated_blocks


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern names a module or a parameter, or a module around it.

    A pattern is one or several consecutive parts of the dotted name: `llm`, `norm*`,
    `llm.encoders.0`, `*.bias`. `*` stands for any characters, `[0-3]` for one of several.
    """
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def refuse_unmatched(key: str, patterns: Iterable[str], names: Iterable[str]) -> None:
    """Checks that each pattern matches one of the names.

    Args:
        key: of the patterns in the config.
        patterns: the patterns.
        names: of parameters or modules.

    Raises:
        UserError: a pattern matches none of them.
    """
    known = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in known):
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
            raise UserError(
                f"{key}={pattern} matches nothing in {parts}: name a part of one of these, such as "
                f"{known[len(known) // 2]}"
            )


def freeze(network: nn.Module, patterns: Iterable[str]) -> None:
    """Freezes the parameters that a pattern of `trainer.freeze` matches.

    Raises:
        UserError: a pattern matches nothing, or no parameter is left.
    """
    named = dict(network.named_parameters())
    refuse_unmatched("trainer.freeze", patterns, named)
    for name, parameter in named.items():
        if any(matches(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(
            f"trainer.freeze=[{','.join(patterns)}] leaves nothing to train: freeze less"
        )


def parameter_rules(network: nn.Module, config: TrainerConfig) -> dict[str, ParameterRule]:
    """Returns the rule of each parameter that is not trained as all others, by name.

    With `layer_decay` d, a parameter in block i of n, counted over all lists of repeated blocks,
    learns with d^(n - 1 - i) of the rate (Howard & Ruder 2018, "ULMFiT", section 3.2), an
    embedding with d^n, and a parameter that is in no block with the whole rate.

    Raises:
        UserError: a pattern matches nothing, or the settings of learning rates are not valid.
    """
    names = [name for name, _ in network.named_parameters()]
    scales = learning_rate_scales(config.lr_scales)
    refuse_unmatched("trainer.lr_scales", scales, names)
    refuse_unmatched("trainer.no_decay", config.no_decay, names)
    depths = layer_depths(network) if config.layer_decay else {}
    rules = {}
    for name in names:
        scale = next((s for pattern, s in scales.items() if matches(pattern, name)), 1.0)
        scale *= (config.layer_decay or 1.0) ** depths.get(name, 0)
        decays = not any(matches(pattern, name) for pattern in config.no_decay)
        if scale != 1 or not decays:
            rules[name] = ParameterRule(scale, decays)
    return rules


def learning_rate_scales(given: Any) -> dict[str, float]:
    """Returns the factors of `trainer.lr_scales` by pattern.

    Raises:
        UserError: it is not a mapping from patterns to positive numbers.
    """
    scales = given or {}
    if not isinstance(scales, Mapping) or not all(
        isinstance(scale, int | float) and not isinstance(scale, bool) and scale > 0
        for scale in scales.values()
    ):
        raise UserError(
            f"trainer.lr_scales={given} must map patterns to numbers > 0, as in "
            f"trainer.lr_scales={{llm_decoder:10}}; trainer.freeze stops the training of a part"
        )
    return {str(pattern): float(scale) for pattern, scale in scales.items()}


def layer_depths(network: nn.Module) -> dict[str, int]:
    """Returns how many blocks lie between each parameter and the last block, by name.

    Embeddings lie before the first block; parameters in no block are left out.
    """
    blocks = list(repeated_blocks(network))
    depths = {
        parameter: len(blocks)
        for module in network.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    for i, block in enumerate(blocks):
        depths |= dict.fromkeys(block.parameters(), len(blocks) - 1 - i)
    return {name: depths[p] for name, p in network.named_parameters() if p in depths}


class TableRow(NamedTuple):
    """One line of the table of parameters: a part of a network, and how it is trained."""

    module: str
    parameters: int
    trained: int
    rates: set[float]
    decays: set[float]


def table(trainables: Mapping[str, Trainable]) -> str:
    """Returns a table of all networks: module, parameters, trained ones, learning rate, decay.

    Parameters that an adapter added belong to the module that they change.
    """
    rows = [row for name, trainable in trainables.items() for row in _rows(name, trainable)]
    width = max(len(row.module) for row in rows)
    lines = [f"{'module':{width}}  {'parameters':>12}  {'trained':>12}  {'lr':>15}  {'decay':>9}"]
    for row in rows:
        counts = f"{row.parameters:>12,}  {row.trained:>12,}"
        lines.append(
            f"{row.module:{width}}  {counts}  {_span(row.rates):>15}  {_span(row.decays):>9}"
        )
    return "\n".join(lines)


def _rows(name: str, trainable: Trainable) -> list[TableRow]:
    defaults = trainable.optimizer([nn.Parameter(torch.zeros(1))]).defaults
    rate, decay = float(defaults["lr"]), float(defaults.get("weight_decay", 0.0))
    rows: dict[str, TableRow] = {}
    for full_name, parameter in trainable.module.named_parameters():
        part = full_name.partition(".")[0]
        row = rows.get(part) or TableRow(f"{name}.{part}", 0, 0, set(), set())
        size = parameter.numel()
        row = row._replace(parameters=row.parameters + size)
        if parameter.requires_grad:
            rule = trainable.rules.get(full_name, ParameterRule())
            row = row._replace(trained=row.trained + size)
            row.rates.add(rate * rule.lr_scale)
            row.decays.add(decay * rule.decays)
        rows[part] = row
    return list(rows.values())


def _span(values: set[float]) -> str:
    """Returns the only value, or the lowest and the highest one."""
    return "-" if not values else " to ".join(f"{v:g}" for v in sorted({min(values), max(values)}))
