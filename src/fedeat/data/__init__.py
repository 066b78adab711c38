"""Training data: rows from files (`files`), rows as `examples`, examples as tokens (`encoding`), and their `partition`.

Nothing here loads a model library; what a file's format needs is imported when such a file is read.
"""

from fedeat.data.encoding import length_grouped, require_targets, truncation
from fedeat.data.examples import OUTPUT_FIELDS, Batch, Encoded, Example, given, instruction_examples
from fedeat.data.files import is_local, read_hub, read_rows

__all__ = [
    "OUTPUT_FIELDS",
    "Batch",
    "Encoded",
    "Example",
    "given",
    "instruction_examples",
    "is_local",
    "length_grouped",
    "read_hub",
    "read_rows",
    "require_targets",
    "truncation",
]
