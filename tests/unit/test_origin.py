"""Exported files are programs: which of them are run, and for whom."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosyexp.config import ExportedConfig
from cosyexp.errors import UserError
from cosyexp.exporting.export import ComponentFormat
from cosyexp.exporting.jit import Jit
from cosyexp.exporting.onnx import Onnx
from cosyexp.exporting.origin import hashes, known, record, remember
from cosyexp.exporting.pt2 import Pt2
from cosyexp.exporting.source import source_from_run
from cosyexp.synthesis.backends import from_exports, from_run_exports, load_runners, read_excerpt
from tests.unit.test_export import run_of

FORMATS: dict[str, ComponentFormat] = {
    "onnx": Onnx(),
    "jit": Jit(),
    "pt2": Pt2(),
    "compiled pt2": Pt2(compile=True),
}
VOCODER = {"_target_": "cosyexp.models.hifigan.components.Vocoder"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a user who has exported nothing."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> ComponentFormat:
    """A format."""
    return FORMATS[request.param]


@pytest.fixture
def loaded(form: ComponentFormat, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that the format opened."""
    opened: list[Path] = []

    def load(self: Any, path: Path, *others: Any) -> Any:
        opened.append(path)
        return lambda *inputs: inputs

    monkeypatch.setattr(type(form), "load", load)
    return opened


@pytest.fixture
def file(form: ComponentFormat, tmp_path: Path) -> Path:
    """A file in the folder of an export, with its hash in the report."""
    path = tmp_path / form.file("hift", "fp32")
    path.write_bytes(b"a program")
    write_report(path)
    return path


def write_report(path: Path) -> None:
    """Writes the report that an export writes next to a file."""
    entry = {"file": path.name, "sha256": hashes(path)}
    report = json.dumps({"components": {"hift": entry}})
    (path.parent / "report.fp32.json").write_text(report)


def load(form: ComponentFormat, folder: Path, trusted: bool = False) -> dict[str, Any]:
    """Loads the vocoder of an export."""
    config = ExportedConfig(components={"hift": VOCODER})
    config.model.name = "hifigan"
    return dict(load_runners(config, folder, form, "fp32", "cpu", trusted, ""))


def test_a_file_of_someone_else_is_not_opened(form, file, loaded):
    with pytest.raises(
        UserError,
        match=rf"^{file} is a program that no export of yours wrote: .*"
        r"trusted_exports=true",
    ):
        load(form, file.parent)
    assert not loaded


def test_a_file_of_someone_else_is_opened_if_the_user_says_so(form, file, loaded):
    assert set(load(form, file.parent, trusted=True)) == {"hift"} and loaded == [file]


def test_a_file_of_one_s_own_is_opened(form, file, loaded):
    remember(hashes(file).values())
    load(form, file.parent)
    assert loaded == [file]


@pytest.mark.parametrize("at", [0, 4, -1])
@pytest.mark.parametrize("trusted", [False, True])
def test_a_flipped_byte_is_noticed_before_the_file_is_opened(form, file, loaded, at, trusted):
    remember(hashes(file).values())
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{file} has changed since it was exported: export it"):
        load(form, file.parent, trusted)
    assert not loaded


def test_without_a_report_nothing_but_the_record_counts(form, file, loaded):
    (file.parent / "report.fp32.json").unlink()
    with pytest.raises(UserError, match="no export of yours"):
        load(form, file.parent)
    assert not loaded
    load(form, file.parent, trusted=True)
    remember(hashes(file).values())
    load(form, file.parent)
    assert loaded == [file, file]


@pytest.mark.parametrize("form", ["onnx"], indirect=True)
def test_weights_of_their_own_belong_to_the_file(form, file, loaded):
    """Those of an ONNX file of more than 2 GB."""
    weights = file.with_name(f"{file.name}.data")
    weights.write_bytes(b"weights")
    write_report(file)
    remember(hashes(file).values())
    load(form, file.parent)
    weights.write_bytes(b"others")
    for trusted in (False, True):
        with pytest.raises(UserError, match="has changed"):
            load(form, file.parent, trusted)
    assert loaded == [file]


