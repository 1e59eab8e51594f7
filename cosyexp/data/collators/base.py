"""The collator protocol: which fields a model reads, and how rows become a padded batch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cosyexp.data.batch import Batch
from cosyexp.data.draws import Draws
from cosyexp.data.fields import Field

# The fields of one utterance, by name; a field of width w has the shape (w, time).
Row = Mapping[str, np.ndarray]


class Collator(Protocol):
    """Protocol of collators; to train another model, write one and name it in `conf/model/`.

    Attributes:
        fields: the fields to read, by the names that the rows have them under.
    """

    fields: Mapping[str, Field]

    def length(self, sizes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the cost of each row in a padded batch, (rows,).

        Args:
            sizes: time steps of each field, by name, (rows,) each.
        """
        ...

    def collate(self, utts: Sequence[str], rows: Sequence[Row], draws: Draws) -> Batch:
        """Pads the rows and draws the random numbers that the objective needs for each.

        Args:
            utts: ids of the utterances, which key the random numbers.
            rows: fields of the utterances.
            draws: the random numbers of the epoch.
        """
        ...
