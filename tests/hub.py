"""A hub on this machine: the requests of huggingface-hub that a push and a pull make."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"


class Hub:
    """The repositories by id, each with its files, and the address of the server."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.visibility: dict[str, str] = {}
        self.lost: set[str] = set()  # names of files that it lists and does not have
        self.endpoint = ""

    def commit(self, repo: str) -> str:
        """Returns the hash of the content of a repository."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Runs a hub in a thread."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            path = unquote(urlsplit(self.path).path)
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/repos/create":
                return self.create(json.loads(content))
            repo, action = split(path)
            if action == "preupload":
                names = [file["path"] for file in json.loads(content)["files"]]
                kinds = {"uploadMode": "regular", "shouldIgnore": False}
                return self.answer({"files": [{"path": name, **kinds} for name in names]})
            assert action == "commit", path
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
            url = f"{hub.endpoint}/{repo}/commit/{hub.commit(repo)}"
            self.answer({"success": True, "commitOid": hub.commit(repo), "commitUrl": url})

        def create(self, order: dict[str, Any]) -> None:
            repo = f"{order['organization']}/{order['name']}"
            url = f"{hub.endpoint}/{repo}"
            if repo in hub.files:
                return self.answer({"url": url}, 409)
            hub.files[repo], hub.visibility[repo] = {}, order["visibility"]
            self.answer({"url": url})

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            repo, action = split(path)
            if repo not in hub.files:
                return self.answer({"error": "Repository not found"}, 404, "RepoNotFound")
            files, commit = hub.files[repo], hub.commit(repo)
            if action == "resolve":
                name = path.split(f"/resolve/{commit}/")[1]
                if name in hub.lost:
                    return self.answer({"error": "Entry not found"}, 404, "EntryNotFound")
                return self.send(files[name], commit)
            if action == "tree":
                entries = [
                    {"type": "file", "path": n, "size": len(c), "oid": oid(c)}
                    for n, c in files.items()
                ]
                return self.answer(entries)
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": repo, "sha": commit, "siblings": siblings})

        do_HEAD = do_GET

        def send(self, content: bytes, commit: str) -> None:
            self.send_response(200)
            self.send_header("ETag", f'"{oid(content)}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def answer(self, content: Any, status: int = 200, error: str = "") -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Prints nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


def split(path: str) -> tuple[str, str]:
    """Returns the repository and the action of a path, as ("me/voice", "commit")."""
    parts = [*path.removeprefix("/api/models").strip("/").split("/"), "", ""]
    return "/".join(parts[:2]), parts[2]


def oid(content: bytes) -> str:
    """Returns the git hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
