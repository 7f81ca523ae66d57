"""Data files of every format give the same rows, read once and hashed; damaged ones are refused by name."""

import gzip
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from perta_fast import InputError
from perta_fast.data.formats import data_files, hash_data
from perta_fast.data.rows import load_rows, read_data
from tests.data.test_forms import CALL, FORMS, SHARED, TALK, TOOL

ROWS = [{"question": "Who, then?", "answer": 'Me,\n"said" I; é'}, {"question": "And 2?", "answer": "Author 2."}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'question,answer\n"Who, then?","Me,\n""said"" I; é"\n\nAnd 2?,Author 2.\n'


def separated(by: str) -> bytes:
    return CSV.replace("question,", f"question{by}").replace('",', f'"{by}').replace("?,", f"?{by}").encode()


BY_TEXT: dict[str, tuple[str, bytes]] = {
    "JSON lines": ("a.jsonl", LINES),
    "JSON lines by another name": ("a.txt", LINES),
    "JSON list": ("a.json", json.dumps(ROWS).encode()),
    "JSON list, printed for people": ("a.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode()),
    "one object, printed for people": ("a.json", b" \n" + json.dumps(ROWS[0], indent=2).encode()),
    "JSON list in a file of lines": ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
    "gzip": ("a.jsonl.gz", gzip.compress(LINES)),
    "gzip by another name": ("a.jsonl", gzip.compress(LINES)),
    "CSV": ("a.csv", CSV.encode()),
    "CSV of a spreadsheet": ("a.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode()),
    "CSV with semicolons": ("a.csv", separated(";")),
    "CSV with spaces in the header": ("a.csv", CSV.replace("question,answer", "question, answer ").encode()),
    "CSV with gzip": ("a.csv.gz", gzip.compress(CSV.encode())),
    "CSV in capitals": ("A.CSV", CSV.encode()),
    "CSV with gzip in capitals": ("A.CSV.GZ", gzip.compress(CSV.encode())),
    "TSV": ("a.tsv", separated("\t")),
}  # fmt: skip


def contents(path: Path | str, fields: dict[str, str] | None = None) -> list[Any]:
    return [row.content for row in load_rows(path, fields)]


@pytest.mark.parametrize("case", BY_TEXT)
def test_rows_of_text_files(case: str, tmp_path: Path) -> None:
    name, content = BY_TEXT[case]
    (tmp_path / name).write_bytes(content)
    rows, digest = read_data(tmp_path / name)
    expected = [row | {"answer": row["answer"].replace("\n", "\r\n")} for row in ROWS] if b"\r\n" in content else ROWS
    assert [row.content for row in rows] == (expected[:1] if case.startswith("one object") else expected)
    assert digest == blake3(content).hexdigest() == hash_data(tmp_path / name)


def to_parquet(rows: list[Any], path: Path) -> Path:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.Table.from_pylist(rows), path / "a.parquet")
    return path / "a.parquet"


def to_arrow(kind: str) -> Callable[[list[Any], Path], Path]:
    def write(rows: list[Any], path: Path) -> Path:
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist(rows)
        with getattr(pa, f"RecordBatch{kind}Writer")(path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        return path / "a.arrow"

    return write


def to_disk(rows: list[Any], path: Path) -> Path:
    data_set = pytest.importorskip("datasets").Dataset.from_list(rows)
    data_set.save_to_disk(path / "saved", num_shards=min(2, len(rows)))
    return path / "saved"


def to_csv(rows: list[Any], path: Path) -> Path:
    """As pandas writes lists: JSON would be text in a cell."""
    pandas = pytest.importorskip("pandas")
    cells = [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
    pandas.DataFrame(cells).to_csv(path / "a.csv", index=False)
    return path / "a.csv"


def to_text(ending: str) -> Callable[[list[Any], Path], Path]:
    def write(rows: list[Any], path: Path) -> Path:
        file = path / f"a{ending}"
        text = json.dumps(rows, indent=1) if ".json" in file.suffixes else "\n".join(map(json.dumps, rows))
        file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())
        return file

    return write


WRITERS: dict[str, Callable[[list[Any], Path], Path]] = {
    "lines": to_text(".jsonl"),
    "list": to_text(".json"),
    "lines, gzip": to_text(".jsonl.gz"),
    "list, gzip": to_text(".json.gz"),
    "CSV": to_csv,
    "parquet": to_parquet,
    "Arrow file": to_arrow("File"),
    "Arrow stream": to_arrow("Stream"),
    "saved by datasets": to_disk,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", WRITERS)
def test_every_form_in_every_kind_of_file(kind: str, form: str, tmp_path: Path) -> None:
    record, content, read_as = FORMS[form]
    path = WRITERS[kind]([record, record], tmp_path)
    if kind == "CSV" and form in ("lists of TRL", "a conversation goes before"):
        pytest.skip("a text in CSV is a question, whatever it looks like")
    rows, digest = read_data(path)
    assert [row.content for row in rows] == [content, content]
    assert {row.read_as for row in rows} == {read_as}
    assert digest == hash_data(path)


def test_objects_in_arrow_have_their_own_fields_alone(tmp_path: Path) -> None:
    """Arrow gives each object the fields of all, as null."""
    other = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "int"}}}}}
    result = {"role": "tool", "content": "1", "name": "f"}
    row = {"messages": [TALK[0], CALL, result, TALK[1] | {"weight": 1}], "tools": [TOOL, other]}
    for kind in ("parquet", "saved by datasets"):
        assert contents(WRITERS[kind]([row, {"messages": TALK, "tools": None}], tmp_path)) == [row, {"messages": TALK}]


