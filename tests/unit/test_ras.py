"""Repetition-aware sampling as a distribution, and the processor of docs/serving.md."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from cosyexp.models.llm.sampling import ras, ras_logits
from tests.support import ROOT

HISTORIES: list[list[int]] = [[], [3], [3, 3, 5, 7], [1, 2, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], [0] * 20]


def by_enumeration(logp_V: Tensor, history: list[int], **options: Any) -> Tensor:
    """The probability that `ras` chooses each token, over all first draws."""
    total_V = torch.zeros(len(logp_V), dtype=torch.double)
    weights: list[Tensor] = []

    def draw(index: int) -> Any:
        weights.clear()

        def chosen(given: Tensor) -> int:
            weights.append(given)
            return index if len(weights) == 1 else 0

        return chosen

    ras(logp_V, [], draw(0), **options)
    for index, weight in enumerate(firsts := weights[0] / weights[0].sum()):
        token = ras(logp_V, history, draw(index), **options)
        assert len(firsts)
        if len(weights) == 1:
            total_V[token] += weight
        else:
            total_V += weight * weights[1] / weights[1].sum()
    return total_V


@pytest.mark.parametrize("history", HISTORIES, ids=len)
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.5, "top_k": 3, "window": 4, "repetition": 0.5}], ids=["", "own"]
)
def test_ras_is_a_distribution(history, options):
    logp_V = torch.log_softmax(3 * torch.randn(12, dtype=torch.double), 0)
    found_V = ras_logits(logp_V, history, **options).exp()
    assert torch.allclose(found_V, by_enumeration(logp_V, history, **options), atol=1e-12)
    assert found_V.sum() == pytest.approx(1)


def test_the_processor_of_the_page_is_ras():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    processor = names["RAS"](first=10, last=21, prompt=2)
    ids, scores = torch.tensor([[4, 5, 13, 13], [6, 7, 12, 20]]), torch.randn(2, 25)
    found = processor(ids, scores)
    for row, history in enumerate(([3, 3], [2, 10])):
        wanted_V = ras_logits(scores[row, 10:22], history).float()
        assert torch.equal(found[row, 10:22], wanted_V)
        assert found[row, :10].isneginf().all() and found[row, 22:].isneginf().all()
