"""Push and pull of exports, with a hub on this machine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cosyexp.errors import UserError
from cosyexp.exporting.origin import check_origin
from cosyexp.exporting.report import read_report
from tests.apps.warm import Warm
from tests.hub import TOKEN, Hub, running
from tests.support import contents, sentence

WITH_TOKEN = {"HF_TOKEN": TOKEN}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(trained: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the demo llm that was exported twice; tests only read it."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "runs").symlink_to(trained / "runs")
    for form in ("jit", "official"):
        words = ["run_dir=runs/demo/llm", f"format={form}", f"out=run/exports/{form}"]
        warm("export", *words, "latency=false", cwd=folder)
    return folder


def test_exports_are_pushed_and_pulled(exported, hub, warm, tmp_path):
    words = ["repo=me/voice", f"endpoint={hub.endpoint}"]
    pushed = warm("push", f"run_dir={exported}/run", *words, cwd=tmp_path, env=WITH_TOKEN)
    assert pushed.stdout.splitlines()[-1] == f"{hub.endpoint}/me/voice"
    assert hub.visibility == {"me/voice": "private"}
    output = warm("pull", *words, "out=voice", cwd=tmp_path).stdout
    assert output == f"voice: me/voice at {hub.commit('me/voice')}\n"
    found = contents(tmp_path / "voice")
    assert found == contents(exported / "run/exports")
    assert {"jit/llm.decode.fp32.zip", "official/llm.pt", "jit/llm.yaml"} <= found.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["voice"]


def test_one_export_is_the_root_and_a_second_push_updates_it(exported, hub, warm, tmp_path):
    words = ["repo=me/voice", f"endpoint={hub.endpoint}"]
    order = ["push", f"run_dir={exported}/run", "format=official", "private=false", *words]
    for _ in range(2):
        warm(order[0], *order[1:], cwd=tmp_path, env=WITH_TOKEN)
    assert hub.files["me/voice"].keys() == {"llm.pt", "report.fp32.json", "MODEL.md"}
    assert hub.visibility == {"me/voice": "public"}


def test_what_is_pulled_is_not_trusted(exported, hub, warm, tmp_path, monkeypatch):
    words = ["repo=me/voice", f"endpoint={hub.endpoint}"]
    order = [f"run_dir={exported}/run", "format=jit", *words]
    warm("push", *order, cwd=tmp_path, env=WITH_TOKEN)
    warm("pull", *words, "out=voice", cwd=tmp_path)
    path = tmp_path / "voice/llm.decode.fp32.zip"
    written = read_report(path.parent, "fp32")["llm.decode"]["sha256"]
    check_origin(path, written, trusted=False)  # mine, wherever it was meanwhile
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))
    with pytest.raises(UserError, match="is a program that no export of yours wrote"):
        check_origin(path, written, trusted=False)
    check_origin(path, written, trusted=True)


@pytest.mark.parametrize("name", ["../precious", "a/../../precious", "/precious"])
def test_a_file_outside_of_the_folder_is_refused(name, hub, refused, tmp_path):
    hub.files["me/voice"] = {"fine": b"fine", name: b"evil"}
    (tmp_path / "precious").write_text("precious")
    words = ["repo=me/voice", "out=voice", f"endpoint={hub.endpoint}"]
    refused("pull", words, "cannot be the name of a file")


def test_an_interrupted_download_leaves_nothing(hub, warm, tmp_path):
    hub.files["me/voice"], hub.lost = {"a": b"a", "b": b"b"}, {"b"}
    words = ["repo=me/voice", "out=voice", f"endpoint={hub.endpoint}"]
    sentence(warm("pull", *words, cwd=tmp_path, check=False), "cannot give or take me/voice")
    assert not list(tmp_path.iterdir())
    hub.lost.clear()
    warm("pull", *words, cwd=tmp_path)
    assert contents(tmp_path).keys() == {"voice/a", "voice/b"}


REFUSED: dict[str, tuple[str, list[str], list[str], dict[str, str]]] = {
    "no repository": ("pull", ["repo=me/none", "out=voice"], ["me/none", "HF_TOKEN"], {}),
    "a folder that is there": (
        "pull",
        ["repo=me/voice", "out=there"],
        ["there is there already"],
        {},
    ),
    "a name that is none": ("pull", ["repo=a/b/c", "out=voice"], ["a/b/c", "the name"], {}),
    "no run": ("push", ["run_dir=nowhere", "repo=me/voice"], ["no exports in nowhere"], WITH_TOKEN),
    "no such export": (
        "push",
        ["run_dir=run", "format=hf", "repo=me/voice"],
        ["no exports in run/exports/hf", "cosyexp.export"],
        WITH_TOKEN,
    ),
    "another folder": (
        "push",
        ["run_dir=run", "format=..", "repo=me/voice"],
        ["cannot be the name of a file"],
        WITH_TOKEN,
    ),
    "no token": ("push", ["run_dir=run", "repo=me/voice"], ["me/voice", "HF_TOKEN"], {}),
    "a wrong token": (
        "push",
        ["run_dir=run", "repo=me/voice"],
        ["me/voice", "HF_TOKEN"],
        {"HF_TOKEN": "wrong"},
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, hub, warm, tmp_path):
    app, words, parts, env = REFUSED[case]
    (tmp_path / "run/exports/jit").mkdir(parents=True)
    (tmp_path / "run/exports/jit/a.zip").write_text("a")
    (tmp_path / "there").mkdir()
    before = contents(tmp_path)
    order = [*words, f"endpoint={hub.endpoint}"]
    result = warm(app, *order, cwd=tmp_path, check=False, env={"HF_HOME": str(tmp_path), **env})
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and len(lines) == 1, result.stderr
    assert [part for part in parts if part not in lines[0]] == []
    assert contents(tmp_path) == before and not hub.files


def test_a_hub_that_does_not_answer(refused):
    words = ["repo=me/voice", "out=voice", "endpoint=http://127.0.0.1:9"]
    refused("pull", words, "the hub cannot give or take me/voice", "the connection")
