"""Headers that a sound safetensors file cannot have are refused before a number is read."""

import json
import struct

import pytest
import torch

from cosyexp.errors import UserError
from cosyexp.run.tensors import TensorFile, save_tensors


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-8, 12]},
        {"data_offsets": [0, 8]},
        {"data_offsets": [4, 24]},
        {"shape": [3]},
        {"shape": [2**62, 4]},
        {"dtype": "nonsense"},
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_numbers_is_refused(change, tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.arange(5.0)})
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = json.dumps({"a": {**header["a"], **change}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(UserError, match=r"a\.safetensors is not a valid safetensors file"):
        TensorFile(path)
