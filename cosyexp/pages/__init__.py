"""Writes self-contained HTML pages: tables, pictures and players in one file that works offline.

The pages are Jinja2 templates in this folder, which extend `base.html`. What is inserted is
escaped, as texts and names come from data that somebody else may have made.
"""

import io
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cosyexp.run.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 90
_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Writes a page.

    Args:
        path: of the HTML file.
        template: its file name in this folder, such as "evaluation.html".
        values: what the template inserts.
    """
    content = _templates.get_template(template).render(values)
    with replace_file(path) as file:
        file.write(content.encode())


def audio(wave_S: np.ndarray, sample_rate: int) -> str:
    """Returns a waveform (S,) in [-1, 1] as the `src` of an audio element, in FLAC."""
    return _uri("audio/flac", flac(wave_S, sample_rate))


def flac(wave_S: np.ndarray, sample_rate: int) -> bytes:
    """Returns the bytes of a FLAC file of a waveform (S,) in [-1, 1]."""
    file = io.BytesIO()
    soundfile.write(file, wave_S, sample_rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def picture(figure: "Figure") -> str:
    """Returns a figure of matplotlib as the `src` of an image, in PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return _uri("image/png", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
