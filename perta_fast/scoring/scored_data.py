"""What is checked of a metric and of the data to score, before a model is loaded. It needs no torch."""

from importlib.util import find_spec

from perta_fast.data.forms import Fields
from perta_fast.data.given import NOTHING_GIVEN, Given
from perta_fast.errors import InputError
from perta_fast.evaluation.benchmark_files import DataFile
from perta_fast.scoring.criteria import METRICS

ROUGE = "Q_A_ROUGE"


def check_metric(metric: str) -> None:
    """Raise InputError unless the metric is known and its package is installed."""
    if metric not in METRICS:
        raise InputError(f"‹metric› is {metric!r}; it must be one of {', '.join(METRICS)}")
    if metric == ROUGE and find_spec("rouge_score") is None:
        raise InputError("rouge_score is not installed: pip install 'perta-fast[eval]'")


def read_scored(path: str, metric: str, fields: Fields | None = None, given: Given = NOTHING_GIVEN) -> DataFile:
    """Data to score, from a file or by its name in ``given``.

    Raises InputError for a bad line, and for one that ``metric`` cannot measure.
    """
    file = DataFile.read(path, fields, given)
    for row in file.rows:
        if metric == ROUGE and "question" not in row.content:
            raise InputError(f"{row.where}: metric {ROUGE} needs a question and its answer")
    return file
