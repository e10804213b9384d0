"""Preference data: rows in the accepted formats -> groups with win rates -> label tensors and token sequences.

`rows.to_groups` turns every accepted format into one table of groups, and everything downstream sees nothing else.
"""

from mopo_trainer.data.errors import DataError
from mopo_trainer.data.labels import labels, objectives, split_groups
from mopo_trainer.data.rows import to_groups
from mopo_trainer.data.sources import load_rows
from mopo_trainer.data.texts import plain_text
from mopo_trainer.data.tokens import tokenize_group

__all__ = [
    "DataError",
    "labels",
    "load_rows",
    "objectives",
    "plain_text",
    "split_groups",
    "to_groups",
    "tokenize_group",
]