def test_json_in_arrow(tmp_path: Path) -> None:
    """Objects that have no type in common are JSON in texts there."""
    data_set = pytest.importorskip("datasets").Dataset
    tools = [TOOL, {"type": "function", "function": {"name": 3}}]
    try:
        made = data_set.from_list([{"messages": TALK, "tools": tools}], on_mixed_types="use_json")
    except TypeError:
        pytest.skip("this version of datasets has no JSON")
    made.save_to_disk(tmp_path / "saved")
    assert contents(tmp_path / "saved") == [{"messages": TALK, "tools": tools}]


def test_times_in_a_parquet_file_do_not_matter(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    times = pa.array([1, 2], pa.timestamp("ns", "Nowhere/Nothing"))
    parquet.write_table(pa.table({"text": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    assert contents(tmp_path / "a.parquet") == [{"text": "a"}, {"text": "b"}]


def test_a_pipe_of_any_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    content = gzip.compress(LINES)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,))
    writer.start()
    rows, digest = read_data(tmp_path / "pipe")
    writer.join()
    assert [row.content for row in rows] == ROWS
    assert digest == blake3(content).hexdigest()


def test_where_a_row_stands(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,more\n"one\nand a half",x\n\ntwo,y\n')
    (tmp_path / "a.json").write_text('[{"text": "one"},\n{"text": "two"}]')
    assert [row.where for row in load_rows(tmp_path / "a.csv")] == [f"{tmp_path}/a.csv, line {n}" for n in (2, 5)]
    assert [row.where for row in load_rows(tmp_path / "a.json")] == [f"{tmp_path}/a.json, object {n}" for n in (1, 2)]


def test_a_long_cell_and_empty_cells(tmp_path: Path) -> None:
    book = "word " * 100_000
    (tmp_path / "a.csv").write_text(f"id,text,question,answer\n1,{book},,\n2,,Who?,Me.\n")
    assert contents(tmp_path / "a.csv") == [{"text": book}, {"question": "Who?", "answer": "Me."}]


# Directories.


def directory(path: Path, **files: bytes) -> Path:
    for name, content in files.items():
        file = path / name.replace("__", "/").replace("_dot_", ".").replace("_of_", "-of-").replace("_part_", "-")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return path


def test_a_directory_of_files(tmp_path: Path) -> None:
    line = b'{"text": "%s"}\n'
    folder = directory(
        tmp_path / "set",
        data__train_part_00000_of_00002_dot_jsonl=line % b"1",
        data__train_part_00001_of_00002_dot_jsonl=line % b"2",
        test_dot_json=line % b"3",
        other__test_dot_csv=b"text\n4\n",
        default__valid__0000_dot_jsonl=line % b"5",
        README_dot_md=b"# nothing",
        dataset_infos_dot_json=b"{}",
        _dot_cache__x_dot_json=b"{}",
    )
    expected = {
        "data/train": ["1", "2"], "train": ["1", "2"], "test": ["3"], "test.json": ["3"], "other/test": ["4"],
        "other/test.csv": ["4"], "valid": ["5"], "data/train-00001-of-00002.jsonl": ["2"],
    }  # fmt: skip
    for name, texts in expected.items():
        assert [content["text"] for content in contents(f"{folder}:{name}")] == texts, name
    rows, digest = read_data(f"{folder}:train")
    assert digest == blake3(line % b"1" + line % b"2").hexdigest() == hash_data(f"{folder}:train")
    assert rows[1].where == f"{folder}/data/train-00001-of-00002.jsonl, line 1"
    for path, problem in ((f"{folder}:nothing", "has no nothing"), (folder, "cannot be read: Is a directory")):
        with pytest.raises(InputError) as caught:
            load_rows(path)
        text = str(caught.value)
        assert text.startswith(
            f"{folder}: {problem}, with the data files data/train, default/valid, other/test, test; "
        )
        named = text.rpartition(" in ")[2]
        assert contents(named)  # the advice is right


def shards(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"text": "{number}"}}\n')
    return folder


MISSING = {
    "the last": (["data/train-00000-of-00002"], "1 of 2 shards, first data/train-00001-of-00002"),
    "the first": (["data/train-00001-of-00002"], "1 of 2 shards, first data/train-00000-of-00002"),
    "several": (["data/train-0-of-12", "data/train-3-of-12"], "10 of 12 shards, first data/train-01-of-12"),
    "with a hash": (["data/train-00000-of-00002-0a1b"], "1 of 2 shards, first data/train-00001-of-00002"),
    "counted from 1": (["data/train-1-of-3", "data/train-3-of-3"], "1 of 3 shards, first data/train-2-of-3"),
    "a number twice": (["data/train-0-of-2-0a", "data/train-0-of-2-1b"], "1 of 2 shards, first data/train-1-of-2"),
    "of one of two": (["data/train-0-of-1", "data/train-00-of-02"], "1 of 2 shards, first data/train-01-of-02"),
    "a great many": ([f"data/train-0-of-{10**99}"], f"{10**99 - 1} of {10**99} shards, first data/train-0"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_shard_that_is_missing_is_named(case: str, tmp_path: Path) -> None:
    names, lacks = MISSING[case]
    folder = shards(tmp_path / "set", *names, "data/test-00000-of-00001")
    for read in (load_rows, hash_data):
        with pytest.raises(InputError) as caught:
            read(f"{folder}:train")
        assert str(caught.value).startswith(f"{folder}: data/train lacks {lacks}")
        assert str(caught.value).endswith("; put back what is missing")
    assert contents(f"{folder}:test") == [{"text": str(len(names))}]
    assert contents(f"{folder}:{names[0]}.jsonl") == [{"text": "0"}]  # that file alone was asked for


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002", "train-00001-of-00002"],
        ["train-1-of-2", "train-2-of-2"],
        ["train-00000-of-00002-0a1b", "train-00001-of-00002-2c3d"],
    ],
)
def test_all_shards_are_there(names: list[str], tmp_path: Path) -> None:
    assert contents(shards(tmp_path / "set", *names)) == [{"text": "0"}, {"text": "1"}]


def test_a_directory_of_one_file_needs_no_name(tmp_path: Path) -> None:
    assert contents(directory(tmp_path / "set", train_dot_csv=b"text\na\n")) == [{"text": "a"}]


def test_the_same_name_in_two_formats(tmp_path: Path) -> None:
    folder = directory(tmp_path / "set", train_dot_csv=b"text\na\n", train_dot_jsonl=b'{"text": "b"}')
    with pytest.raises(InputError, match=r"holds train\.csv, train\.jsonl; name one of them, after .*set:"):
        load_rows(folder)
    assert contents(f"{folder}:train.csv") == [{"text": "a"}]


def test_a_path_that_holds_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "c:d.jsonl").write_bytes(LINES)
    assert contents(tmp_path / "a:b" / "c:d.jsonl") == contents(f"{tmp_path}/a:b") == ROWS
    assert contents(f"{tmp_path}/a:b:c:d") == ROWS
    assert data_files(f"{tmp_path}/x:y") == [tmp_path / "x:y"]


def test_splits_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:1])
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "single")
    assert contents(f"{tmp_path}/both:train") == ROWS
    assert contents(f"{tmp_path}/both:test") == ROWS[:1]
    assert contents(tmp_path / "single") == ROWS
    for path in (tmp_path / "both", f"{tmp_path}/both:valid"):
        with pytest.raises(InputError, match=r"both: .* with the splits train, test; name one, as in .*both:train$"):
            load_rows(path)
    one.select([1, 0]).save_to_disk(tmp_path / "selected")
    assert contents(tmp_path / "selected") == ROWS[::-1]
    with pytest.raises(InputError, match="is one data set without splits; leave :train out"):
        load_rows(f"{tmp_path}/selected:train")


