"""Attaches low-rank adapters to a network that is fine-tuned, through peft.

An adapter changes some linear layers of a frozen base. To add another kind, write a class such as
`Lora` and a YAML in `conf/adapter/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from cosyexp.arguments import Positive
from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.run.adapters import Adapter, AdapterNote, sha256_of
from cosyexp.training.engines.blocks import repeated_blocks
from cosyexp.training.parameters import matches, refuse_unmatched


class AdapterKind(Protocol):
    """Protocol of the kinds of adapters."""

    def attach(self, network: nn.Module, base: Path) -> Adapter:
        """Adds an adapter to a network that has the weights of a file, and freezes all else."""
        ...


@register("adapter")
class Lora:
    """Low-rank adaptation (Hu et al. 2021, "LoRA"): W becomes W + alpha / rank * B A.

    B is 0 at first, so that the training starts from the base.

    Args:
        rank: of the change of each layer.
        alpha: scale of the changes.
        targets: patterns of the linear layers that are changed, see `matches`; None for those of
            the repeated blocks, which are attention and feed-forward.
        rslora: scale by alpha / sqrt(rank) (Kalajdzievski 2023, "rsLoRA").
        dora: train the norms of the rows of the changed weights too (Liu et al. 2024, "DoRA").
    """

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: Positive = 16,
        targets: Sequence[str] | None = None,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        self.rank, self.alpha, self.targets = rank, alpha, targets
        self.rslora, self.dora = rslora, dora

    def attach(self, network: nn.Module, base: Path) -> Adapter:
        """Replaces the targets by layers with factors A and B, and freezes all else.

        Args:
            network: the network, with the weights of the base.
            base: file of these weights.

        Raises:
            UserError: there are no such targets, or peft is not installed.
        """
        peft, sha256 = import_peft(), sha256_of(base)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=select(network, self.targets),
            use_rslora=self.rslora,
            use_dora=self.dora,
            base_model_name_or_path=str(base),
            revision=sha256,
        )
        content = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
        content |= {"peft_type": "LORA", "inference_mode": True}
        peft.inject_adapter_in_model(config, network)
        scaling = self.alpha / (self.rank**0.5 if self.rslora else self.rank)
        return Adapter(AdapterNote(str(base), sha256, scaling), content)


class AdapterOff(nn.Module):
    """A network with its adapter switched off: its base, without memory for another network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        layer = import_peft().tuners.tuners_utils.BaseTunerLayer
        self.network = network
        self.layers = [module for module in network.modules() if isinstance(module, layer)]

    def forward(self, *inputs: Any) -> Any:
        """Calls the network without its adapter."""
        # peft's enable_adapters would also change which parameters are trained
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            return self.network(*inputs)
        finally:
            for layer in self.layers:
                layer._disable_adapters = False


def select(network: nn.Module, patterns: Sequence[str] | None) -> list[str]:
    """Returns the names of the linear layers that an adapter changes.

    Args:
        network: the network.
        patterns: of the layers; None for those of the repeated blocks. Among these are not the
            layers that a module names in `shared_by_rows`: they transform nothing of the rows of a
            batch, so that two adapters in one batch could not differ there.

    Raises:
        UserError: a pattern matches no linear layer, or there are none.
    """
    linear = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    if patterns is not None:
        refuse_unmatched("adapter.targets", patterns, linear)
        return [name for name in linear if any(matches(pattern, name) for pattern in patterns)]
    inside = {module for block in repeated_blocks(network) for module in block.modules()}
    shared = {
        getattr(module, name) for module in inside for name in getattr(module, "shared_by_rows", ())
    }
    names = [name for name, module in linear.items() if module in inside - shared]
    if not names:
        raise UserError(
            "adapter=lora changes linear layers in repeated blocks, of which this network has "
            "none: train an llm or a flow, or give adapter=none"
        )
    return names


def import_peft() -> Any:
    """Imports peft.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise UserError(
            "adapter=lora needs a package that is not installed: pip install 'cosyexp[lora]'"
        ) from None
    return peft
