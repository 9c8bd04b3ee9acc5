"""Prompt files: every kind read, cut anywhere and still the same, bad rows alone."""

import csv
import io
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipelines import sources
from pipelines.records import MAX_RECORD, RowError
from pipelines.sources import Place, Source, SourceError
from tests.pipelines import standin


def rows(path, piece=3, column=None):
    """All rows of a file, read in pieces of a few rows each."""
    [source] = sources.find([str(path)], column)
    return [row for p in sources.cut(source, piece) for row in sources.read(p)]


def values(path, **options):
    return [row for _, row in rows(path, **options)]


def written(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_text_lines_are_prompts_with_their_places(tmp_path):
    path = written(tmp_path / "p.txt", "\ufeffa cat\r\na dog\n\nein Bär, rot")
    assert rows(path) == [
        (Place(str(path), 1), {"prompt": "a cat"}),
        (Place(str(path), 2), {"prompt": "a dog"}),
        (Place(str(path), 3), {"prompt": ""}),
        (Place(str(path), 4), {"prompt": "ein Bär, rot"}),
    ]


def test_csv_tsv_jsonl_and_parquet_give_the_same_rows(tmp_path):
    table = [{"prompt": f'say "{i}",\nthen stop', "seed": str(i), "label": "x\ty"} for i in range(10)]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "seed", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(table)
    written(tmp_path / "a.jsonl", "\n".join(map(json.dumps, table)))
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=4)
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.parquet"):
        assert values(tmp_path / name) == table, name
        assert [place.row for place, _ in rows(tmp_path / name)] == list(range(1, 11))


cell = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


@given(table=st.lists(st.tuples(cell, cell), min_size=1, max_size=30), piece=st.integers(1, 40), dialect=st.booleans())
@settings(max_examples=150, deadline=None)
def test_a_csv_cut_anywhere_reads_as_the_csv_module_reads_it_whole(tmp_path_factory, table, piece, dialect):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n" if dialect else "\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("prompt", "note"), *table])
    path = written(tmp_path_factory.mktemp("csv") / "p.csv", text.getvalue())
    assert [tuple(row.values()) for row in values(path, piece=piece)] == table


@given(
    data=st.lists(st.sampled_from([b"a", b'"', b",", b"\n", b"\xff", b"\r\n", b"\r", b'","']), max_size=40),
    piece=st.integers(1, 9),
)
@settings(max_examples=300, deadline=None)
def test_where_a_csv_is_cut_never_matters_however_broken_it_is(tmp_path_factory, data, piece):
    path = written(tmp_path_factory.mktemp("csv") / "p.csv", b"prompt,b\nfirst,1\n" + b"".join(data))
    assert list(map(str, values(path, piece=piece))) == list(map(str, values(path, piece=10**6)))


def test_bad_rows_of_text_files_are_alone(tmp_path):
    long = b"y" * (MAX_RECORD + 5)
    path = written(
        tmp_path / "p.csv",
        b"prompt,seed\na,1\n\xff\xfe,2\nb,3,surplus\n" + long + b",4\n" + b'"in two\nlines",5\n"open,6\nc,7\nd,8\n',
    )
    expected = ["a", "not valid UTF-8", "3 cells", "more than", "in two\nlines", "never closes", "c", "d"]
    for wanted, row in zip(expected, values(path), strict=True):
        assert wanted in str(row) if isinstance(row, RowError) else row["prompt"] == wanted
    path = written(
        tmp_path / "p.jsonl", b'{"prompt": "a"}\n{"prompt": \n[1]\n\xff\n{"prompt": "b"}\n' + b"[" * 100_000 + b"\n"
    )
    expected = [{"prompt": "a"}, "not JSON", "not a JSON object", "not valid UTF-8", {"prompt": "b"}, "not JSON"]
    for wanted, row in zip(expected, values(path), strict=True):
        assert row == wanted or wanted in str(row)


