"""Documents, weights and lists that somebody else may have made: a result or one sentence, soon."""

import json
import math
import os
import pickle
import socket
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosyexp.cli.sweep import read_table
from cosyexp.config import to_dict
from cosyexp.data.cache import cache_path
from cosyexp.data.fields import Wave
from cosyexp.data.index import read_indexes
from cosyexp.data.prepared import prepared
from cosyexp.data.shards import open_shard, read_list
from cosyexp.data.tokenizers import whisper_encoding
from cosyexp.errors import UserError
from cosyexp.exporting.report import merge_report
from cosyexp.registry import build
from cosyexp.run.checkpoint import META
from cosyexp.run.directory import RunDirectory
from cosyexp.run.documents import (
    DEPTH,
    DamagedFileError,
    Fields,
    read_bytes,
    read_json,
    read_json_lines,
    read_lines,
    read_yaml,
)
from cosyexp.run.files import to_yaml, write_json, write_yaml
from cosyexp.run.networks import load_network, refuse_other_network
from cosyexp.run.pickles import PickleFile, load_pickle, open_weights
from cosyexp.run.tensors import TensorFile, read_tensors, save_tensors
from cosyexp.run.weights import find_weights, load_weights
from cosyexp.synthesis.backends import read_excerpt
from cosyexp.training.loggers.base import BufferedLogger, RunInfo
from cosyexp.training.loggers.csv import Csv
from cosyexp.training.loggers.jsonl import JsonLines
from cosyexp.training.reference import read_note
from tests.support import config
from tests.unit.runs import add, make_run

