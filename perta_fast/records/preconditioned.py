"""What was done to a θ_f before it was subtracted."""

from dataclasses import dataclass, field

from perta_fast.records.file_record import FileRecord


@dataclass(frozen=True)
class Preconditioned:
    """How θ_f was preconditioned.

    tuned: the θ_f that was given, an absolute path; files: size and hash of each of its files. seen_at: the model whose
    inputs were seen, on so many ``samples``. linear_maps: how many were changed. kept: the norm of the task vector of
    all of them after, as a share of that before.
    """

    tuned: str
    seen_at: str
    samples: int
    mu: float
    linear_maps: int
    kept: float
    files: dict[str, FileRecord] = field(default_factory=dict)

    def line(self) -> str:
        """For a person."""
        return (
            f"preconditioned: {self.kept:.1%} of the norm of the task vector of {self.linear_maps} linear maps is "
            f"left, by the inputs of {self.samples} samples and mu {self.mu:g}"
        )
