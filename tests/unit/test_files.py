"""Where cosyexp writes: below its folders, through one module, and never through a link."""

import ast
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosyexp.averaging.candidates import candidates_in
from cosyexp.averaging.methods import WeightedSum
from cosyexp.averaging.write import write_folder
from cosyexp.config import TrainConfig
from cosyexp.config.names import plain_name
from cosyexp.data.cache import compute_shard
from cosyexp.data.corpora.demo import Demo
from cosyexp.data.fields import Wave
from cosyexp.data.preparation import PrepareOptions, prepare
from cosyexp.data.shards import read_list
from cosyexp.errors import UserError
from cosyexp.run.directory import RunDirectory
from cosyexp.run.files import append, below, create, replace_file, replacement, write_text
from cosyexp.run.folders import begin_folder, commit_folder, locked, staged_files
from cosyexp.training.build import build_trainer
from tests.support import ROOT, config, contents
from tests.tones import CORPUS
from tests.unit.runs import add, make_run, smallest_config

LINK = "is a symbolic link"


def everything(folder: Path) -> dict[str, bytes | None]:
    """Returns what lies below a folder, with the content of files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def lead_out(path: Path, outside: Path) -> None:
    """Moves a file or folder outside, or makes a new one there, and puts a link in its place."""
    outside.mkdir()
    target = outside / path.name.lstrip(".")
    if path.exists():
        shutil.move(path, target)
    else:
        target.write_text("precious\n")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)


# links --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with all loggers that need no service, and an average."""
    run = tmp_path_factory.mktemp("links") / "run"
    with build_trainer(words(data, run)) as trainer:
        trainer.fit()
    average(RunDirectory(run))
    return run


def words(data: Path, run: Path) -> TrainConfig:
    return config(
        "llm", data, "trainer.steps=2", "logger=[jsonl,csv,tensorboard]", f"run_dir={run}"
    )


def average(run: RunDirectory, name: str = "last1") -> Path:
    found = candidates_in(run.path)
    return write_folder(WeightedSum(found.found[-1:], [1.0], 1.0), found, name, {})


# what a training would write, beside what the run of the fixture holds
MISSING = ["changes.yaml", "loggers", "wandb", "profile", "reference", "exports"]
MISSING += ["config.yaml.1.part", "checkpoints/step_00000002.tmp", "checkpoints/step_00000009.tmp"]
MISSING += ["logs/rank_1.log", "logs/nonfinite_step_1.llm.rank_0.json", "averages/.lock"]


def test_a_training_writes_through_no_link(trained, data, tmp_path):
    inside = [
        p.relative_to(trained) for p in trained.rglob("*") if len(p.parts) - len(trained.parts) < 3
    ]
    places = [
        p for p in inside if p.parts[0] not in ("averages", "tensorboard") or len(p.parts) == 1
    ]
    assert {"config.yaml", "metrics.jsonl", "metrics.csv", "logs/rank_0.log", ".lock"} <= {
        str(place) for place in places
    }
    for number, place in enumerate([*places, *map(Path, MISSING)]):
        run, outside = tmp_path / f"run{number}", tmp_path / f"outside{number}"
        shutil.copytree(trained, run)
        lead_out(run / place, outside)
        before = everything(outside), everything(run)
        with (
            pytest.raises(UserError, match=f"{place.name} {LINK}"),
            build_trainer(words(data, run)),
        ):
            pytest.fail(f"{place} was written through")
        assert (everything(outside), everything(run)) == before, place


def test_a_run_directory_may_be_a_link(trained, data, tmp_path):
    shutil.copytree(trained, tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    more = config("llm", data, "trainer.steps=3", f"run_dir={tmp_path / 'run'}")
    with build_trainer(more) as trainer:
        trainer.fit()
    assert (tmp_path / "disk/checkpoints/step_00000003").is_dir()
    assert average(RunDirectory(tmp_path / "run")).is_relative_to(tmp_path / "run/averages")


@pytest.mark.parametrize(
    "place",
    ["averages", "averages/.lock", *(f"averages/last1{s}" for s in ("", ".tmp", ".old.tmp"))],
)
def test_an_average_is_written_through_no_link(tmp_path, place):
    run = make_run(tmp_path / "run")
    add(run, 1)
    lead_out(run.path / place, tmp_path / "outside")
    before = everything(tmp_path / "outside")
    with pytest.raises(UserError, match=LINK):
        average(run)
    assert everything(tmp_path / "outside") == before


@pytest.mark.parametrize("place", [".job.part", "llm.zip"])
def test_an_export_is_written_through_no_link(tmp_path, place):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.zip").write_text("older")
    lead_out(out / place, tmp_path / "outside")
    before = everything(tmp_path)
    with pytest.raises(UserError, match=LINK), staged_files(out, "job") as part:
        for name in ("a.zip", "llm.zip"):
            (part / name).write_text("newer")
    assert everything(tmp_path) == before


def test_the_folder_of_an_export_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with staged_files(tmp_path / "out", "job") as part:
        (part / "a").write_text("new")
    assert everything(tmp_path / "disk") == {"a": b"new"}


@pytest.mark.parametrize("place", ["meta.yaml", "train.list", "parts", "train", "report.html"])
def test_a_preparation_is_written_through_no_link(tmp_path, place):
    out = tmp_path / "out"
    out.mkdir()
    lead_out(out / place, tmp_path / "outside")
    before = everything(tmp_path)
    options = PrepareOptions(token_rate=50, codes=512, speaker_dim=192)
    with pytest.raises(UserError):
        prepare(Demo(**CORPUS), out, options, {})
    assert everything(tmp_path) == before


def test_features_are_written_through_no_link(data, tmp_path):
    shard = tmp_path / "a.parquet"
    shutil.copy(read_list(str(data / "valid.list"))[0], shard)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "a.fields").symlink_to(outside)
    with pytest.raises(UserError, match=f"a.fields {LINK}"):
        compute_shard(shard, [Wave(16000)])
    assert not any(outside.iterdir())