DIGEST, OTHER = "a" * 64, "A" * 64
SECONDS = 20  # of the processor; a bomb that is let in takes minutes, what follows milliseconds


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Fails a test that took long."""
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


# what is no file ----------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def listener(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(2**33)


NO_FILES: list[Callable[[Path], None]] = [fifo, device, folder, listener]
READERS: dict[str, Callable[[Path], Any]] = {
    "bytes": read_bytes,
    "YAML": read_yaml,
    "JSON": read_json,
    "JSON lines": lambda path: list(read_json_lines(path)),
    "lines": read_lines,
    "safetensors": TensorFile,
    "pt": load_pickle,
    "pt in pieces": PickleFile,
    "parquet": open_shard,
    "list": lambda path: read_list(str(path)),
    "vocabulary": lambda path: whisper_encoding(str(path)),
    "excerpt": read_excerpt,
}


@pytest.mark.parametrize("make", NO_FILES)
@pytest.mark.parametrize("read", READERS)
def test_only_regular_files_are_read(read, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket has a short path
    make(Path("a"))
    with pytest.raises(UserError, match=r"\ba\b"):
        READERS[read](Path("a"))


@pytest.mark.parametrize("read", [name for name in READERS if name != "JSON lines"])
def test_nothing_large_is_read_whole(read, tmp_path):
    sparse(tmp_path / "a")
    with pytest.raises(UserError):
        READERS[read](tmp_path / "a")


def test_a_long_line_ends_the_lines(tmp_path):
    sparse(tmp_path / "a")
    assert list(read_json_lines(tmp_path / "a")) == []


# YAML and JSON ------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
HOSTILE = {
    "alias bomb": BOMB,
    "recursive": "&a [*a]",
    "deep list": "[" * 100_000,
    "deep blocks": "".join(" " * i + "a:\n" for i in range(500)),
    "deep and closed": "[" * 5000 + "]" * 5000,
    "long number": "step: " + "9" * 6000,
    "large number": f"step: {2**64}",
    "impossible date": "step: 2023-99-99",
    "date": "step: 2023-01-01",
    "python": "!!python/object/apply:os.system [true]",
    "binary": "step: !!binary aaaa",
    "set": "!!set {a, b}",
    "number as key": "1: a",
    "list as key": "[a]: b",
    "two documents": "a: 1\n---\nb: 2",
    "no YAML": "{{{",
    "half a character": '"\\ud800"',
    "control character": "a: \x01",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_sentence(name, tmp_path):
    (tmp_path / "a.yaml").write_text(HOSTILE[name])
    with pytest.raises(DamagedFileError, match=r"a\.yaml is damaged, or not what .*: restore it"):
        read_yaml(tmp_path / "a.yaml")


def test_yaml_of_very_many_values_is_not_read_whole(tmp_path):
    (tmp_path / "a.yaml").write_text(f"[{'1,' * 1_000_000}]")
    with pytest.raises(DamagedFileError, match="more than 500000 values"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[" * 500 + "]" * 500, "9" * 6000, str(2**64), '"\\ud800"', "{", "", "\xff"],
    ids=lambda text: text[:8],
)
def test_hostile_json_is_one_sentence(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedFileError, match=r"a\.json is damaged"):
        read_json(tmp_path / "a.json")


def test_what_we_write_is_what_we_read(tmp_path, data):
    shared = {"a": [1, 2.5, None, True, "text", "2023-01-01", "1e3", "ä", "yes", ""]}
    values = {"one": shared, "two": shared, "infinite": [math.inf]}
    write_yaml(tmp_path / "a.yaml", values)
    assert read_yaml(tmp_path / "a.yaml") == values
    stored = to_dict(config("flow", data))
    write_yaml(tmp_path / "config.yaml", stored)
    assert read_yaml(tmp_path / "config.yaml") == stored
    assert "&" not in to_yaml([shared, shared])
    write_json(tmp_path / "a.json", values["one"])
    assert read_json(tmp_path / "a.json") == shared


def test_the_originals_yaml_may_have_a_few_aliases(tmp_path):
    path, shared = tmp_path / "a.yaml", [1, 2]
    path.write_text(yaml.safe_dump({"a": shared, "b": shared}))
    assert "&" in path.read_text()
    assert read_yaml(path, aliases=16) == {"a": shared, "b": shared}
    for text in (BOMB, "&a [*a]"):
        path.write_text(text)
        with pytest.raises(DamagedFileError):
            read_yaml(path, aliases=16)


def test_the_deepest_document_is_read(tmp_path):
    (tmp_path / "a.json").write_text("[" * DEPTH + "]" * DEPTH)
    assert read_json(tmp_path / "a.json") and read_yaml(tmp_path / "a.json")


OTHER_TYPES: dict[str, list[Any]] = {
    "whole": [-1, 1.0, math.inf, True, "1", None, 2**63 - 1, [], {}],
    "number": [True, "1", None, []],
    "text": [1, None, ["a"]],
    "texts": ["a", [1], {"a": 1}, None],
    "numbers": [[1], {"a": "1"}, {"a": [1]}, {"a": True}, "text"],
    "counts": [[1], {"a": 1.5}, {"a": -1}],
    "inner": [[1], "a", None],
    "hashes": [
        *({}, None, [], "a", {"a": "b"}, {"a": 1}, {"a": OTHER}),
        *({name: DIGEST} for name in ("../a", "/a", "", "a/../b", "a\\b", "a\0", "./a")),
    ],
}


@pytest.mark.parametrize("method", OTHER_TYPES)
def test_a_field_of_another_type_is_one_sentence(method):
    for value in OTHER_TYPES[method]:
        fields = Fields({"key": value}, Path("a.yaml"))
        with pytest.raises(DamagedFileError, match=r"a\.yaml is damaged.*\(key[^)]* must be .*\)"):
            getattr(fields, method)("key")
    with pytest.raises(DamagedFileError, match="its content must be a mapping"):
        Fields([], Path("a.yaml"))


# the kinds of our files ---------------------------------------------------------------------------

METAS = [
    *("", "- 1", "step: .inf", "step: -1", "step: true", "step: '1'", HOSTILE["long number"], BOMB),
    *(f"step: 2\nsha256: {sha}" for sha in ("{}", "[]", "{a: b}", f"{{../a: {DIGEST}}}", "null")),
    *(
        f"step: 2\nsha256: {{llm.safetensors: {DIGEST}}}\n{line}"
        for line in (
            *("loss_dict: {loss: x}", "loss_dict: [1]", "threads: 1000000", "threads: -1"),
            *("epoch: .nan", "samples: x"),
        )
    ),
]


@pytest.mark.parametrize("meta", METAS, ids=lambda meta: meta[:60])
def test_a_hostile_meta_of_a_checkpoint_is_skipped_with_a_warning(meta, tmp_path, said):
    run = make_run(tmp_path / "run")
    add(run, 1)
    (add(run, 2).path / META).write_text(meta)
    assert [checkpoint.step for checkpoint in RunDirectory(run.path).checkpoints.all()] == [1]
    assert "step_00000002 is skipped: its meta.yaml is missing or unreadable (" in said.text


def test_weights_without_a_hash_are_never_taken(tmp_path):
    run = make_run(tmp_path / "run")
    path = add(run, 1, ema={"weight": torch.ones(4)}).path
    meta = read_yaml(path / META)
    write_yaml(
        path / META, {**meta, "sha256": {"ema.safetensors": meta["sha256"]["ema.safetensors"]}}
    )
    assert RunDirectory(run.path).checkpoints.latest() is None
    for choice in ("last", "best", "ema"):
        with pytest.raises(UserError, match="has no checkpoint for weights="):
            find_weights(RunDirectory(run.path), choice)
    write_yaml(path / META, meta)
    assert find_weights(RunDirectory(run.path), "ema") == path / "ema.safetensors"
    add(run, 2)
    with pytest.raises(UserError, match="has no checkpoint for weights=ema"):
        find_weights(RunDirectory(run.path), "ema")


@pytest.mark.parametrize("hashes", ["", "sha256: {}", f"sha256: {{other: {DIGEST}}}", BOMB])
def test_an_average_without_a_hash_is_never_taken(hashes, tmp_path):
    run = make_run(tmp_path / "run")
    average = run.averages / "best2"
    average.mkdir(parents=True)
    save_tensors(average / "llm.safetensors", {"weight": torch.ones(4)})
    (average / META).write_text(hashes)
    with pytest.raises(UserError, match=r"best2 is damaged \("):
        find_weights(run, "best2")


CONFIGS = [*HOSTILE.values(), "seed: 1", "format_version: 1\nseed: [1]", "[]", "format_version: x"]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:20])
def test_a_hostile_config_is_one_sentence(text, tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run"):
        run.config()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_other_hostile_documents_are_one_sentence(text, tmp_path):
    run = make_run(tmp_path / "run")
    run.reference.mkdir()
    for path, read in (
        (run.path / "changes.yaml", lambda: run.record_changes(1, {})),
        (run.reference / META, lambda: read_note(run)),
        (tmp_path / META, lambda: prepared(tmp_path)),
        (tmp_path / "llm.yaml", lambda: read_excerpt(tmp_path / "llm.yaml")),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=path.name):
            read()
        assert path.read_text() == text  # nothing was lost


class Sent(BufferedLogger):
    name = "sent"

    def connect(self, info: RunInfo, run_id: str | None) -> str:
        return run_id or "1"


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"step": "1", "names": []}', '{"step": 1, "names": "a", "id": ""}', "[" * 9999],
)
def test_a_hostile_record_of_a_logger_is_one_sentence(text, tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "loggers").mkdir()
    (run.path / "loggers/sent.json").write_text(text)
    with pytest.raises(UserError, match=r"sent\.json is damaged"):
        Sent().start(RunInfo(run, {}, 1))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"step": "2"}', '{"step": null}', "[" * 99999, "\xff"]
)
def test_a_damaged_line_of_metrics_is_dropped_and_the_others_stay(line, tmp_path):
    run = make_run(tmp_path / "run")
    lines = ['{"step": 1}', line, '{"step": 2}', '{"step": 3}', ""]
    run.metrics.write_bytes("\n".join(lines).encode("latin-1"))
    logger = JsonLines()
    logger.start(RunInfo(run, {}, 2))
    logger.log_metrics(3, 0, {"a": 1.0})
    logger.close()
    again = '{"step": 3, "epoch": 0, "a": 1.0}'
    assert run.metrics.read_text().splitlines() == ['{"step": 1}', '{"step": 2}', again]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "step\nx\n", "step\n" + "9" * 6000, "step\n1e5\n"])
def test_a_hostile_table_of_metrics_is_one_sentence(text, tmp_path):
    run = make_run(tmp_path / "run")
    (run.path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=r"metrics\.csv is damaged"):
        Csv().start(RunInfo(run, {}, 1))


def test_a_damaged_record_of_a_job_is_a_row_of_the_table(tmp_path):
    (tmp_path / "jobs").mkdir()
    contents = ['{"status": "completed", "overrides": "a=1"}', "[" * 9999, '{"overrides": 1}', "1"]
    for number, text in enumerate(contents):
        (tmp_path / f"jobs/{number}.json").write_text(text)
    (tmp_path / "jobs/no number.json").write_text("{}")
    columns, *rows = read_table(tmp_path)
    assert [row[columns.index("status")] for row in rows] == ["completed", *["unknown"] * 3]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", *(f'{{"components": {c}}}' for c in ("1", '{"a": 1}', '{"a": {"file": "../x"}}'))],
)
def test_a_damaged_report_of_an_export_is_written_anew(text, tmp_path):
    (tmp_path / "x").write_text("outside")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.fp32.json").write_text(text)
    merge_report(out, "fp32", {"threads": 1}, {"b": {"file": "b"}})
    assert read_json(out / "report.fp32.json") == {"threads": 1, "components": {"b": {"file": "b"}}}


def test_a_cache_that_is_no_file_is_computed_again(data, tmp_path):
    shard = read_list(str(data / "valid.list"))[0]
    copy = tmp_path / "a.parquet"
    copy.write_bytes(shard.read_bytes())
    fields = {"wave": Wave(16000)}
    (index,) = read_indexes([copy], fields, 1)
    path = cache_path(copy, fields["wave"])
    path.unlink()
    os.mkfifo(path)
    (again,) = read_indexes([copy], fields, 1)
    assert path.is_file() and (again.keys == index.keys).all()


# safetensors --------------------------------------------------------------------------------------


def tensor_file(path: Path, header: Any, size: int = 20, length: int | None = None) -> Path:
    """Writes a safetensors file with any header, and so many bytes of numbers."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)
    os.truncate(path, 8 + len(text) + size)
    return path


