"""Rows that no file can hold, or that Python cannot, cost themselves alone."""

import datetime
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import verify
from pipelines.rejected import rejection
from pipelines.sources import Place
from pipelines.units import PlanRequest, extras_json, pack, unpack
from tests.pipelines import standin
from tests.pipelines.outputs import account


def rejected(output):
    lines = [json.loads(x) for file in (output / "rejected").iterdir() for x in file.read_text().splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def test_what_no_file_can_hold_is_rejected_before_anything_is_made(tmp_path):
    lists = ["[" * depth + "]" * depth for depth in (490, 900, 100_000)]
    rows = [
        '{"prompt": "a cat"}',
        '{"prompt": "a", "note": "half \\ud83d"}',
        '{"prompt": "b", "half \\udcff": 1}',
        '{"prompt": "c \\ud83d"}',
        *(f'{{"prompt": "nested {i}", "note": {text}}}' for i, text in enumerate(lists)),
        *(f'{{"prompt": "d", "seed": {text}}}' for text in lists),
        '{"prompt": "a dog", "note": [1, {"b": 2}]}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    assert standin.run("--prompts", tmp_path / "p.jsonl", "--output", tmp_path / "out") == 0
    found = rejected(tmp_path / "out")
    assert "half of a surrogate pair" in found[2]
    assert "half of a surrogate pair" in found[3]
    assert {4, 7, 8, 9, 10} <= set(found)  # 5 and 6 are kept where Python's stack has room for them
    assert account(tmp_path / "out") == (len(rows), len(rows) - len(found), len(found), 0, 0)
    assert verify.main([str(tmp_path / "out")]) == 0
    manifest = pq.read_table(tmp_path / "out" / "manifest").to_pylist()
    assert {row["prompt"]: row["extras"] for row in manifest}["a dog"] == '{"note": [1, {"b": 2}]}'


def test_odd_times_in_parquet_cost_their_own_rows(tmp_path):
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "made": pa.array([0, 1, 2], pa.timestamp("ns")),
            "until": pa.array([0, 4_000_000, 1], pa.int32()).cast(pa.date32()),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    assert standin.run("--prompts", tmp_path / "p.parquet", "--output", tmp_path / "out") == 0
    assert account(tmp_path / "out") == (3, 2, 1, 0, 0)
    extras = {row["prompt"]: row["extras"] for row in pq.read_table(tmp_path / "out" / "manifest").to_pylist()}
    assert json.loads(extras["c"]) == {"made": "1970-01-01 00:00:00.000000002", "until": "1970-01-02"}


value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(extras=st.dictionaries(st.text(min_size=1), value, max_size=4))
@settings(deadline=None)
def test_other_columns_travel_as_the_text_that_the_manifest_keeps(extras):
    plan = PlanRequest(standin.Spec(), {}, None)
    columns = {f"x{name}": cell for name, cell in extras.items()}
    row = unpack(pack([plan(Place("f", 1), {"prompt": "a", **columns})]))[0]
    assert row.extras == extras_json(columns)
    kept = json.loads(row.extras)
    assert kept.keys() == columns.keys()
    for name, cell in columns.items():
        if not isinstance(cell, (list, dict, datetime.date)):
            assert kept[name] == (None if cell in (math.inf, -math.inf) else cell)


def test_a_rejection_shows_what_is_too_deep_to_be_shown():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    line = rejection(Place("f", 1), {"note": deep}, RecursionError())
    assert (line["reason"], line["values"]["note"]) == ("nested too deeply", "a list, nested too deeply")
