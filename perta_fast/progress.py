"""Progress bars: bytes or samples, rate and time left, on standard error."""

from tqdm.auto import tqdm


def byte_bar(total: int, description: str, shown: bool, done: int = 0) -> "tqdm[None]":
    """A bar that counts bytes, from ``done``; drawn only on a terminal or in a notebook, if ``shown``."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="B",
        unit_scale=True,
        disable=None if shown else True,
    )


def sample_bar(total: int, description: str, shown: bool) -> "tqdm[None]":
    """A bar that counts samples."""
    return tqdm(total=total, desc=description, unit="sample", disable=None if shown else True)
