"""The package's own reader and header writer, with the safetensors library as the oracle."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from perta_fast.checkpoints.safetensors_file import SafetensorsFile, build_header
from perta_fast.dtypes import ITEM_SIZES, byte_count
from perta_fast.errors import InputError, RunError
from tests.support.checkpoints import draw, write_raw

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
SHAPES = ((), (0,), (1,), (7,), (3, 0, 2), (2, 3, 5))
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

# One file is rewritten for every example.
fuzz = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
layouts = st.dictionaries(
    names, st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3).map(tuple)), max_size=6
)
metadata_tables = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), names, max_size=3)


def filled(dtype: str, shape: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """A tensor whose stored bytes count up from ``start``; for BOOL they alternate."""
    size = byte_count(dtype, shape)
    raw = (torch.arange(start, start + size) % (2 if dtype == "BOOL" else 256)).to(torch.uint8)
    return raw.view(DTYPES[dtype]).reshape(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def seen_by_the_library(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        name: (row["dtype"], row["shape"], bytes(row["data"]))
        for name, row in safetensors.deserialize(path.read_bytes())
    }


def seen_by_us(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    file = SafetensorsFile.open(path)
    return {
        name: (entry.dtype, list(entry.shape), file.data[entry.begin : entry.end].tobytes())
        for name, entry in file.tensors.items()
    }


def test_every_dtype_that_we_name_is_one_of_the_format() -> None:
    assert DTYPES.keys() == ITEM_SIZES.keys()
    assert all(ITEM_SIZES[name] == dtype.itemsize for name, dtype in DTYPES.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_what_the_library_writes(dtype: str, tmp_path: Path) -> None:
    tensors = {f"tensor of {shape}": filled(dtype, shape, 3) for shape in SHAPES}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile.open(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"}
    assert file.size == (tmp_path / "x.safetensors").stat().st_size
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = file.tensors[name]
        assert (entry.name, entry.dtype, entry.shape) == (name, dtype, tuple(tensor.shape))
        assert (entry.count, entry.size) == (tensor.numel(), tensor.nbytes)
        assert file.data[entry.begin : entry.end].tobytes() == raw_bytes(tensor)


@given(layout=layouts, metadata=metadata_tables)
@fuzz
def test_reads_any_layout_that_the_library_writes(
    layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {name: filled(*row) for name, row in layout.items()}
    path.write_bytes(save(tensors, metadata or None))  # an empty table breaks the library's own header
    assert SafetensorsFile.open(path).metadata == metadata
    assert seen_by_us(path) == seen_by_the_library(path)


@given(layout=layouts, metadata=metadata_tables)
@fuzz
def test_the_library_reads_what_we_lay_out(
    layout: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {name: filled(*row, start=number) for number, (name, row) in enumerate(layout.items())}
    header, offsets = build_header(layout, metadata)
    assert len(header) % 64 == 0
    content = bytearray(header) + bytes(sum(tensor.nbytes for tensor in tensors.values()))
    for name, tensor in tensors.items():
        content[offsets[name] : offsets[name] + tensor.nbytes] = raw_bytes(tensor)
    path.write_bytes(content)
    with safetensors.safe_open(path, "pt") as file:
        assert set(file.keys()) == layout.keys()
        assert (file.metadata() or {}) == metadata
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert raw_bytes(found) == raw_bytes(tensor)


@given(data=st.data())
@fuzz
def test_data_stays_readable_after_its_pages_are_released(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    if not path.exists():
        save_file({"a": draw((9000,))}, path)
    file = SafetensorsFile.open(path)
    begin = data.draw(st.integers(0, file.size))
    file.release(begin, data.draw(st.integers(begin, file.size)))
    assert file.data.tobytes() == path.read_bytes()


def assert_no_worse_than_the_library(path: Path) -> None:
    """Our reader agrees with the library on what a file holds and on whether it is valid."""
    before = path.read_bytes()
    try:
        expected = seen_by_the_library(path)
    except safetensors.SafetensorError:
        with pytest.raises(InputError, match="safetensors: "):
            SafetensorsFile.open(path)
    else:
        try:
            assert seen_by_us(path) == expected
        except InputError as error:  # rows as arrays and a null table of metadata are no one's habit
            assert "table" in str(error) or "unknown dtype" in str(error)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@given(st.binary(max_size=200))
@example(b"")
@example(b"\x00" * 8)
@example(b"\xff" * 8)
@fuzz
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert_no_worse_than_the_library(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
offsets = st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted)
rows = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8"]) | json_values,
        "shape": st.lists(st.integers(0, 6), max_size=2) | json_values,
        "data_offsets": offsets | json_values,
    }
)


@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__"]) | st.text(max_size=3), rows | json_values, max_size=4
    )
    | json_values,
    data=st.binary(max_size=24),
)
@example(header={"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, data=b"1234")
@example(header={"a": {"dtype": "F32", "shape": [2**62] * 500, "data_offsets": [0, 4]}}, data=b"1234")
@example(header={"\ud800": ONE}, data=b"1234")
@example(header={"__metadata__": {"\ud800": ""}, "a": ONE}, data=b"1234")
@fuzz
def test_headers_of_any_json(tmp_path: Path, header: object, data: bytes) -> None:
    assert_no_worse_than_the_library(write_raw(tmp_path / "x.safetensors", header, data))


@given(data=st.data())
@fuzz
def test_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    valid = save({"a": draw((2, 3)), "b": draw((5,), torch.bfloat16), "c": draw(())}, {"format": "pt"})
    content = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["flip", "replace", "insert", "delete", "cut"]))
        if kind == "flip":
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "replace":
            content[place] = data.draw(st.sampled_from(b'0123456789"[]{}:,- F'))
        elif kind == "insert":
            content.insert(place, data.draw(st.integers(0, 255)))
        elif kind == "delete":
            del content[place]
        else:
            del content[place:]
        assume(content)
    assume(b"-0" not in content)  # a whole number to Python, not to the library; either is harmless
    path.write_bytes(content)
    assert_no_worse_than_the_library(path)


def test_a_name_given_twice_means_what_it_means_to_the_library(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":%s}' % json.dumps(ONE).encode()
    path = write_raw(tmp_path / "x.safetensors", header, b"1234")
    assert seen_by_us(path) == seen_by_the_library(path)


def two(first: tuple[int, int], second: tuple[int, int]) -> dict[str, object]:
    return {"a": ONE | {"data_offsets": list(first)}, "b": ONE | {"data_offsets": list(second)}}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "it has 0 bytes, fewer than 8"),
    "short": (lambda path: path.write_bytes(b"1234"), "it has 4 bytes, fewer than 8"),
    "header longer than the file": (
        lambda path: write_raw(path, {"a": ONE}, b"1234", length=5000),
        "claims 5000 bytes, the file has",
    ),
    "header beyond any bound": (
        lambda path: write_raw(path, {"a": ONE}, b"1234", length=2**63),
        "claims 9223372036854775808 bytes",
    ),
    "a web page": (lambda path: path.write_bytes(b"<!DOCTYPE html><html></html>"), "not a safetensors file"),
    "not JSON": (lambda path: write_raw(path, b"{'a': 1}"), "header is not JSON"),
    "not UTF-8": (lambda path: write_raw(path, json.dumps({"a": 1}).encode("utf-16-le")), "header is not JSON"),
    "deeply nested": (lambda path: write_raw(path, b"[" * 200_000), "header is not JSON"),
    "a list": (lambda path: write_raw(path, []), "not a JSON object"),
    "metadata with a number": (
        lambda path: write_raw(path, {"__metadata__": {"a": 1}}),
        "__metadata__ is not a table of strings",
    ),
    "row is a number": (lambda path: write_raw(path, {"a": 1}), "tensor a: its header row is not a table"),
    "no dtype": (lambda path: write_raw(path, {"a": {}}), "tensor a: unknown dtype None"),
    "unknown dtype": (
        lambda path: write_raw(path, {"a": ONE | {"dtype": "F128"}}, b"1234"),
        "tensor a: unknown dtype 'F128'",
    ),
    "negative shape": (
        lambda path: write_raw(path, {"a": ONE | {"shape": [-1]}}, b"1234"),
        "tensor a: its shape or data_offsets are malformed",
    ),
    "wrong number of bytes": (
        lambda path: write_raw(path, {"a": ONE | {"shape": [2]}}, b"1234"),
        r"tensor a: shape \[2\] as F32 does not take the 4 bytes",
    ),
    "huge shape": (
        lambda path: write_raw(path, {"a": ONE | {"shape": [2**62, 2**62]}}, b"1234"),
        "tensor a: shape .* does not take the 4 bytes",
    ),
    "backward offsets": (
        lambda path: write_raw(path, {"a": ONE | {"data_offsets": [4, 0]}}, b"1234"),
        "tensor a: shape .* does not take the -4 bytes",
    ),
    "overlap": (
        lambda path: write_raw(path, two((0, 4), (0, 4)), b"1234"),
        "tensor b overlaps another or leaves a hole before it",
    ),
    "hole": (
        lambda path: write_raw(path, two((0, 4), (8, 12)), b"1" * 12),
        "tensor b overlaps another or leaves a hole before it",
    ),
    "truncated data": (
        lambda path: write_raw(path, two((0, 4), (4, 8)), b"1234567"),
        "is truncated: its header promises .* fetch or copy it again",
    ),
    "data left over": (lambda path: write_raw(path, {"a": ONE}, b"123456"), "has 2 bytes after its last tensor"),
    "missing": (lambda path: None, "cannot be read: No such file"),
    "directory": (lambda path: path.mkdir(), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_the_reason(case: str, tmp_path: Path) -> None:
    write, reason = BAD[case]
    path = tmp_path / "x.safetensors"
    write(path)
    with pytest.raises(InputError, match=reason) as caught:
        SafetensorsFile.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_changes_before_it_is_mapped_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": ONE}, b"1234")
    file = SafetensorsFile.open(path)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(InputError, match="changed size"):
        _ = file.data


def test_a_file_that_goes_before_it_is_mapped_is_named(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": ONE}, b"1234")
    file = SafetensorsFile.open(path)
    path.unlink()
    with pytest.raises(RunError, match="safetensors: cannot be read: No such file"):
        _ = file.data
