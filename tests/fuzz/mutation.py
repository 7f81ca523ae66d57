"""Damage to the bytes of a file, for hypothesis: anywhere, or where it hurts in a file of that format."""

import json

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.support.json_mutation import damaged

_LONGEST = 24  # bytes that one change replaces
_TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\n", b"\\", b"-", b"0", b"9" * 30, b"-1", b"1e999", b"0.5"),
    *(b"null", b"true", b"NaN", b"Infinity", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xff", b"\0", b"../"),
)
_WHOLES = (
    *(b"", b"{}", b"[]", b"null", b"true", b"0", b'"text"', b"[{}]", b'{"": {}}', b"\xff\xfe{\0}\0"),
    *(b"9" * 5000, b"[" * 200_000, b'{"a":' * 200_000),
)
_PLACES = ("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "~", "a" * 300)
_PARTS = ("..", "/", "\\", "\0", "\n", "~", "\ud800", "model", "-00001-of-00002", ".safetensors")
_names = st.sampled_from(_PLACES) | st.lists(st.sampled_from(_PARTS), max_size=6).map("".join)
_numbers = st.sampled_from(["", "-1", "3.5", "1e3", "²", "007", "9" * 5000, "many"]) | st.text(max_size=4)


@st.composite
def any_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Up to four changes: a bit flipped, bytes replaced or repeated from elsewhere, or the end cut off."""
    content = bytearray(original)
    places = [place for place, byte in enumerate(original) if byte]  # padding is nobody's
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        begin = min(draw(st.sampled_from(places)), len(content))
        end = begin + draw(st.integers(0, _LONGEST))
        kind = draw(st.sampled_from(["flip", "token", "bytes", "repeat", "cut"]))
        if kind == "cut":
            del content[begin:]
        elif kind == "flip":
            bit = 1 << draw(st.integers(0, 7))
            content[begin : begin + 1] = bytes(byte ^ bit for byte in content[begin : begin + 1])
        elif kind == "repeat":
            source = draw(st.integers(0, len(original)))
            content[begin:end] = original[source : source + draw(st.integers(0, _LONGEST))]
        else:
            content[begin:end] = draw(st.sampled_from(_TOKENS) if kind == "token" else st.binary(max_size=4))
    return bytes(content)


def json_document(original: bytes) -> SearchStrategy[bytes]:
    """One JSON text."""
    return any_bytes(original) | _json_text(original)


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
        line = draw(_json_text(lines[place]))
        return b"\n".join([*lines[:place], line, *lines[place + 1 :]])

    return any_bytes(original) | with_line()


def safetensors(original: bytes) -> SearchStrategy[bytes]:
    """A header and data."""
    return safetensors_header(original) | any_bytes(original)


def safetensors_header(original: bytes) -> SearchStrategy[bytes]:
    """The header alone: as bytes, as JSON, a tensor said to lie elsewhere, a number of the metadata."""
    length = int.from_bytes(original[:8], "little")
    prefix, header, data = original[:8], original[8 : 8 + length], original[8 + length :]

    @st.composite
    def with_place(draw: st.DrawFn) -> bytes:
        table = json.loads(header)
        row = table[draw(st.sampled_from(sorted(table.keys() - {"__metadata__"})))]
        shift = draw(st.integers(-len(data), len(data)) | st.sampled_from([-4, 4, 2**63, -(2**64)]))
        row["data_offsets"] = [offset + shift for offset in row["data_offsets"]]
        return _text(table)

    @st.composite
    def with_number(draw: st.DrawFn) -> bytes:
        table = json.loads(header)
        metadata = table.setdefault("__metadata__", {"format": "pt"})
        metadata[draw(st.sampled_from(sorted(metadata)))] = draw(_numbers)
        return _text(table)

    texts = any_bytes(header) | _json_text(header) | with_place() | with_number()
    fitted = texts.map(lambda text: len(text).to_bytes(8, "little") + text)
    return (fitted | any_bytes(prefix + header)).map(lambda start: start + data)


def _json_text(original: bytes) -> SearchStrategy[bytes]:
    return damaged(json.loads(original)).map(_text) | st.sampled_from(_WHOLES)


def _text(content: object) -> bytes:
    return json.dumps(content).encode()
