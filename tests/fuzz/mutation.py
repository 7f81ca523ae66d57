"""Damage to the bytes of a file, for hypothesis: anywhere, or where it matters in a file of that format."""

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
_PATHS = ("../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "~", "a" * 300)
_PARTS = ("..", "/", "\\", "\0", "\n", "~", "\ud800", "model", "-00001-of-00002", ".safetensors")
_names = st.sampled_from(_PATHS) | st.lists(st.sampled_from(_PARTS), max_size=6).map("".join)
_numbers = st.sampled_from(["", "-1", "3.5", "1e3", "²", "007", "9" * 5000, "many"]) | st.text(max_size=4)


@st.composite
def any_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Up to four changes: a bit is flipped, bytes are replaced or copied from elsewhere, or the end is cut off."""
    content = bytearray(original)
    offsets = [offset for offset, byte in enumerate(original) if byte]  # padding has no meaning
    for _ in range(draw(st.sampled_from([1, 1, 2, 4]))):
        begin = min(draw(st.sampled_from(offsets)), len(content))
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
    """A JSON document."""
    return any_bytes(original) | _json_text(original)


def index(original: bytes) -> SearchStrategy[bytes]:
    """The index of a checkpoint; some names of shards lead elsewhere."""

    @st.composite
    def with_name(draw: st.DrawFn) -> bytes:
        content = json.loads(original)
        content["weight_map"][draw(st.sampled_from(sorted(content["weight_map"])))] = draw(_names)
        return _text(content)

    return json_document(original) | with_name()


def json_lines(original: bytes) -> SearchStrategy[bytes]:
    """A file with one JSON document per line."""
    lines = original.splitlines()

    @st.composite
    def with_line(draw: st.DrawFn) -> bytes:
        number = draw(st.integers(0, len(lines) - 1))
        line = draw(_json_text(lines[number]))
        return b"\n".join([*lines[:number], line, *lines[number + 1 :]])

    return any_bytes(original) | with_line()


def safetensors(original: bytes) -> SearchStrategy[bytes]:
    """A safetensors file: damage to its header, or to any bytes."""
    return safetensors_header(original) | any_bytes(original)


def safetensors_header(original: bytes) -> SearchStrategy[bytes]:
    """The header alone: its bytes, its JSON, the offsets of a tensor, or a value of the metadata."""
    length = int.from_bytes(original[:8], "little")
    prefix, header, data = original[:8], original[8 : 8 + length], original[8 + length :]

    @st.composite
    def with_offsets(draw: st.DrawFn) -> bytes:
        table = json.loads(header)
        entry = table[draw(st.sampled_from(sorted(table.keys() - {"__metadata__"})))]
        shift = draw(st.integers(-len(data), len(data)) | st.sampled_from([-4, 4, 2**63, -(2**64)]))
        entry["data_offsets"] = [offset + shift for offset in entry["data_offsets"]]
        return _text(table)

    @st.composite
    def with_number(draw: st.DrawFn) -> bytes:
        table = json.loads(header)
        metadata = table.setdefault("__metadata__", {"format": "pt"})
        metadata[draw(st.sampled_from(sorted(metadata)))] = draw(_numbers)
        return _text(table)

    headers = any_bytes(header) | _json_text(header) | with_offsets() | with_number()
    with_length = headers.map(lambda text: len(text).to_bytes(8, "little") + text)
    return (with_length | any_bytes(prefix + header)).map(lambda begin: begin + data)


def _json_text(original: bytes) -> SearchStrategy[bytes]:
    return damaged(json.loads(original)).map(_text) | st.sampled_from(_WHOLES)


def _text(content: object) -> bytes:
    return json.dumps(content).encode()
