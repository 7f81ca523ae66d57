"""What the records say of one file."""

from typing import TypedDict


class FileRecord(TypedDict):
    """One file: its size and the hash of its content."""

    bytes: int
    blake3: str