# Files that are refused.

BAD: dict[str, tuple[str, bytes, str]] = {
    "a list that is cut short": ("a.json", b'[{"text": "a"},\n', "a.json, line 2: is not JSON; a file that begins"),
    "two lists": ("a.json", b"[]\n[]", "a.json, line 2: is not JSON"),
    "a deep list": ("a.json", b"[" * 100_000, "a.json: is not JSON"),
    "an empty list": ("a.json", b"[]", "a.json: holds no samples"),
    "a list of texts": ("a.json", b'["a"]', "a.json, object 1: is not a JSON object, but a text"),
    "rows within an object": ("a.json", b'{\n"data": [{"text": "a"}]}', 'a.json: needs "question" and "answer", or'),
    "an object that is cut short": ("a.json", b'{\n"text": "a"', "a.json, line 1: is not JSON"),
    "gzip cut short": ("a.gz", gzip.compress(LINES)[:-9], "a.gz: cannot be decompressed: "),
    "gzip damaged": ("a.gz", gzip.compress(LINES)[:20] + b"xxxxxxxxxxxxxxxxxx", "a.gz: cannot be decompressed: "),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\0", "a.jsonl.zst: is compressed by zstd; decompress it first"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04\0", "a.xlsx: is compressed by zip"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a.jsonl: is a pointer of git-lfs"),
    "parquet cut short": ("a.parquet", b"PAR1\x15\x04\x15", "a.parquet: is damaged, or not Arrow or parquet"),
    "Arrow cut short": ("a.arrow", b"\xff\xff\xff\xff\x10\x01", "a.arrow: is damaged, or not Arrow or parquet"),
    "a short row": ("a.csv", b"question,answer\n\nWho?\n", "a.csv, line 3: has 1 cells, and the header has 2"),
    "a long row": ("a.csv", b"text\na, b\n", "a.csv, line 2: has 2 cells, and the header has 1"),
    "an open quote": ("a.csv", b'text\na\n"b\nc\n', "a.csv, line 4: is not CSV: unexpected end of data"),
    "a quote that ends early": ("a.csv", b'text\n"b"c\n', "a.csv, line 2: is not CSV: "),
    "two columns of one name": ("a.csv", b"text,text\na,b\n", "a.csv, line 1: names a column twice"),
    "a header alone": ("a.csv", b"text\n", "a.csv: holds no samples"),
    "no header": ("a.csv", b"Who?,Me.\nWhat?,This.\n", 'a.csv, line 2: needs "question" and "answer"'),
    "an empty cell": ("a.csv", b"question,answer\nWho?,\n", 'a.csv, line 2: "answer" must be a text'),
    "another encoding": ("a.csv", "text\ncafé\n".encode("latin-1"), "a.csv, line 2: is not UTF-8 text"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named(case: str, tmp_path: Path) -> None:
    name, content, reason = BAD[case]
    if "Arrow" in reason:
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_rows(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{reason}")


STATES: dict[str, tuple[bytes, str]] = {
    "no files": (b"{}", "state.json: names no files of data"),
    "a file elsewhere": (b'{"_data_files": [{"filename": "../a.arrow"}]}', "state.json: names no files of data"),
    "a selection": (
        b'{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i.arrow"}]}',
        "state.json: is a selection of rows",
    ),
    "a file that is gone": (b'{"_data_files": [{"filename": "a.arrow"}]}', "a.arrow: cannot be read: No such file"),
}


@pytest.mark.parametrize("case", STATES)
def test_a_bad_directory_is_named(case: str, tmp_path: Path) -> None:
    content, reason = STATES[case]
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_rows(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/{reason}")


def test_without_pyarrow_its_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: .* pip install 'perta-fast\[data\]'"):
        load_rows(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert contents(tmp_path / "a.jsonl") == ROWS


def test_names_of_fields_of_a_file(tmp_path: Path) -> None:
    path = to_text(".jsonl")([{"q": "Who?", "a": "Me.", "conversations": SHARED}], tmp_path)
    assert contents(path, {"question": "q", "answer": "a"}) == [{"question": "Who?", "answer": "Me."}]
    with pytest.raises(
        InputError, match=r'a\.jsonl: no row has "query", which fields names; they have "q", "a", "conv'
    ):
        load_rows(path, {"question": "query", "answer": "a"})
