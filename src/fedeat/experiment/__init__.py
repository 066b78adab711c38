"""Experiments: one federation from its configuration to its records, and grids of them.

inputs           what a configuration names as data
binding          from the names in a configuration to functions
playing          what plays a round: over updates, or over secure sums
federation       everything a run trains with, made ready
running          a run: trained, evaluated, recorded, gone on with
measuring        what is measured of a model at the end of a run
round_records    what the records say of a round
comparison       methods x attacks x fractions x seeds, on `side_by_side`'s processes
calibration      which radius suits a model
"""

from fedeat.experiment.binding import model_source
from fedeat.experiment.federation import Federation, Progress, prepare
from fedeat.experiment.inputs import answerable, evaluation_sets, training_examples
from fedeat.experiment.running import evaluate_base, resume, run

__all__ = [
    "Federation",
    "Progress",
    "answerable",
    "evaluate_base",
    "evaluation_sets",
    "model_source",
    "prepare",
    "resume",
    "run",
    "training_examples",
]
