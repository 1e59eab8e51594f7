"""Size, error and latency of an exported component, compared with PyTorch.

Usage: python benchmarks/export.py [precision,...] [family] [model] [component]

By default: the estimator of the v1 flow at its real size, with random weights, as ONNX.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cosyexp.cli.compose import compose_train
from cosyexp.exporting.components import fold_parametrizations
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.report import show
from cosyexp.exporting.verify import compare, latencies
from cosyexp.registry import build

DEFAULTS = ["fp32,fp16,int8", "cosyvoice", "flow", "flow.decoder.estimator"]


def main() -> None:
    """Prints a table for each precision."""
    precisions, family, model, name = [*sys.argv[1:], *DEFAULTS[len(sys.argv) - 1 :]]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # the tokenizer of a family may need a folder, and does not matter here
    words = [f"family={family}", f"model={model}", "tokenizer@family.tokenizer=characters"]
    config = compose_train(words)
    network: Any = build(config.network, "network")
    fold_parametrizations(network)
    network.eval().requires_grad_(False)
    component = build(config.components[name], "component", network).eval()
    form = Onnx()
    whole = {"runtime": form.runtime(torch.device("cpu")), "threads": 1}
    for precision in precisions.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / form.file(name, precision)
            form.write(component, path, precision)
            exported = form.load(path, precision)
            entry = {
                "bytes": path.stat().st_size,
                **compare(component, exported, precision),
                "milliseconds": latencies(component, exported),
            }
            show(precision, whole, {name: entry})


if __name__ == "__main__":
    main()
