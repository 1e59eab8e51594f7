"""Makes recordings of what the rows of tables, parquet files and webdatasets hold."""

import math
from collections.abc import Mapping
from typing import Any

from cosyexp.data.corpora.base import Recording

KINDS = {list: "a list", dict: "an object", bool: "true or false", bytes: "bytes"}


def recording(
    cells: Mapping[str, Any],
    *,
    where: str,
    fault: str,
    utt: str,
    speaker: str,
    path: str,
    **more: Any,
) -> Recording:
    """Returns the recording of a row.

    Args:
        cells: what the row holds, see `Columns.cells`.
        where: the row, for messages.
        fault: why it cannot be used; empty: what the cells tell.
        utt: id if there is no cell for it.
        speaker: name if there is no column for it.
        path: of the audio file, or of the file that holds it.
        more: other attributes of the recording.
    """
    texts, faults = {}, [fault]
    for what in ("utt", "text", "speaker", "instruct"):
        texts[what], problem = as_text(cells.get(what), what)
        faults.append(problem)
    start, end, problem = span_of(cells)
    faults.append(problem)
    found = next((fault for fault in faults if fault), "")
    return Recording(
        utt=texts["utt"] or utt,
        text=texts["text"],
        speaker=texts["speaker"] if "speaker" in cells else speaker,
        path=path,
        start=start,
        end=end,
        instruct=texts["instruct"],
        fault=found and f"{where}: {found}",
        **more,
    )


def as_text(value: Any, what: str) -> tuple[str, str]:
    """Returns a cell as text, and a fault if it is none; ids and speakers may be whole numbers."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "", ""
    if isinstance(value, str):
        return value.strip(), ""
    if what in ("utt", "speaker") and isinstance(value, int) and not isinstance(value, bool):
        return str(value), ""
    return "", f"its {what} is {KINDS.get(type(value), 'a number')} instead of text"


def span_of(cells: Mapping[str, Any]) -> tuple[float, float | None, str]:
    """Returns where a recording begins and ends in its file, in seconds, and a fault if unclear.

    A duration alone tells the length of the file, and is not used.
    """
    if cells.get("start") in (None, "") and cells.get("end") in (None, ""):
        return 0.0, None, ""
    try:
        start = float(cells.get("start") or 0)
        end = cells.get("end")
        if end in (None, "") and cells.get("duration") not in (None, ""):
            end = start + float(cells["duration"])
        end = None if end in (None, "") else float(end)
    except (TypeError, ValueError):
        return 0.0, None, "its start, end or duration is not a number"
    if not 0 <= start < (math.inf if end is None else end) or end == math.inf:
        return 0.0, None, f"it ends at {end:g} s but starts at {start:g} s"
    return start, end, ""
