"""Packing: a plan depends on its rows alone, its units are alike inside, and little of a batch is padding."""

import json
import math
import random
import threading
import tracemalloc
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import layout, units
from pipelines.records import RowError
from pipelines.rejected import rejection
from pipelines.sources import Place
from pipelines.storage import Store
from pipelines.units import (
    Join,
    PlanRequest,
    PlanRows,
    Row,
    extras_json,
    make_units,
    pack,
    padded_calls,
    read_done,
    shard_count,
    shard_of,
    unit_name,
    unpack,
)
from sdjax.request import Request
from sdjax.values import RequestError
from tests.pipelines import standin

SPEC = standin.Spec()


def planned(**fields) -> Row:
    request = SPEC.resolve(Request(**{"prompt": "a", **fields}))
    return Row(SPEC.id(request), repr(SPEC.program(request)), SPEC.calls(request), request, "{}", Place("f", 1))


def mixed(n: int) -> list[Row]:
    """Rows of four sizes, lengths 1 to 50, as different as a prompt file may hold them."""
    draw = random.Random(0)
    sizes = [(16, 16), (16, 24), (24, 16), (32, 32)]
    rows = []
    for i in range(n):
        width, height = draw.choice(sizes)
        rows.append(planned(seed=i, num_inference_steps=draw.randint(1, 50), width=width, height=height))
    return rows