def test_a_line_may_have_exactly_the_most_bytes_with_its_end(tmp_path):
    longest = "y" * (MAX_RECORD - 1)
    path = written(tmp_path / "p.txt", f"{longest}\n{longest}y\nlast")
    first, error, last = values(path)
    assert (first, last) == ({"prompt": longest}, {"prompt": "last"})
    assert "a line of more than" in str(error)


@example(lines=20_000, length=12)
@example(lines=1, length=200_000)
@given(lines=st.integers(1, 2_000), length=st.integers(0, 500))
@settings(max_examples=20, deadline=None)
def test_a_quoted_cell_of_up_to_a_mebibyte_is_one_cell(tmp_path_factory, lines, length):
    long = "\n".join(["y" * length] * lines)
    path = written(tmp_path_factory.mktemp("csv") / "p.csv", f'prompt,note\na,"{long}"\nb,\n')
    if len(long) < MAX_RECORD - 10:
        assert values(path) == [{"prompt": "a", "note": long}, {"prompt": "b", "note": ""}]


def test_a_record_that_is_no_row_is_one_row_that_is_none(tmp_path):
    path = written(
        tmp_path / "p.csv", b'prompt,note\n"a\nb"\rc,1\n"d\ne",2\n"f\n",' + b"x" * MAX_RECORD + b',"3"\ng,4\n'
    )
    bad, good, never, long, last = values(path)
    assert "not a row" in str(bad)
    assert "never closes" in str(never)
    assert "a line of more than" in str(long)
    assert (good["prompt"], last["prompt"]) == ("d\ne", "g")


def test_invalid_utf8_in_parquet_spoils_its_row_only(tmp_path):
    prompts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffb")]
    )
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "p.parquet")
    a, bad, b = values(tmp_path / "p.parquet")
    assert (a, str(bad), b) == ({"prompt": "a"}, "not valid UTF-8", {"prompt": "b"})


def test_a_parquet_file_that_is_damaged_is_named(tmp_path):
    prompts = [f"prompt number {i}" for i in range(3000)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "p.parquet", compression="zstd", use_dictionary=False)
    data = bytearray((tmp_path / "p.parquet").read_bytes())
    data[100:200] = bytes(100)
    path = written(tmp_path / "p.parquet", bytes(data))
    with pytest.raises(SourceError, match=r"p\.parquet: it is damaged, or cannot be read: ") as error:
        rows(path)
    assert "\n" not in str(error.value)


def test_blank_lines_before_a_header_are_none_and_after_it_are_named(tmp_path):
    path = written(tmp_path / "p.csv", "\ufeff\n , \nprompt,seed\n\na,1\n,\n")
    blank, *others = values(path)
    assert str(blank) == "a blank line"
    assert others == [{"prompt": "a", "seed": "1"}, {"prompt": "", "seed": ""}]
    assert [str(row) for row in values(written(tmp_path / "p.jsonl", '{"prompt": "a"}\n\n'))][1] == "a blank line"


def test_a_first_cell_may_be_quoted_after_a_byte_order_mark(tmp_path):
    path = written(tmp_path / "p.csv", '\ufeff"seed","prompt"\r\n"3","a, b"\r\n')
    assert values(path) == [{"seed": "3", "prompt": "a, b"}]


def test_two_values_under_one_name_are_refused_as_of_two_columns(tmp_path):
    path = written(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "a", "seed": 1, "seed": 2}\n{"prompt": "b"}\n')
    first, second, third = values(path)
    assert (first, third) == ({"prompt": "a"}, {"prompt": "b"})
    assert str(second) == "two keys of an object have the same name"


def test_a_template_without_a_seed_counts_from_the_jobs(tmp_path):
    text = 'images_per_prompt = 2\nprompts = ["a", "b"]\n'
    for named, seeds in (("", [7, 8]), ("[request]\nseed = 3", [3, 4])):
        written(tmp_path / "p.toml", text + named)
        arguments = ("--prompts", tmp_path / "p.toml", "--seed", "7", "--output", tmp_path / "out", "--overwrite")
        assert standin.run(*arguments) == 0
        made = pq.read_table(tmp_path / "out" / "manifest").select(["prompt", "seed"]).to_pylist()
        assert sorted((row["prompt"], row["seed"]) for row in made) == [(p, s) for p in "ab" for s in seeds]