A = {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}
HEADERS = {
    "negative": {"a": {**A, "data_offsets": [-8, 12]}},
    "two ranges overlap": {"a": A, "b": {**A, "data_offsets": [10, 30]}},
    "one range twice": {"a": A, "b": A},
    "shape smaller than its bytes": {"a": {**A, "shape": [2]}},
    "float shape": {"a": {**A, "shape": [5.0]}},
    "negative shape": {"a": {**A, "shape": [-5]}},
    "overflowing shape": {"a": {**A, "shape": [2**62, 2**62]}},
    "large shape": {"a": {**A, "shape": [10**30]}},
    "text as shape": {"a": {**A, "shape": "5"}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": A},
    "metadata of a list": {"__metadata__": [], "a": A},
    "deep": b"[" * 100_000,
    "deep inside": b'{"a": ' + b"[" * 100_000,
    "no mapping": b"[]",
    "no JSON": b"{",
    "not UTF-8": b"\xff\xfe",
    "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_file_is_one_sentence(name, tmp_path):
    path = tensor_file(tmp_path / "a.safetensors", HEADERS[name])
    with pytest.raises(UserError, match=r"a\.safetensors"):
        TensorFile(path)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**27, 0])
def test_a_hostile_header_length_is_one_sentence(length, tmp_path):
    path = tensor_file(tmp_path / "a.safetensors", {"a": A}, length=length)
    with pytest.raises(UserError, match="not a valid safetensors file"):
        TensorFile(path)


