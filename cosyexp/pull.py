"""Downloads exports from a repository of the Hugging Face Hub to a new folder.

  repo=me/voice          the repository
  out=...                the folder, which must not be there
  revision=...           branch, tag or commit; default: the main branch
  endpoint=https://...   another hub

What is downloaded is not trusted: synthesize runs its components only with trusted_exports=true,
unless you exported them yourself.

Examples
  python -m cosyexp.pull repo=me/voice out=voice
  python -m cosyexp.pull repo=me/voice revision=v2 out=voice2
  python -m cosyexp.pull repo=me/voice out=voice endpoint=https://hub.example.org
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import PullConfig


@hydra_app("pull", PullConfig)
def main(config: PullConfig) -> str:
    """Downloads the exports, and returns the path of the folder."""
    from pathlib import Path

    from cosyexp.exporting.hub import pull

    out = Path(config.out)
    commit = pull(config.repo, out, revision=config.revision, endpoint=config.endpoint)
    print(f"{out}: {config.repo} at {commit}")
    return str(out)


if __name__ == "__main__":
    main()