def replaced(path: Path) -> None:
    with replacement(path) as part:
        part.write_text("new")


def created(path: Path) -> None:
    with create(path) as file:
        file.write(b"new")


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "new"),
    "replacement": replaced,
    "create": created,
    "append": lambda path: append(path).write("new\n"),
    "lock": lambda path: locked(path).__enter__(),
}


@pytest.mark.parametrize("write", WRITERS)
def test_no_writer_follows_a_link(tmp_path, write):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(UserError, match=f"{name} {LINK}"):
            WRITERS[write](tmp_path / name)
    assert everything(tmp_path) == {"precious": b"precious", "link": b"precious", "dangling": None}


def test_a_link_in_the_place_of_a_temporary_file(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f"a.{os.getpid()}.part").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=rf"a\.\d+\.part {LINK}"), replace_file(tmp_path / "a"):
        pytest.fail("it was opened")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_fifo_is_not_appended_to(tmp_path):
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="log is not a file"):
        append(tmp_path / "log")
    os.close(reader)


# names --------------------------------------------------------------------------------------------

NAMES = ["", ".", "..", "../a", "/etc/a", "a/b", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_stays_below_its_folder(tmp_path, name):
    with pytest.raises(UserError, match="cannot be the name of a file"):
        below(tmp_path, "fine", name)


@pytest.mark.parametrize("name", [*NAMES, ".hidden", "a\\b", "a\nb", "a" * 300])
def test_a_name_of_a_config_is_a_plain_name(name):
    with pytest.raises(UserError, match="becomes the name of a file"):
        plain_name(name, "model.name")


@pytest.mark.parametrize(
    "values",
    [
        {"model": {"name": "../llm"}},
        {"model": {"official": "/tmp/llm"}},
        {"components": {"../../llm": {}}},
    ],
    ids=str,
)
def test_names_in_a_config_are_checked(values):
    with pytest.raises(UserError, match="becomes the name of a file"):
        smallest_config(values)


# leftovers ----------------------------------------------------------------------------------------


LEFTOVERS = (
    *("config.yaml.1.part", "logs/a.json.2.part", "averages/last2.tmp/llm.safetensors"),
    *("exports/onnx/.llm.fp32.part/llm.onnx", "checkpoints/step_00000009.tmp/a"),
)


def test_the_next_start_removes_what_a_killed_process_left(trained, data, tmp_path):
    run = RunDirectory(tmp_path / "run")
    shutil.copytree(trained, run.path)
    mine = [run.path / "exports/onnx/x.part", run.path / "notes.tmp", run.path / "logs/mine.txt"]
    for path in mine[1:]:
        path.write_text("mine")
    before = contents(run.path)
    for name in LEFTOVERS:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("half")
    run.remove_partial()
    assert contents(run.path) == before
    assert not [p for p in run.path.rglob("*") if p.suffix in (".part", ".tmp") and p not in mine]


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    run = make_run(tmp_path / "run")
    part = begin_folder(below(run.path, "averages", "last2"))
    with (
        locked(run.path / "averages/.lock"),
        staged_files(run.exports / "jit", "llm") as staged,
        staged_files(run.exports / "jit", "flow"),  # two exports at once
    ):
        run.remove_partial()
        assert part.is_dir() and staged.is_dir()
    run.remove_partial()
    assert not part.exists()


def test_a_folder_whose_replacement_was_interrupted_comes_back(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    add(run, 1)
    rename = os.replace

    def interrupt(source: Path, target: Path) -> None:
        if str(source).endswith("step_00000001.tmp"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        add(run, 1)
    monkeypatch.undo()
    assert not RunDirectory(run.path).checkpoints.all()
    run.remove_partial()
    (found,) = RunDirectory(run.path).checkpoints.all()
    assert found.corruption() is None and found.step == 1


def test_a_folder_that_is_begun_again_is_not_lost(tmp_path):
    old = tmp_path / "a.old.tmp"
    old.mkdir()
    (old / "file").write_text("old")
    begin_folder(tmp_path / "a")
    assert everything(tmp_path) == {"a": None, "a/file": b"old", "a.tmp": None}


def test_a_committed_folder_replaces_the_one_before(tmp_path):
    for content in ("old", "new"):
        part = begin_folder(tmp_path / "a.b")
        (part / "file").write_text(content)
        commit_folder(part)
    assert everything(tmp_path) == {"a.b": None, "a.b/file": b"new"}


# the wall -----------------------------------------------------------------------------------------

PACKAGES = ("cosyexp", "hydra_plugins")
WRITING_MODULES = ("cosyexp/run/files.py", "cosyexp/run/folders.py")
METHODS = (
    *("write_bytes", "write_text", "mkdir", "makedirs", "rename", "renames", "unlink", "rmdir"),
    *("rmtree", "copy", "copy2", "copyfile", "copytree", "move", "symlink_to", "hardlink_to"),
    *("touch", "truncate", "symlink", "link", "mkfifo", "chmod", "savez", "tofile", "savefig"),
)
WRITERS_OF_LIBRARIES = ("TemporaryDirectory", "NamedTemporaryFile", "mkdtemp", "mkstemp", "save",
                        "SummaryWriter", "FileHandler", "dump", "export_chrome_trace",
                        "save_file", "to_csv", "aoti_compile_and_package")  # fmt: skip
LIBRARIES = ("torch", "onnx", "np", "numpy", "OmegaConf", "program", "save")
# Calls that are left to a library, each with the path that it gets.
EXCEPTIONS = {
    ("cosyexp/averaging/methods.py", "TemporaryDirectory"): "a new folder of the system",
    ("cosyexp/training/callbacks/evaluate.py", "TemporaryDirectory"): "a new folder of the system",
    ("cosyexp/training/plan.py", "TemporaryDirectory"): "a new folder of the system",
    ("cosyexp/training/loggers/tensorboard.py", "SummaryWriter"): "a folder that was checked",
    ("cosyexp/training/callbacks/profiler.py", "export_chrome_trace"): "the part of a replacement",
    ("cosyexp/training/engines/shards.py", "save"): "below the new folder of a checkpoint",
    ("cosyexp/exporting/onnx.py", "save"): "a path of staged_files",
    ("cosyexp/exporting/pt2.py", "aoti_compile_and_package"): "a path of staged_files",
    ("cosyexp/exporting/pt2.py", "save"): "memory",
    ("cosyexp/exporting/jit.py", "save"): "memory",
    ("cosyexp/exporting/official.py", "save"): "memory",
    ("cosyexp/training/saving.py", "save"): "memory",
    ("cosyexp/run/pickles.py", "dump"): "memory",
    ("cosyexp/run/documents.py", "open"): "reads alone",
    ("cosyexp/evaluation/curves.py", "savefig"): "an open file of replace_file",
    ("cosyexp/pages/__init__.py", "savefig"): "memory",
    ("cosyexp/data/corpora/espeak.py", "truncate"): "memory",
    ("cosyexp/data/corpora/espeak.py", "open"): "memory",
    ("cosyexp/run/pickles.py", "open"): "an entry of an open archive",
}


def writing_calls(source: str) -> Iterator[tuple[str, int]]:
    """Yields name and line of each call that may write, create, rename or remove a file."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        owner = getattr(getattr(node.func, "value", None), "id", "")
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [
            v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
        ]
        writes = name == "open" and (
            owner == "os"
            or any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
        )
        attribute = isinstance(node.func, ast.Attribute)
        one = len(node.args) == len(values) == 1  # str.replace takes two
        renames = name == "replace" and attribute and (owner == "os" or one)
        removes = name == "remove" and owner == "os"
        method = attribute and name in METHODS
        library = name in WRITERS_OF_LIBRARIES
        if name == "save":  # ours write nothing themselves
            library = ast.unparse(node.func).split(".")[0] in LIBRARIES
        if writes or renames or removes or method or library:
            yield name, node.lineno


def test_files_are_written_by_one_module_alone():
    used, found = set(), []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = path.relative_to(ROOT).as_posix()
            for name, line in writing_calls(path.read_text()):
                if file in WRITING_MODULES:
                    continue
                used.add((file, name))
                if (file, name) not in EXCEPTIONS:
                    found.append(f"{file}:{line} {name}")
    assert not found
    assert used == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "line",
    [
        'open(path, "w")',
        'open(path, mode="ab")',
        'path.open("r+")',
        "os.open(path, os.O_RDONLY)",
        "path.write_text(text)",
        "part.replace(path)",
        "os.replace(part, path)",
        "shutil.rmtree(path)",
        "path.parent.mkdir(exist_ok=True)",
        "torch.save(state, path)",
    ],
)
def test_the_wall_notices_a_write(line):
    assert list(writing_calls(line))


@pytest.mark.parametrize("line", ["open(path)", 'open(path, "rb")', 'text.replace("a", "b")'])
def test_the_wall_notices_no_read(line):
    assert not list(writing_calls(line))
