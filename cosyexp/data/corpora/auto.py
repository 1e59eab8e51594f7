"""Finds out how a corpus is laid out, and says what was found before anything is prepared."""

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from cosyexp.data.corpora.aishell3 import Aishell3
from cosyexp.data.corpora.base import Corpus, Recording, SplitCorpus
from cosyexp.data.corpora.columns import Key
from cosyexp.data.corpora.folders import Folders
from cosyexp.data.corpora.kaldi import Kaldi
from cosyexp.data.corpora.lhotse import Lhotse
from cosyexp.data.corpora.libritts import LibriTTS
from cosyexp.data.corpora.names import SUFFIXES
from cosyexp.data.corpora.parquet import Parquet
from cosyexp.data.corpora.rows import JSON, read_rows
from cosyexp.data.corpora.table import Table
from cosyexp.data.corpora.webdataset import WebDataset
from cosyexp.data.shards import read_list
from cosyexp.errors import UserError
from cosyexp.registry import register
from cosyexp.run.documents import DamagedFileError, open_regular

EXAMPLES = 3
TABLES = (".csv", ".tsv", ".txt", ".list", *JSON)
CONTAINERS = (".parquet", ".arrow", ".tar")
SPLITS = {  # words in the names of files and folders; what is for testing is left out
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "dev", "eval"), "valid"),
}
PREFERRED = ("metadata.csv", "validated.tsv")  # tables that are taken before others


@register("corpus")
@dataclass(frozen=True, kw_only=True)
class Auto(SplitCorpus):
    """A corpus in any of the layouts that are known.

    Attributes:
        root: a folder, or a table, parquet or tar file.
        layout: one of LAYOUTS; "auto": the first one that fits.
        columns: see `Table`; used by tables, parquet files and webdatasets.
        delimiter: see `Table`.
    """

    root: str
    layout: str = "auto"
    columns: Mapping[str, Key | None] = field(default_factory=dict)
    delimiter: str | None = None

    @cached_property
    def corpus(self) -> Any:
        """The corpus in the layout that was found.

        Raises:
            UserError: there is nothing at `root`, or it has no known layout.
        """
        root = Path(self.root).expanduser()
        if self.layout not in ("auto", *LAYOUTS):
            raise UserError(
                f"corpus.layout={self.layout} is not a layout: give auto or one of "
                f"{', '.join(LAYOUTS)}"
            )
        if not root.exists():
            raise UserError(f"there is no file or folder {root}: correct corpus.root=")
        names = LAYOUTS if self.layout == "auto" else [self.layout]
        for name in names:
            if (corpus := LAYOUTS[name](root, self)) is not None:
                return corpus
        for path in tables_in(root):
            read_rows(path, self.delimiter, self.columns)  # says why it is none
        wanted = "any known layout" if self.layout == "auto" else f"the layout {self.layout}"
        inside = sorted(os.listdir(root))[:8] if root.is_dir() else []
        raise UserError(
            f"{root} does not have {wanted} (it holds {', '.join(inside) or 'nothing'}): give the "
            f"folder or file that lists the recordings as corpus.root=, or corpus.layout= of "
            f"{', '.join(LAYOUTS)}"
        )

    @property
    def choices(self) -> dict[str, Any]:
        """The settings of the split, which the corpus in the layout gets."""
        return {"name": self.name, "held_out": self.held_out, "held_out_by": self.held_out_by}

    def found(self) -> Iterator[str]:
        """Yields a line about the layout, and one for each of some example rows."""
        yield f"{self.root}: {self.corpus}"
        for recording in islice(self.recordings(), EXAMPLES):
            shown = recording.fault or f"{recording.speaker}: {recording.text!r} ({recording.path})"
            yield f"  {recording.utt}  {shown}"

    def __len__(self) -> int:
        return len(self.corpus)

    def recordings(self) -> Iterator[Recording]:
        """Yields the recordings of the corpus that was found."""
        yield from self.corpus.recordings()


