"""How a retain importance was made from the importance of all rows."""

from dataclasses import dataclass, field

from perta_fast.records.file_record import FileRecord


@dataclass(frozen=True)
class Removal:
    """The rows to forget were taken out of an importance of more rows.

    whole: its directory, an absolute path; files: size and hash of each of its files. data_hash: of its data; rows: how
    many it is a mean over; removed: how many of them are to be forgotten.
    """

    whole: str
    data_hash: str
    rows: int
    removed: int
    files: dict[str, FileRecord] = field(default_factory=dict)

    def line(self) -> str:
        """For a person."""
        return (
            f"retain importance: {self.rows - self.removed} rows, the {self.rows} of {self.whole} without the "
            f"{self.removed} to forget"
        )
