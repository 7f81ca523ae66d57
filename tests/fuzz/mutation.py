"""Damage to the bytes of a file, for hypothesis: anywhere, or where it hurts in a file of that format."""

import json

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.json_mutation import damaged

_LONGEST = 24  # bytes that one change replaces
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\\", b"-", b"0", b"9" * 30, b"-1", b"1e999", b"0.5"),
    *(b"null", b"true", b"NaN", b"Infinity", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xff", b"\0", b"../"),
    *(b"[" * 2000, b'{"a":' * 2000, b"9" * 5000),
)
_PLACES = ("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "~", "a" * 300)
_PARTS = ("..", "/", "\\", "\0", "\n", "~", "\ud800", "model", "-00001-of-00002", ".safetensors")
_names = st.sampled_from(_PLACES) | st.lists(st.sampled_from(_PARTS), max_size=6).map("".join)


@st.composite
def any_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Up to four changes: bytes replaced, removed, put in, or repeated from elsewhere; or the end cut off."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = begin + draw(st.integers(0, _LONGEST))
        kind = draw(st.sampled_from(["token", "bytes", "repeat", "cut"]))
        if kind == "cut":
            del content[begin:]
        elif kind == "repeat":
            source = draw(st.integers(0, len(original)))
            content[begin:end] = original[source : source + draw(st.integers(0, _LONGEST))]
        else:
            content[begin:end] = draw(st.sampled_from(_TOKENS) if kind == "token" else st.binary(max_size=4))
    return bytes(content)


def json_document(original: bytes) -> SearchStrategy[bytes]:
    """One JSON text."""
    return any_bytes(original) | damaged(json.loads(original)).map(_text)


def index(original: bytes) -> SearchStrategy[bytes]:
    """The index of a checkpoint: also with names of shards that lead elsewhere."""

    @st.composite
    def with_name(draw: st.DrawFn) -> bytes:
        content = json.loads(original)
        content["weight_map"][draw(st.sampled_from(sorted(content["weight_map"])))] = draw(_names)
        return _text(content)

    return json_document(original) | with_name()


def json_lines(original: bytes) -> SearchStrategy[bytes]:
    """One JSON text a line."""
    lines = original.splitlines()

    @st.composite
    def with_line(draw: st.DrawFn) -> bytes:
        place = draw(st.integers(0, len(lines) - 1))
        line = _text(draw(damaged(json.loads(lines[place]))))
        return b"\n".join([*lines[:place], line, *lines[place + 1 :]])

    return any_bytes(original) | with_line()


def safetensors(original: bytes) -> SearchStrategy[bytes]:
    """A header and data."""
    return safetensors_header(original) | any_bytes(original)


def safetensors_header(original: bytes) -> SearchStrategy[bytes]:
    """The header alone, with or without its length made to fit."""
    length = int.from_bytes(original[:8], "little")
    prefix, header, data = original[:8], original[8 : 8 + length], original[8 + length :]

    def fitted(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + data

    return (
        any_bytes(header).map(fitted)
        | damaged(json.loads(header)).map(_text).map(fitted)
        | any_bytes(prefix + header).map(lambda start: start + data)
    )


def _text(content: object) -> bytes:
    return json.dumps(content).encode()