def test_a_template_that_is_changed_is_read_again(tmp_path):
    path = written(tmp_path / "p.toml", '\ufeffprompts = ["old"]')
    assert [row["prompt"] for row in values(path)] == ["old"]
    written(path, 'prompts = ["new", "too"]')
    assert [row["prompt"] for row in values(path)] == ["new", "too"]


def test_short_rows_leave_the_last_columns_open(tmp_path):
    assert values(written(tmp_path / "p.csv", "prompt,seed\na\n")) == [{"prompt": "a"}]


def parquet(names=(), columns=(), **named) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table([*columns, *named.values()], [*names, *named]), buffer)
    return buffer.getvalue().to_pybytes()


def test_a_parquet_file_that_pyarrow_cannot_read_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    path = str(written(tmp_path / "p.parquet", parquet(prompt=["a"])))
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    with pytest.raises(SourceError, match=r"p\.parquet: Integers with more than 64 bits"):
        sources.find([path])
    with pytest.raises(SourceError, match=r"p\.parquet: it is damaged, or cannot be read: Integers with"):
        list(sources.read(sources.Piece(Source(path), 0, 1, 1)))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", "", "holds no prompts"),
        ("p.csv", "", "holds no prompts"),
        ("p.csv", "prompt,seed\n", "holds no prompts"),
        ("p.csv", "\n\n", "holds no prompts"),
        ("p.csv", "caption,seed\na,1\n", "no column 'prompt' among 'caption', 'seed'; --prompt-column"),
        ("p.csv", "prompt,prompt\na,b\n", "two columns have the same name"),
        ("p.csv", "prompt,,\na,,\n", "two columns have no name; commas at the end of a line make such"),
        ("p.csv", "prompt,größe\na,1\n".encode("latin-1"), "its header is not valid UTF-8"),
        ("p.jsonl", '{"text": "a"}\n', "no column 'prompt' among 'text'"),
        ("p.parquet", b"PAR1", "p.parquet: "),
        ("p.parquet", parquet(caption=["a"]), "no column 'prompt' among 'caption'"),
        ("p.parquet", parquet(["prompt", "prompt"], [["a"], ["b"]]), "two columns have the same name"),
        ("p.parquet", parquet(prompt=pa.array([], pa.string())), "holds no prompts"),
        ("p.toml", "prompts = []", "prompts must be a list"),
        ("p.doc", "x", "not a prompt file; allowed are .txt"),
    ],
)
def test_files_that_no_job_can_run_on_are_refused_by_name(tmp_path, name, data, message):
    with pytest.raises(SourceError) as error:
        sources.find([str(written(tmp_path / name, data))])
    assert name in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_globs_without_a_match_are_refused(tmp_path):
    with pytest.raises(SourceError, match=r"a\.txt: no such file"):
        sources.find([str(tmp_path / "a.txt")])
    with pytest.raises(SourceError, match=r"no file matches"):
        sources.find([str(tmp_path / "*.txt")])


@pytest.mark.parametrize("pattern", ["p\udcff.txt", "p*.txt"])
def test_a_file_whose_name_no_manifest_can_hold_is_refused(tmp_path, pattern):
    written(tmp_path / "p\udcff.txt", "a cat\n")
    with pytest.raises(SourceError, match=r"p\\udcff\.txt': its name is not valid UTF-8") as error:
        sources.find([str(tmp_path / pattern)])
    assert str(error.value).isascii()


def test_empty_parts_that_a_glob_matches_are_passed_over(tmp_path):
    for suffix, empty, full in [
        ("csv", "prompt,seed\n", "prompt,seed\na,1\n"),
        ("txt", "", "a"),
        ("parquet", parquet(prompt=pa.array([], pa.string())), parquet(prompt=["a"])),
    ]:
        for part in "01":
            written(tmp_path / f"{part}.{suffix}", empty)
        with pytest.raises(SourceError, match="holds no prompts"):
            sources.find([str(tmp_path / f"*.{suffix}")])
        written(tmp_path / f"2.{suffix}", full)
        assert [s.file for s in sources.find([str(tmp_path / f"*.{suffix}")])] == [str(tmp_path / f"2.{suffix}")]
        with pytest.raises(SourceError, match=f"0.{suffix}: it holds no prompts"):
            sources.find([str(tmp_path / f"*.{suffix}"), str(tmp_path / f"0.{suffix}")])