@pytest.mark.parametrize(
    "report", ["", "[]", "{}", '{"components": 1}', '{"components": {"hift": []}}', "[" * 10**5]
)
def test_a_damaged_report_vouches_for_nothing(report, tmp_path):
    path = tmp_path / "hift.fp32.zip"
    path.write_bytes(b"a program")
    (tmp_path / "report.fp32.json").write_text(report)
    with pytest.raises(UserError, match="no export of yours"):
        load(Jit(), tmp_path)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_program_that_unpickles_is_not_opened(tmp_path):
    """Where torch's reader fails to unpickle safely, it goes on to run what the file says."""
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))
    clean, hostile, touched = io.BytesIO(), io.BytesIO(), tmp_path / "executed"
    torch.export.save(program, clean)
    torch.save(Touch(touched), hostile)
    path = tmp_path / Pt2().file("hift", "fp32")
    with zipfile.ZipFile(clean) as before, zipfile.ZipFile(path, "w") as after:
        for name in before.namelist():
            after.writestr(name, hostile.getvalue() if "inputs" in name else before.read(name))
    write_report(path)
    with pytest.raises(UserError, match="no export of yours"):
        load(Pt2(), tmp_path)
    assert not touched.exists()
    with pytest.raises(UserError, match="cannot be read"):
        load(Pt2(), tmp_path, trusted=True)
    assert touched.exists()  # the file is what it is meant to be


# the record --------------------------------------------------------------------------------------


def test_an_export_is_remembered_and_runs(tmp_path, monkeypatch):
    run = run_of("hifigan", tmp_path / "run")
    (path,) = Jit().export(
        source_from_run(run, "last"),
        run.exports / "jit",
        node={"_target_": "cosyexp.exporting.jit.Jit"},
    )
    report = json.loads((path.parent / "report.fp32.json").read_text())
    assert report["components"]["hift"]["sha256"] == hashes(path)
    assert known() == set(hashes(path).values())
    assert set(from_run_exports(run, "jit", "fp32", "cpu").runners) == {"hift"}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "someone else"))
    with pytest.raises(UserError, match="no export of yours"):
        from_run_exports(run, "jit", "fp32", "cpu")
    with pytest.raises(UserError, match="no export of yours"):
        from_exports([path.parent], "jit", "fp32", "cpu")
    assert set(from_run_exports(run, "jit", "fp32", "cpu", True).runners) == {"hift"}


def test_an_export_that_fails_is_not_remembered(tmp_path, monkeypatch):
    run = run_of("hifigan", tmp_path / "run")
    monkeypatch.setattr(Jit, "_verify", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Jit().export(source_from_run(run, "last"), run.exports / "jit")
    assert known() == set() and not record().exists()


def test_the_record_is_the_user_s_alone_and_only_grows(state):
    remember(["a", "b"])
    with open(record(), "a") as torn:
        torn.write("\nhalf of a ha")
    remember(["c"])
    assert known() >= {"a", "b", "c"}
    assert record() == state / "cosyexp/exports"
    assert record().stat().st_mode & 0o777 == 0o600
    assert record().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_record_that_others_can_write_is_refused(mode):
    remember(["a"])
    record().chmod(mode)
    with pytest.raises(UserError, match=f"{record()} can be written by others"):
        known()


def test_a_record_that_is_a_link_is_neither_read_nor_written(tmp_path, said):
    (tmp_path / "profile").write_text("abc")
    record().parent.mkdir(parents=True)
    record().symlink_to(tmp_path / "profile")
    remember(["x"])
    assert (tmp_path / "profile").read_text() == "abc" and known() == set()
    assert "trusted_exports=true" in said.text


@pytest.mark.parametrize("home", ["file", "none"])
def test_without_a_home_an_export_is_made_with_a_warning(home, tmp_path, monkeypatch, said):
    monkeypatch.delenv("XDG_STATE_HOME")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    if home == "none":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    remember(["x"])
    assert "the export cannot be recorded as yours" in said.text and known() == set()


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_the_record_is_in_the_home_by_default(value, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record() == tmp_path / ".local/state/cosyexp/exports"


def test_an_export_cannot_say_that_it_is_trusted(tmp_path):
    path = tmp_path / "hifigan.yaml"
    values = {"components": {"hift": VOCODER}, "format": {}, "trusted_exports": True}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="is not what an export wrote"):
        read_excerpt(path)
