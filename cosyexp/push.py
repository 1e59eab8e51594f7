"""Uploads the exports of a run to a repository of the Hugging Face Hub.

  run_dir=...            the run; default: the newest one under runs/
  repo=me/voice          the repository, created if it is missing
  format=hf              the folder below <run_dir>/exports whose files become the root of the
                         repository; default: all of them, as folders
  private=true           whether a new repository is private
  endpoint=https://...   another hub

The token is that of HF_TOKEN, or of `hf auth login`.

Examples
  python -m cosyexp.push run_dir=runs/demo/llm repo=me/voice
  python -m cosyexp.push run_dir=runs/my2/llm format=hf repo=me/voice-llm private=false
  python -m cosyexp.push run_dir=runs/demo/llm repo=me/voice endpoint=https://hub.example.org
"""

from cosyexp.cli.hydra_app import hydra_app
from cosyexp.config import PushConfig


@hydra_app("push", PushConfig)
def main(config: PushConfig) -> str:
    """Uploads the exports, and returns the URL of the repository."""
    from cosyexp.exporting.hub import push
    from cosyexp.run.directory import RunDirectory, newest_run
    from cosyexp.run.files import below

    run = newest_run() if config.run_dir is None else RunDirectory(config.run_dir)
    folder = below(run.path, "exports", *([config.format] if config.format else []))
    print(f"pushing {folder}")
    url = push(folder, config.repo, private=config.private, endpoint=config.endpoint)
    print(url)
    return url


if __name__ == "__main__":
    main()
