"""Exports on a hub: a folder of files in a repository of the Hugging Face Hub, or one like it.

The token of a user comes from `HF_TOKEN` or `hf auth login`, never from a config. What is pulled is
data: its components run only with `trusted_exports=true`, unless this user exported them.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cosyexp.errors import UserError, reason
from cosyexp.run.files import below, sync
from cosyexp.run.folders import begin_folder, commit_folder, remove_tree

HIDDEN = [".*", "**/.*"]  # unfinished exports, and what git adds


def push(folder: Path, repo: str, *, private: bool, endpoint: str | None = None) -> str:
    """Uploads a folder of exports to a repository, which is created if it is missing.

    Args:
        folder: the folder; its files become the root of the repository.
        repo: `<user or organization>/<name>`.
        private: whether a new repository is private.
        endpoint: URL of the hub; None: `HF_ENDPOINT`, or huggingface.co.

    Returns:
        The URL of the repository.

    Raises:
        UserError: there is nothing to upload, or the hub refuses it.
    """
    from huggingface_hub import HfApi

    if not folder.is_dir() or not any(path.is_file() for path in folder.rglob("*")):
        raise UserError(f"there are no exports in {folder}: python -m cosyexp.export")
    with _hub_errors(repo):
        api = HfApi(endpoint=endpoint)
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            ignore_patterns=list(HIDDEN),
            commit_message="Exports of cosyexp",
        )
    return str(url)


def pull(repo: str, out: Path, *, revision: str | None = None, endpoint: str | None = None) -> str:
    """Downloads a repository to a new folder, which is complete or not there.

    Args:
        repo: `<user or organization>/<name>`.
        out: the folder.
        revision: branch, tag or commit; None: the main branch.
        endpoint: URL of the hub; None: `HF_ENDPOINT`, or huggingface.co.

    Returns:
        The commit that was downloaded.

    Raises:
        UserError: the folder is there already, a file of the repository would lie outside of it, or
            the hub refuses the download.
    """
    from huggingface_hub import HfApi

    if out.exists():
        raise UserError(f"{out} is there already: give another out=, or remove it")
    with _hub_errors(repo):
        api = HfApi(endpoint=endpoint)
        info = api.model_info(repo, revision=revision)
        commit, names = str(info.sha), [file.rfilename for file in info.siblings or ()]
    part = begin_folder(out)
    try:
        for name in names:
            below(part, *name.split("/"))
        with _hub_errors(repo):
            api.snapshot_download(repo, revision=commit, local_dir=part, ignore_patterns=HIDDEN)
        remove_tree(part / ".cache")  # notes of the library
        for path in part.rglob("*"):
            sync(path)
    except BaseException:
        remove_tree(part)
        raise
    commit_folder(part)
    return commit


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Raises a UserError for what a hub refuses."""
    try:
        yield
    except Exception as error:  # the library's own have no common class
        if isinstance(error, UserError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise UserError(
            f"the hub cannot give or take {repo} ({reason(error)}): check the name of the "
            f"repository, the connection, and HF_TOKEN"
        ) from None
