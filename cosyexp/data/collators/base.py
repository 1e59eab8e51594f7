"""A collator: what one model reads of the data, and how it becomes a batch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cosyexp.data.batch import Batch
from cosyexp.data.draws import Draws
from cosyexp.data.fields import Field

Row = Mapping[
    str, np.ndarray
]  # the fields of one utterance; a field of width w has shape (w, time)


class Collator(Protocol):
    """To train another model, write one of these and name it in `conf/model/`."""

    fields: Mapping[str, Field]

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """What each row costs in a padded batch, from the time steps of its fields."""
        ...

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> Batch:
        """Pads the rows, and draws what the objective will need for each."""
        ...