def test_each_file_is_opened_once_before_the_job_and_several_are_at_once(tmp_path, monkeypatch):
    for i in range(16):
        written(tmp_path / f"{i}.csv", "prompt\na\nb\n")
        written(tmp_path / f"{i}.parquet", parquet(prompt=["a", "b"]))
    opened, together, real = [], threading.Barrier(16, timeout=30), sources._open

    def spy(file):
        opened.append(file)
        together.wait()
        return real(file)

    monkeypatch.setattr(sources, "_open", spy)
    found = sources.find([str(tmp_path / "*")])
    assert sum(map(sources.count, found)) == pytest.approx(64, abs=16)
    assert len(opened) == len(set(opened)) == 32


def test_a_row_group_of_any_size_is_cut_into_pieces(tmp_path):
    path = written(tmp_path / "p.parquet", parquet(prompt=[f"p{i}" for i in range(40_000)]))
    [source] = sources.find([str(path)])
    pieces = list(sources.cut(source))
    assert [(piece.start, piece.stop, piece.first_row) for piece in pieces] == [
        (0, 16_384, 1),
        (16_384, 32_768, 16_385),
        (32_768, 40_000, 32_769),
    ]
    place, row = next(sources.read(pieces[2]))
    assert (place.row, row) == (32_769, {"prompt": "p32768"})


def test_globs_and_urls_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.txt"):
        written(tmp_path / name, name)
    assert [s.file for s in sources.find([str(tmp_path / "*.txt")])] == [str(tmp_path / n) for n in ("a.txt", "b.txt")]
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/prompts/x1.txt", b"one\n")
    fs.pipe_file("/prompts/x2.txt", b"two\n")
    found = sources.find(["memory://prompts/x*.txt"])
    assert [row for s in found for p in sources.cut(s) for _, row in sources.read(p)] == [
        {"prompt": "one"},
        {"prompt": "two"},
    ]


def test_another_prompt_column_is_matched_without_case(tmp_path):
    path = written(tmp_path / "p.csv", "Prompt,Caption\nlong,short\n")
    [row] = values(path, column="CAPTION")
    assert sources.select_prompt(row, "CAPTION") == {"prompt": "short", "Prompt_": "long"}


def test_the_estimate_of_rows_is_near(tmp_path):
    path = written(tmp_path / "p.csv", "prompt\n" + "".join(f"prompt number {i}\n" for i in range(50_000)))
    [source] = sources.find([str(path)])
    assert sources.count(source) == pytest.approx(50_000, rel=0.1)
    pq.write_table(pa.table({"prompt": ["a"] * 123}), tmp_path / "p.parquet")
    assert sources.count(Source(str(tmp_path / "p.parquet"))) == 123


@pytest.mark.parametrize("turn", [list, reversed])
def test_the_estimate_of_rows_is_near_where_a_few_are_far_longer(tmp_path, turn):
    rows = ["x" * 500_000] * 2 + ["a cat"] * 400_000
    [source] = sources.find([str(written(tmp_path / "p.txt", "\n".join(turn(rows))))])
    assert sources.count(source) == pytest.approx(len(rows), rel=0.6)


@pytest.mark.parametrize("lengths", [[100_000] * 50, [70_000] + [20] * 100_000, [900_000] * 4, [5]])
def test_the_estimate_of_long_rows_is_near_too(tmp_path, lengths):
    path = written(tmp_path / "p.txt", "".join("y" * length + "\n" for length in lengths))
    [source] = sources.find([str(path)])
    assert sources.count(source) == pytest.approx(len(lengths), rel=0.6)