@given(st.lists(st.integers(0, 999), unique=True, max_size=60), st.integers(1, 20), st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_plan_is_a_partition_that_order_does_not_change(seeds, size, draw):
    rows = [planned(seed=s, num_inference_steps=1 + s % 7, width=16 + 8 * (s % 3)) for s in seeds]
    units = list(make_units(rows, size))
    draw.shuffle(rows)
    assert list(make_units(rows, size)) == units
    assert sorted(row.id for unit in units for row in unit.rows) == sorted(row.id for row in rows)
    for unit in units:
        assert 1 <= len(unit.rows) <= size
        assert len({row.program for row in unit.rows}) == 1
        assert unit.name == unit_name(row.id for row in unit.rows)
    for program in {row.program for row in rows}:
        of_program = [unit for unit in units if unit.rows[0].program == program]
        assert sum(len(unit.rows) < size for unit in of_program) <= 1
        calls = [row.calls for unit in of_program for row in unit.rows]
        assert calls == sorted(calls)


def test_padding_of_10_000_mixed_rows_is_below_3_percent():
    units = list(make_units(mixed(10_000), 256))
    useful = sum(row.calls for unit in units for row in unit.rows)
    run = sum(padded_calls(unit.rows, 32) for unit in units)  # 8 devices, 4 images each
    assert 0 <= 1 - useful / run < 0.03


def test_padded_calls_counts_full_batches_as_long_as_their_longest():
    lengths = [planned(num_inference_steps=n) for n in (2, 3, 5)]
    assert padded_calls(lengths, 2) == 2 * 3 + 2 * 5
    assert padded_calls(lengths + [planned(num_inference_steps=7, width=64)], 4) == 4 * 5 + 4 * 7
    assert padded_calls([], 4) == 0


def test_ids_spread_evenly_over_shards():
    assert shard_count(0) == 1
    assert shard_count(10_000_000) == 610
    rows = mixed(2_000)
    held = [sum(shard_of(row.id, 4) == shard for row in rows) for shard in range(4)]
    assert min(held) > 400


def test_a_row_travels_whole_and_small():
    rows = mixed(256)
    assert unpack(pack(rows)) == rows
    assert len(pack(rows)) < 100 * len(rows)


def test_ids_that_are_done_are_held_only_where_they_meet_rows(tmp_path):
    rows = mixed(100)
    done = [f"{i:032x}" for i in range(200_000)]
    values = [("done", pack(done[i : i + 1000])) for i in range(0, len(done), 1000)]
    values.insert(7, ("rows", pack(rows[:60])))
    values += [("rows", pack(rows[40:])), ("done", pack([row.id for row in rows[50:]]))]
    stage = Join(str(tmp_path), list)
    stage.setup()
    tracemalloc.start()
    try:
        counts, *left = stage.process((0, values))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert {row.id for row in left} == {row.id for row in rows[:50]}
    assert {name: counts.value[name] for name in ("duplicates", "already_done", "planned")} == {
        "duplicates": 20,
        "already_done": 50,
        "planned": 50,
    }
    assert peak < 2**21  # all ids together are more than 2**24


@pytest.mark.parametrize("damage", ["cut short", "its footer", "its text"])
def test_a_damaged_manifest_stops_the_plan_by_its_name(tmp_path, damage):
    path = tmp_path / "manifest" / f"{'a' * 32}.parquet"
    path.parent.mkdir()
    ids = [f"{i:032x}" for i in range(9)]
    pq.write_table(pa.table({"id": ids}), path, compression="none", use_dictionary=False, write_statistics=False)
    name = f"manifest/{path.name}"
    ((shard, (kind, packed)),) = read_done([name], 1, str(tmp_path))
    assert (shard, kind, unpack(packed)) == (0, "done", ids)
    data = bytearray(path.read_bytes())
    if damage == "its text":
        data[data.index(ids[3].encode())] = 0xFF
    elif damage == "its footer":
        data[-int.from_bytes(data[-8:-4], "little") - 8] ^= 0xFF
    path.write_bytes(data[:-9] if damage == "cut short" else data)
    says = f"^{name} cannot be read: [^\n]+; delete this manifest and run the command again$"
    with pytest.raises(ValueError, match=says):
        list(read_done([name], 1, str(tmp_path)))


def read_rows(stage, element="piece"):
    """What a stage of PlanRows makes of a piece: the rows of each packed element, and its share of the account."""
    stage.setup()
    *packed, counts = stage.process(element)
    stage.finish_bundle()
    return [unpack(blob) for _, (_, blob) in packed], counts.value


def test_a_piece_that_is_tried_again_replaces_its_rejects(tmp_path):
    flaky, store = [1, 2, 3], Store(str(tmp_path))

    def plan(place, values):
        if place.row in flaky:
            raise RequestError("image gs://b/x.png cannot be read: 503")
        return planned(seed=place.row)

    def attempt(element="piece"):
        rows = [(Place("p.jsonl", i), {"prompt": f"p {i}"}) for i in range(1, 9)]
        read_rows(PlanRows(lambda _: rows, plan, 1, str(tmp_path)), element)
        return sorted(
            json.loads(x)["row"] for name in layout.find(store, "rejected") for x in store.read(name).splitlines()
        )

    assert attempt() == [1, 2, 3]
    flaky.pop()
    assert attempt() == [1, 2]
    assert attempt("another") == [1, 1, 2, 2]
    flaky.clear()
    assert attempt("another") == [1, 2]
    assert attempt() == []


def test_rows_with_pictures_are_planned_together_and_rows_of_text_here(tmp_path):
    together, here = threading.Barrier(8, timeout=60), threading.get_ident()

    def plan(place, values):
        if "Image " in values:
            together.wait()
        else:
            assert threading.get_ident() == here
        if place.row % 5 == 0:
            raise RequestError("no")
        return planned(seed=place.row)

    rows = [(Place("f", i), {"prompt": "a", **({"Image ": "a.png"} if i % 2 else {"IMAGE": ""})}) for i in range(80)]
    fetches = PlanRequest(SPEC, {}, None).fetches
    packed, counts = read_rows(PlanRows(lambda _: rows, plan, 1, str(tmp_path), fetches))
    assert [row.request.seed for rows in packed for row in rows] == [i for i in range(80) if i % 5]
    assert (counts["rows"], counts["rejected"]) == (80, 16)


def test_a_default_picture_is_fetched_for_every_row():
    read = Place("f", 1), {"prompt": "a"}
    assert not PlanRequest(SPEC, {"seed": 1}, None).fetches(read)
    assert PlanRequest(SPEC, {"control_image": "a.png"}, None).fetches(read)
    assert not PlanRequest(SPEC, {"image": "a.png"}, None).fetches((Place("f", 1), RowError("no row")))


def test_rows_that_hold_much_go_on_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_HELD", 1000)
    rows = [(Place("f", i), i) for i in range(10)]

    def plan(place, i):
        return planned(seed=i)._replace(extras="x" * 300)

    packed, _ = read_rows(PlanRows(lambda _: rows, plan, 1, str(tmp_path)))
    assert [len(rows) for rows in packed] == [4, 4, 2]


numbers = st.floats() | st.integers() | st.none() | st.booleans() | st.text(st.characters(codec="utf-8"))
columns = st.dictionaries(
    st.text("abc"), st.recursive(numbers, lambda v: st.lists(v) | st.tuples(v) | st.dictionaries(st.text("abc"), v))
)


@given(columns)
@settings(max_examples=60, deadline=None)
def test_other_columns_are_json(extras):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    json.loads(extras_json(extras), parse_constant=refuse)


def test_a_gap_among_other_columns_is_null():
    gaps = {
        "score": math.nan,
        "far": [-math.inf, (1.5, math.inf)],
        "deep": {"a": {"b": math.nan}},
        "day": date(2026, 1, 2),
    }
    said = '{"day": "2026-01-02", "deep": {"a": {"b": null}}, "far": [null, [1.5, null]], "score": null}'
    assert extras_json(gaps) == said
    assert extras_json({"b": 1.0, "a": "ü", "c": [True, None]}) == '{"a": "ü", "b": 1.0, "c": [true, null]}'


def test_a_rejection_is_one_readable_line():
    line = rejection(Place("f.csv", 3), {"prompt": "x" * 5000, "n": float("nan"), "b": "\udcff"}, RequestError("a\nb"))
    assert (line["file"], line["row"], line["reason"]) == ("f.csv", 3, "a b")
    assert line["values"]["prompt"].endswith("... (5,000 characters)")
    assert line["values"] | {"prompt": ""} == {"prompt": "", "n": "nan", "b": "\\udcff"}
