"""The same rows come out of every kind of file, and what is broken is named by file and line or row."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from experiment.errors import UserError
from llm_rlhf.data.files import read_rows

ROWS: list[dict[str, Any]] = [
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 1.5},
    {"prompt": "où?", "chosen": [{"role": "assistant", "content": "là"}], "rejected": "", "margin": None},
]
SAME_TYPES = [{"prompt": f"q{i}", "label": i % 2 == 0, "score": i / 2} for i in range(5)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def columns(path: Path) -> list[dict[str, Any]]:
    return [row.columns for row in read_rows(path)]


def test_json_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode(), mtime=0))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=2))
    (tmp_path / "d.json").write_text(lines(ROWS))  # the hub's habit: lines in a .json
    (tmp_path / "e.json").write_text("\ufeff" + json.dumps(ROWS))
    for file in sorted(tmp_path.iterdir()):
        assert columns(file) == ROWS, file
    assert [row.place for row in read_rows(tmp_path / "a.jsonl")] == [f"{tmp_path}/a.jsonl:{i}" for i in (1, 2)]
    assert [row.place for row in read_rows(tmp_path / "c.json")] == [f"{tmp_path}/c.json: row {i}" for i in (1, 2)]


def test_parquet_and_a_folder_of_shards(tmp_path: Path) -> None:
    for name, part in (("b", SAME_TYPES[3:]), ("a", SAME_TYPES[:3])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{name}.parquet")
    assert columns(tmp_path / "a.parquet") == SAME_TYPES[:3]
    assert columns(tmp_path) == SAME_TYPES
    assert [row.place for row in read_rows(tmp_path)][3] == f"{tmp_path}/b.parquet: row 1"
    (tmp_path / "c.jsonl").write_text(lines(SAME_TYPES))
    with pytest.raises(UserError, match=r"files of several kinds \(\.jsonl, \.parquet\)"):
        columns(tmp_path)


def test_what_datasets_saved(tmp_path: Path) -> None:
    import datasets

    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": str(i)}]}
        for i in (1, 2)
    ]
    saved = datasets.Dataset.from_list(chats)
    saved.save_to_disk(str(tmp_path / "one"))
    assert columns(tmp_path / "one") == chats
    assert next(iter(read_rows(tmp_path / "one"))).place == f"{tmp_path}/one: row 1"
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "two"))
    assert columns(tmp_path / "two" / "train") == chats
    with pytest.raises(UserError, match=r"holds the splits test, train; name one of them, such as .*two/test"):
        columns(tmp_path / "two")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(UserError, match=r"one: cannot be read as a saved data set"):
        columns(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.json", b'[{"prompt": "x"},\n{"prompt": "\xff"}]', r"a\.json:2: not UTF-8"),
        ("a.json", b'[{"prompt": "x"},\n{"prompt" "y"}]', r"a\.json:2: not valid JSON"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", r"a\.json:1: JSON that cannot be read \(Exceeds the limit"),
        ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", r"a\.jsonl:1: JSON that cannot be read \(Exceeds the limit"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1: JSON that cannot be read \(maximum recursion depth"),
        ("a.json", b'[{"prompt": "x"}, 3]', r"a\.json: row 2: expected a JSON object, got int"),
        ("a.jsonl", b'{"prompt": "x"}\n[1]\n', r"a\.jsonl:2: expected a JSON object, got list"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x"}\n', mtime=0)[:-9], r"gz: damaged or truncated"),
        (
            "a.json.gz",
            gzip.compress(b'[{"prompt": "x"}]', mtime=0)[:-9],
            r"gz: damaged or truncated|gz:\d: damaged",
        ),
        ("a.parquet", b"PAR1 nothing PAR1", r"a\.parquet: not a whole parquet file"),
        ("a.csv", b"prompt\nx\n", r"a\.csv: not a known kind of data file"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        columns(tmp_path / name)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file"):
        columns(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        columns(tmp_path / "none")
