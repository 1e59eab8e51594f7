"""The table of an export for the v1 estimator at its real size, with random weights: size, error, and latency against PyTorch.

python benchmarks/export.py [precision,...] [family] [model] [component]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cosyexp.registry import build

from cosyexp.cli.compose import composed
from cosyexp.exporting.components import fold_parametrizations
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.report import show
from cosyexp.exporting.verify import compare, latencies


def main() -> None:
    given = [
        *sys.argv[1:],
        *["fp32,fp16,int8", "cosyvoice", "flow", "flow.decoder.estimator"][len(sys.argv) - 1 :],
    ]
    precisions, family, model, name = given
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = composed(
        "train", [f"family={family}", f"model={model}", "tokenizer@family.tokenizer=characters"]
    )
    network: Any = build(config.network, "network")
    fold_parametrizations(network)
    component = build(config["components"][name], network.eval().requires_grad_(False)).eval()
    form, whole = Onnx(), {"runtime": Onnx().runtime(), "threads": 1}
    for precision in precisions.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / form.file(name, precision)
            form.write(component, path, precision)
            exported = form.load(path, precision)
            entry = {"bytes": path.stat().st_size, **compare(component, exported, precision)}
            show(
                precision, whole, {name: {**entry, "milliseconds": latencies(component, exported)}}
            )


if __name__ == "__main__":
    main()