def test_a_sparse_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorFile, "piece", lambda *_: pytest.fail("numbers were read"))
    header = {"a": {"dtype": "U8", "shape": [2**33], "data_offsets": [0, 2**33]}}
    path = tensor_file(tmp_path / "a.safetensors", header, 2**33)  # 8 GB, of which none is stored
    with pytest.raises(UserError, match=r"do not fit the network|unable to mmap"):
        load_weights(torch.nn.Linear(2, 3), path)


def test_a_thousand_names_of_a_tensor_share_its_memory(tmp_path):
    tensor = torch.zeros(2**20)
    save_tensors(tmp_path / "a", {"a": tensor, **{f"b{i}": tensor for i in range(1000)}})
    tensors = read_tensors(tmp_path / "a")
    assert len(tensors) == 1001 and len({t.data_ptr() for t in tensors.values()}) == 1


# .pt ----------------------------------------------------------------------------------------------


def saved(path: Path, content: Any) -> None:
    torch.save(content, path)


def repack(
    path: Path, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED
) -> None:
    """Writes a file of two tensors with changed entries."""
    saved(path, TWO)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


class Call:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def in_pickle(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Replaces bytes of the pickle in an archive."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert old in content
        return content.replace(old, new)

    return lambda path: repack(path, change)


def as_pickle(pickled: bytes) -> Callable[[Path], None]:
    """Replaces the whole pickle in an archive."""
    return lambda path: repack(path, lambda n, c: pickled if n.endswith("data.pkl") else c)


def share_bytes(path: Path) -> None:
    """Lets both storages of an archive begin at the same byte."""
    saved(path, TWO)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"a/data/{i}").header_offset for i in range(2))
    at = content.rindex(struct.pack("<I", second) + b"a/data/1")
    path.write_bytes(content[:at] + struct.pack("<I", first) + content[at + 4 :])


def two_pickles(path: Path) -> None:
    """Adds an entry that torch, which ignores the case of names, may read instead."""
    saved(path, TWO)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/DATA.pkl", b"N.")


def truncate(path: Path) -> None:
    saved(path, TWO)
    path.write_bytes(path.read_bytes()[:-100])


