"""Standard output and standard error: what is harmful is escaped, and a stream that is closed ends nothing."""

import errno
import io

import pytest

from perta_fast.cli.streams import ShownStream, shown_streams


def stream_of(encoding: str) -> tuple[io.BytesIO, io.TextIOWrapper]:
    written = io.BytesIO()
    return written, io.TextIOWrapper(written, encoding, newline="\n")


def test_a_stream_escapes_what_its_encoding_has_not() -> None:
    written, stream = stream_of("ascii")
    shown = ShownStream(stream)
    print("θ_f\t\x1b[1mé\r", file=shown, flush=True)
    assert written.getvalue() == b"\\u03b8_f\t\\x1b[1m\\xe9\\r\n"


def test_a_stream_with_bars_keeps_what_draws_them_and_nothing_else() -> None:
    written, stream = stream_of("utf-8")
    shown = ShownStream(stream, bars=True)
    for text in ("\r 50%|█| \x1b[2J", "\n\x1b[A\x1b[A", "\x1b[A\x1b[5m", "x\r"):
        shown.write(text)
    shown.flush()
    assert written.getvalue().decode() == "\r 50%|█| \\x1b[2J\n\x1b[A\x1b[A\\x1b[A\\x1b[5mx\\r"


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_stream_that_cannot_be_written_ends_nothing() -> None:
    shown = ShownStream(Full())
    assert shown.write("first") == 5
    shown.writelines(["second"])
    shown.flush()
    assert isinstance(shown.lost, OSError)
    closed = io.StringIO()
    closed.close()
    print("x", file=ShownStream(closed))


def test_streams_that_are_not_there_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with shown_streams() as (output, errors):
        print("x")
        assert (output.lost, errors.lost) == (None, None)