def kaldi(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of a folder with `wav.scp`."""
    return Kaldi(root=str(root), **auto.choices) if (root / "wav.scp").is_file() else None


def aishell3(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of a folder with `train/content.txt`."""
    found = (root / "train/content.txt").is_file()
    return Aishell3(name=auto.name, root=str(root)) if found else None


def libritts(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of a folder with LibriTTS's subsets."""
    texts = root.glob("*/*/*/*.normalized.txt") if root.is_dir() else ()
    train, valid = by_split(sorted({path.relative_to(root).parts[0] for path in texts}))
    if not train:
        return None
    return LibriTTS(root=str(root), train=train, valid=valid, **auto.choices)


def lhotse(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of a manifest of cuts, or of recordings and supervisions."""
    kinds: dict[str, list[str]] = {
        kind: [
            str(path)
            for path in files_of(root)
            if kind in path.name and path.name.endswith((".jsonl", ".jsonl.gz"))
        ]
        for kind in ("cuts", "supervisions", "recordings")
    }
    if kinds["cuts"]:
        return Lhotse(path=only(kinds["cuts"]), **auto.choices)
    if kinds["supervisions"] and kinds["recordings"]:
        audio = only(kinds["recordings"])
        return Lhotse(path=only(kinds["supervisions"]), audio=audio, **auto.choices)
    return None


def parquet(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of parquet or Arrow files."""
    return in_containers(Parquet, (b"PAR1", b"ARRO", b"\xff" * 4), root, auto)


def webdataset(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of tar files."""
    files = [path for path in containers(root) if path.suffix == ".tar"]
    return in_containers(WebDataset, {magic(path) for path in files} - {b"PAR1"}, root, auto)


def table(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of a table, or of one for training and one for validation."""
    tables = [str(path) for path in tables_in(root) if root.is_file() or is_table(path, auto)]
    train, valid = by_split(tables, key=lambda path: Path(path).name)
    preferred = [path for name in PREFERRED if (path := str(root / name)) in train]
    if not train:
        return None
    return Table(
        path=preferred[0] if preferred else only(train),
        valid=only(valid) if valid else None,
        columns=auto.columns,
        delimiter=auto.delimiter,
        **auto.choices,
    )


def folders(root: Path, auto: Auto) -> Corpus | None:
    """Returns the corpus of audio files with texts beside, if the first few have one."""
    corpus = Folders(root=str(root), **auto.choices)
    usable = root.is_dir() and any(not r.fault for r in islice(corpus.recordings(), 100))
    return corpus if usable else None


LAYOUTS: dict[str, Callable[[Path, Auto], Corpus | None]] = {
    "kaldi": kaldi,
    "aishell3": aishell3,
    "libritts": libritts,
    "lhotse": lhotse,
    "parquet": parquet,
    "webdataset": webdataset,
    "table": table,
    "folders": folders,
}


def by_split(
    names: Sequence[str], key: Callable[[str], str] = lambda name: name
) -> tuple[list[str], list[str]]:
    """Returns the names for training and for validation, as words in them say.

    Args:
        names: of files or folders; without a word for training all are for training.
        key: the part of a name with the words.
    """
    splits: dict[str, list[str]] = {"train": [], "valid": []}
    for name in names:
        words = re.split("[^a-z]+", key(name).lower())
        split = next((SPLITS[word] for word in words if word in SPLITS), None)
        if split:
            splits[split].append(name)
    return (splits["train"], splits["valid"]) if splits["train"] else (list(names), [])


def only(paths: Sequence[str]) -> str:
    """Returns the only path.

    Raises:
        UserError: there are several.
    """
    if len(paths) > 1:
        raise UserError(
            f"{', '.join(paths[:8])} all list recordings: give one of them as corpus.root="
        )
    return paths[0]


def tables_in(root: Path) -> list[Path]:
    """Returns the files that may be tables, not texts beside audio; a file itself is one."""
    return [
        path
        for path in files_of(root)
        if path == root
        or (
            path.name.lower().endswith(TABLES)
            and not any(path.with_suffix(suffix).exists() for suffix in SUFFIXES)
        )
    ]


def is_table(path: Path, auto: Auto) -> bool:
    """Returns whether a table of recordings can be read from a file."""
    try:
        read_rows(path, auto.delimiter, auto.columns)
    except UserError:
        return False
    return True


def files_of(root: Path) -> list[Path]:
    """Returns the files in a folder, or the file itself."""
    return sorted(p for p in root.iterdir() if p.is_file()) if root.is_dir() else [root]


def containers(root: Path) -> list[Path]:
    """Returns the files below a folder, in a list or at a path that can hold audio."""
    if root.suffix == ".list" and root.is_file():
        return read_list(str(root))
    if root.is_file():
        return [root]
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix in CONTAINERS
        and not path.name.startswith("cache-")  # of `datasets`
        and path.parent.suffix != ".fields"  # of ours
    )


def in_containers(kind: Any, magics: Collection[bytes], root: Path, auto: Auto) -> Corpus | None:
    """Returns a corpus of the files that begin with one of some bytes."""
    names = {
        str(path): os.path.relpath(path, root) for path in containers(root) if magic(path) in magics
    }
    if not names:
        return None
    train, valid = by_split(list(names), key=names.__getitem__)
    corpus: Corpus = kind(files=train, valid=valid, columns=auto.columns, **auto.choices)
    return corpus


def magic(path: Path) -> bytes:
    """Returns the first bytes of a file; empty if it cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(4)
    except (OSError, DamagedFileError):
        return b""