TWO = {"a": torch.zeros(200), "b": torch.ones(200)}
CALLS = {
    "bytes": Call(bytearray, 10**11),
    "a tensor": Call(torch.Tensor, 10**6, 10**6),
    "a storage": Call(torch.FloatStorage, 10**10),
    "a copy": Call(OrderedDict, [["a", 1]]),  # copies of copies grow without end
    "a command": Call(os.system, "true"),
}
HUNDRED = struct.pack("<Q", 10**11)
FILES: dict[str, Callable[[Path], Any]] = {
    **{name: partial(saved, content={"a": call}) for name, call in CALLS.items()},
    "storages share bytes": share_bytes,
    # 200 numbers: K 200, as size of a storage and, before a 1-tuple, of a tensor
    "storage larger than its bytes": in_pickle(b"K\xc8t", b"M\xff\xfft"),
    "tensor larger than its storage": in_pickle(b"K\xc8\x85", b"M\xff\xff\x85"),
    "negative": in_pickle(b"K\xc8", b"J\xff\xff\xff\xff"),
    "missing storage": in_pickle(b"X\x01\x00\x00\x001", b"X\x01\x00\x00\x007"),
    "expanded": lambda path: saved(path, {"a": torch.zeros(1).expand(10**9)}),
    "no pickle": as_pickle(b"x"),
    "endless": as_pickle(b"\x80\x02" + b"(" * 10**6),
    "a large memo": as_pickle(b"\x80\x02Nr\xff\xff\xff\x7f"),
    "a large bytearray": as_pickle(b"\x80\x05\x96" + HUNDRED + b"."),
    "two pickles": two_pickles,
    "truncated": truncate,
    "a pickle alone": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "zeros": lambda path: path.write_bytes(bytes(1000)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_pt_file_is_one_sentence(name, tmp_path):
    path = tmp_path / "a.pt"
    FILES[name](path)
    for read in (load_pickle, open_weights):
        with pytest.raises(UserError, match=r"a\.pt"):
            read(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 2).to_sparse(), torch.ones(2, 2, device="meta")],
    ids=["sparse", "meta"],
)
def test_a_tensor_without_numbers_is_not_averaged(tensor, tmp_path):
    saved(tmp_path / "a.pt", {"a": tensor})
    with pytest.raises(UserError, match="holds a in a layout that cannot be read in pieces"):
        open_weights(tmp_path / "a.pt")


def test_a_compressed_pt_file_is_one_sentence(tmp_path):
    repack(tmp_path / "a.pt", lambda n, c: c, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"a\.pt \(its entries are compressed\)"):
        load_pickle(tmp_path / "a.pt")


def test_tensors_that_overlap_are_not_averaged(tmp_path):
    whole = torch.zeros(200)
    saved(tmp_path / "a.pt", {f"a{i}": whole[i : 100 + i] for i in range(50)})
    with pytest.raises(UserError, match=r"a\.pt holds a0 and a1 in the same bytes"):
        open_weights(tmp_path / "a.pt")


def test_sound_pt_files_are_read(tmp_path):
    whole = torch.arange(24.0)
    tagged: Any = torch.arange(3.0)
    tagged.tag = "an attribute"
    content: dict[str, Any] = {
        "g": tagged,
        "a": whole[:12].view(3, 4).T,
        "b": torch.nn.Parameter(whole[12:].bfloat16()),
        "c": whole.to(torch.float8_e4m3fn),
        "d": [torch.zeros(0), {"e": (1, 2.5, None, True, "text")}, OrderedDict(f=torch.Size([2]))],
        "step": 2**40,
    }
    saved(tmp_path / "a.pt", content)
    found = load_pickle(tmp_path / "a.pt")
    assert torch.equal(found["g"], tagged)
    assert torch.equal(found["a"], content["a"]) and torch.equal(found["b"], content["b"])
    assert found["d"][1:] == content["d"][1:] and found["step"] == 2**40
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    saved(tmp_path / "b.pt", network.state_dict())
    with open_weights(tmp_path / "b.pt") as file:
        assert all(torch.equal(file[n], t) for n, t in network.state_dict().items())


# networks -----------------------------------------------------------------------------------------


def test_a_network_of_any_size_is_compared_before_it_is_allocated(data, tmp_path):
    node = config("llm", data).network
    network = build(node, "network")
    save_tensors(tmp_path / "llm.safetensors", network.state_dict())
    loaded = load_network(node, tmp_path / "llm.safetensors").state_dict()
    assert all(torch.equal(loaded[name], t) for name, t in network.state_dict().items())
    large = {**node, "llm": {**node["llm"], "hidden": 10**9}}  # terabytes
    with pytest.raises(UserError, match="of another shape"):
        refuse_other_network(large, tmp_path / "llm.safetensors")
    long = {**node, "llm": {**node["llm"], "blocks": 10**9}}
    with pytest.raises(UserError, match="many more tensors than"):
        refuse_other_network(long, tmp_path / "llm.safetensors")
