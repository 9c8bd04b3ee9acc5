"""The job from prompt files to a dataset, with a stand-in for the model, against the same pictures made directly."""

import errno
import functools
import glob
import json
import os
import random
import shutil
import threading
from collections import Counter

import apache_beam as beam
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.metrics.metric import MetricsFilter

from pipelines import generate_images, sources, verify
from pipelines.options import parse
from pipelines.sinks import Images
from pipelines.storage import Store
from sdjax.request import Request
from sdjax.spec import Spec
from sdjax.values import RequestError
from tests.pipelines import standin
from tests.pipelines.faulty import HttpError
from tests.pipelines.outputs import (
    ROWS,
    SPEC,
    account,
    assert_same,
    direct,
    files,
    images,
    no_load,
    summary,
    table,
    write_csv,
)


def test_the_images_are_those_that_the_rows_ask_for(made):
    expected = direct(table())
    assert_same(images(made), expected)
    assert account(made) == (ROWS, len(expected), 0, ROWS - len(expected), 0)
    assert len(expected) < ROWS
    assert verify.main([str(made)]) == 0


def test_the_summary_tells_the_job(made):
    told = summary(made)
    assert told["finished"]
    assert {"wall", "read", "plan", "load", "generate", "encode", "write"} <= set(told["seconds"])
    assert told["images_per_second"] > 0
    assert 0 <= told["padding"] < 1
    assert told["cost_per_1000_images"] > 0
    assert told["model_fingerprint"] == SPEC.fingerprint
    assert told["bytes"] == sum(pq.read_table(made / "manifest")["bytes"].to_pylist())
    assert sorted(p.name for p in made.iterdir()) == ["index.html", "manifest", "shards", "summary.json"]


def test_other_columns_travel_into_the_manifest(made):
    rows = pq.read_table(made / "manifest").to_pylist()
    for row in rows:
        place = table()[row["input_row"] - 1]
        assert json.loads(row["extras"]) == {"Label": place["Label"]}
        assert row["prompt"] == place["Prompt"]
        assert row["input_file"].endswith("p.csv")


def test_a_finished_job_does_nothing_again(made, prompts, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(made, output)
    before = files(output)
    assert standin.run("--prompts", prompts, "--output", output, "--unit-size", 32, load=no_load) == 0
    assert "nothing to make" in capsys.readouterr().out
    assert files(output) == before
    rows, images, rejected, duplicates, done = account(output)
    assert (rows, images, rejected, duplicates + done) == (ROWS, 0, 0, ROWS)


def test_another_form_is_for_what_is_yet_to_be_made(made, prompts, tmp_path, capsys):
    output = shutil.copytree(made, tmp_path / "out")
    again = ("--prompts", prompts, "--output", output, "--unit-size", 32)
    assert standin.run(*again, "--image-format", "webp", "--format", "files", load=no_load) == 0
    said = "what is there stays as it is, --format tar --image-format png; --overwrite makes it anew"
    assert said in capsys.readouterr().err
    assert standin.run(*again, load=no_load) == 0
    assert "what is there stays" not in capsys.readouterr().err  # the run before made nothing in its form


def test_only_new_prompts_are_made_and_what_a_killed_run_left_goes(made, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(made, output)
    lost = sorted((output / "manifest").iterdir())[0]
    lost.unlink()  # its shard was written, and then the run was killed
    (output / "summary.json").write_text('{"finished": false}')
    for name in (f"shards/.{'1' * 32}.tar.123", ".summary.json.123", ".index.html.123"):
        (output / name).write_bytes(b"half a file")
    (output / ".notes").write_text("mine")
    prompts = write_csv(tmp_path / "more.csv", table(ROWS + 20))
    assert standin.run("--prompts", prompts, "--output", output, "--unit-size", 32) == 0
    assert "deleted 4 files that no manifest commits" in capsys.readouterr().err
    assert (output / ".notes").read_text() == "mine"
    assert_same(images(output), direct(table(ROWS + 20)))
    assert account(output)[1] < 60
    assert verify.verify(str(output)).orphans == []


def test_overwrite_starts_anew_and_touches_only_what_jobs_write(made, prompts, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(made, output)
    (output / "notes.md").write_text("mine")
    before = files(output)
    arguments = ("--prompts", prompts, "--output", output, "--unit-size", 64, "--overwrite")
    assert standin.run(*arguments) == 0
    assert account(output)[4] == 0
    assert (output / "notes.md").read_text() == "mine"
    assert files(output).keys() != before.keys()
    assert_same(images(output), direct(table()))


@pytest.mark.parametrize(
    "mode",
    [
        ("--direct_num_workers=2", "--direct_running_mode=multi_threading"),
        pytest.param(("--direct_num_workers=2", "--direct_running_mode=multi_processing"), marks=pytest.mark.slow),
    ],
)
def test_a_dataset_is_the_same_bytes_however_many_workers_make_it(made, prompts, tmp_path, mode):
    output = tmp_path / "out"
    assert standin.run("--prompts", prompts, "--output", output, "--unit-size", 32, *mode) == 0
    assert files(output) == files(made)


def test_files_in_a_bucket_in_another_format(prompts):
    fsspec.filesystem("memory").store.clear()
    output = "memory://bucket/out"
    assert standin.run("--prompts", prompts, "--output", output, "--format", "files", "--image-format", "webp") == 0
    expected = direct(table())
    assert {name.rsplit("/", 1)[1] for name in files(output)} == {f"{id}.webp" for id in expected}
    assert all(name.startswith(f"images/{name.rsplit('/', 1)[1][:2]}/") for name in files(output))
    assert images(output).keys() == expected.keys()
    assert verify.main([output]) == 0


BAD = {
    "seed": ["-1", "4294967296", "1.5", "many"],
    "num_inference_steps": ["0", "10000", "ten"],
    "guidance_scale": ["nan", "-1", "inf"],
    "width": ["100", "0", "100000"],
    "sampler": ["none"],
    "Prompt": ["", "  ", "x" * 1_000_000],
}


def test_bad_rows_are_rejected_alone_and_a_nan_image_is_flagged(tmp_path):
    good = [{"Prompt": f"good {i}"} for i in range(40)] + [{"Prompt": standin.NAN_PROMPT}]
    bad = [{"Prompt": "bad", name: value} for name, values in BAD.items() for value in values]
    columns = ["Prompt", *[name for name in BAD if name != "Prompt"]]
    rows = [{name: row.get(name, "") for name in columns} for pair in zip(good, bad, strict=False) for row in pair]
    rows += [{name: row.get(name, "") for name in columns} for row in good[len(bad) :]]
    prompts = write_csv(tmp_path / "p.csv", rows)
    with prompts.open("ab") as file:
        file.write(b"\xff\xfe bad,,,,,\ngood 0,1,2,3,16,ddim,surplus\n")
    assert standin.run("--prompts", prompts, "--output", tmp_path / "out") == 0
    assert_same(images(tmp_path / "out"), direct(good))
    assert account(tmp_path / "out") == (len(good) + len(bad) + 2, len(good), len(bad) + 2, 0, 0)
    assert summary(tmp_path / "out")["flagged"] == 1
    lines = [json.loads(x) for f in (tmp_path / "out" / "rejected").iterdir() for x in f.read_text().splitlines()]
    assert {line["file"] for line in lines} == {str(prompts)}
    assert sorted(line["row"] for line in lines) == [
        *range(2, 2 * len(bad) + 1, 2),
        len(rows) + 1,
        len(rows) + 2,
    ]
    for line in lines:
        named = [name for name, values in BAD.items() if line["values"] and line["values"].get(name) in values]
        assert not named or any(name.lower() in line["reason"] for name in named)
        assert "\n" not in line["reason"]
    assert verify.main([str(tmp_path / "out")]) == 0


def test_job_wide_values_fill_what_rows_leave_open(tmp_path):
    prompts = tmp_path / "p.jsonl"
    rows = [{"caption": "a", "seed": 5}, {"caption": "b"}, {"caption": "b"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--prompt-column", "Caption")
    assert standin.run(*arguments, "--seed", 9, "--num-inference-steps", 3, "--negative-prompt", "blur") == 0
    expected = [{"prompt": "a", "seed": 5}, {"prompt": "b"}]
    assert_same(images(tmp_path / "out"), direct(expected, seed=9, num_inference_steps=3, negative_prompt="blur"))
    assert account(tmp_path / "out") == (3, 2, 0, 1, 0)


CHANNELS = {"text": 4, "inside masks": 9, "edits": 8}


@pytest.mark.parametrize("paints", CHANNELS)
def test_rows_may_bring_what_the_checkpoint_and_the_job_wide_values_need(tiny, tmp_path, paints):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": CHANNELS[paints]}))
    spec, fits = Spec(folder), {"strength": "0.5"} if paints == "edits" else {"outpaint": "right=32"}
    for defaults in ({}, {"seed": "5"}, fits):
        generate_images._check_defaults(spec, defaults)
    for wrong in ({"seed": "-1"}, {"outpaint": "sideways"}, {"sampler": "magic"}):
        with pytest.raises(RequestError):
            generate_images._check_defaults(spec, wrong)


def test_a_model_whose_tokenizer_cannot_be_read_is_refused_before_any_row(tiny, tmp_path, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    for file in (model / "tokenizer").glob("*.json"):
        file.write_text("[]")
    (tmp_path / "p.txt").write_text("a\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out"), "--model", str(model)]
    assert generate_images.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "the tokenizer cannot be read" in line


@pytest.mark.parametrize("where", ["find", "count"])  # before the options are accepted, and as stages are added
def test_an_interrupt_before_the_first_row_is_one_line(tmp_path, capsys, monkeypatch, where):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_images.sources, where, interrupted)
    (tmp_path / "p.txt").write_text("a\n")
    assert standin.run("--prompts", tmp_path / "p.txt", "--output", tmp_path / "out") == 130
    [line] = capsys.readouterr().err.splitlines()
    assert "interrupted" in line


def test_many_files_and_templates_in_one_job(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.toml").write_text('images_per_prompt = 3\nprompts = ["{x}"]\n[lists]\nx = ["two", "three"]')
    (tmp_path / "c").mkdir()
    pq.write_table(pa.table({"PROMPT": ["four"], "seed": pa.array([4.0])}), tmp_path / "c" / "c.parquet")
    sources = (tmp_path / "*.t*", tmp_path / "c" / "c.parquet")
    assert standin.run("--prompts", *sources, "--output", tmp_path / "out") == 0
    rows = [{"prompt": p, "seed": s} for p in ("two", "three") for s in range(3)]
    rows += [{"prompt": "one"}, {"prompt": "four", "seed": 4}]
    assert_same(images(tmp_path / "out"), direct(rows))
    assert account(tmp_path / "out") == (9, 8, 0, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--output is missing"),
        (("--output", "https://host/out"), "--output=https://host/out is on a web server; give a folder or a bucket"),
        (("--output", ""), "--output is empty; give it a value, or leave it out"),
        (("--output", "o", "--model", ""), "--model is empty"),
        (("--output", "o", "--lora", "", "--lora", "x"), "--lora is empty"),
        (("--output", "o", "--prompts", ""), "--prompts is empty"),
        (("--output", "o", "--prompt-column", " "), "--prompt-column is empty"),
        (("--output", "o", "--format", "zip"), "--format='zip' is unknown; allowed are tar, files"),
        (("--output", "o", "--image-format", "gif"), "--image-format='gif' is unknown; allowed are"),
        (("--output", "o", "--dtype", "int8"), "--dtype='int8' is unknown"),
        (("--output", "o", "--unit-size", "0"), "--unit-size=0 is out of range"),
        (("--output", "o", "--price-per-hour", "nan"), "--price-per-hour=nan is out of range"),
        (("--output", "o", "--batch-size", "many"), "--batch-size: invalid int value: 'many'"),
        (("--output", "o", "--promt", "x"), "--promt is no option"),
        (("--output", "o", "--seed", "-1"), "seed=-1 is out of range"),
        (("--output", "o", "--sampler", "none"), "sampler='none' is unknown"),
        (("--output", "o", "--prompts", "absent.txt"), "absent.txt: no such file"),
        (("--output", "o", "--prompts", "oci://bucket/p.txt"), "Install ocifs"),
        (("--output", "oci://bucket/o"), "Install ocifs"),
        (("--output", "o", "--runner", "Fast"), "Unexpected pipeline runner: Fast"),
    ],
)
def test_what_no_job_can_run_on_is_refused_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    assert standin.run("--prompts", "p.txt", *arguments, load=no_load) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "o").exists()


def test_a_second_job_on_a_disks_output_is_refused_while_the_first_runs(made, prompts, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(made, output)
    (output / "shards" / "begun.tar").write_bytes(b"the first job's")
    (output / "summary.json").write_text('{"finished": false}')
    before = files(output)
    with Store(str(output)).held():
        assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 2
    assert f"another job is writing to {output}; wait until it has ended" in capsys.readouterr().err
    assert files(output) == before
    assert standin.run("--prompts", prompts, "--output", output, load=no_load) == 0


def test_storage_faults_lose_nothing(prompts, faulty):
    draw = random.Random(3)
    kinds = [HttpError(503), HttpError(429), TimeoutError(), OSError(errno.ENOSPC, "full"), "answer lost"]
    faulty.faults = [draw.choice([*kinds, None]) for _ in range(40)]
    assert standin.run("--prompts", prompts, "--output", "faulty://out", "--unit-size", 16) == 0
    assert faulty.faults == []
    assert_same(images("faulty://out"), direct(table()))
    store = Store("faulty://out")
    tables = [pq.read_table(pa.BufferReader(store.read(name))) for name in store.find("manifest")]
    assert summary("faulty://out")["bytes"] == sum(pa.concat_tables(tables)["bytes"].to_pylist())
    assert verify.main(["faulty://out"]) == 0


WRITING, MAKING = threading.Event(), threading.Event()


class TellingPipe(standin.Pipe):
    """Says when it makes the second unit, and waits until the first is being written."""

    def stream(self, requests):
        for i, result in enumerate(super().stream(requests)):
            if i == 8 + 2:
                MAKING.set()
                assert WRITING.wait(30), "the first unit is not written while the second is made"
            yield result


def load_telling(model, **options):
    return TellingPipe(model)


def test_a_unit_is_written_while_the_next_is_made(tmp_path, monkeypatch):
    write = Images.write

    def write_while_making(*arguments):
        WRITING.set()
        assert MAKING.wait(30), "the second unit is not made while the first is written"
        return write(*arguments)

    monkeypatch.setattr(Images, "write", write_while_making)
    (tmp_path / "p.txt").write_text("".join(f"{i}\n" for i in range(16)))
    arguments = ("--prompts", tmp_path / "p.txt", "--output", tmp_path / "out", "--unit-size", 8)
    assert standin.run(*arguments, load=load_telling) == 0
    assert account(tmp_path / "out") == (16, 16, 0, 0, 0)


def load_after_loss(model, model_folder, first=None, **options):
    """The images to start from that are called gone-* vanish between planning and making."""
    for path in glob.glob(str(model_folder / "gone-*")):
        os.unlink(path)
    if first is not None:
        model.resolve(first)  # as from_pretrained does
    return standin.load(model)


@pytest.mark.parametrize("gone", [[13, 14], [1, 2]])  # if the first, the model is loaded for one
def test_an_image_that_vanishes_after_planning_costs_its_own_row_only(tmp_path, gone):
    for name in ("kept.png", "gone-1.png", "gone-2.png"):
        (tmp_path / name).write_bytes(b"")
    kept = [{"prompt": f"{i}", "image": str(tmp_path / "kept.png")} for i in range(12)]
    rows = kept.copy()
    for row, name in zip(gone, ("gone-1.png", "gone-2.png"), strict=True):
        rows.insert(row - 1, {"prompt": "x", "image": str(tmp_path / name)})
    prompts = write_csv(tmp_path / "p.csv", rows)
    load = functools.partial(load_after_loss, model_folder=tmp_path)
    assert standin.run("--prompts", prompts, "--output", tmp_path / "out", "--unit-size", 5, load=load) == 0
    assert_same(images(tmp_path / "out"), direct(kept))
    assert account(tmp_path / "out") == (14, 12, 2, 0, 0)
    lines = [json.loads(x) for f in (tmp_path / "out" / "rejected").iterdir() for x in f.read_text().splitlines()]
    assert sorted((line["row"], "gone-" in line["reason"]) for line in lines) == [(row, True) for row in gone]
    assert verify.main([str(tmp_path / "out")]) == 0


LOADED = []


def load_counting(model, first, **options):
    LOADED.append(first)
    return standin.load(model, delay=0.002)


def test_threads_share_one_model_that_is_told_what_comes_first(prompts, tmp_path):
    LOADED.clear()
    threads = ("--direct_num_workers=4", "--direct_running_mode=multi_threading")
    arguments = ("--prompts", prompts, "--output", tmp_path / "out", "--unit-size", 4)
    assert standin.run(*arguments, *threads, load=load_counting) == 0
    assert [type(first) for first in LOADED] == [Request]


def test_beam_counts_the_same_in_one_namespace(prompts, tmp_path):
    job = parse(["--prompts", str(prompts), "--output", str(tmp_path / "out")])
    pipeline = beam.Pipeline(options=job.beam)
    generate_images.build(pipeline, job, sources.find(job.prompts), SPEC, standin.load)
    query = pipeline.run().metrics().query(MetricsFilter().with_namespace("sdjax"))
    counted: Counter[str] = Counter()
    for counter in query["counters"]:  # one for each stage that counts
        counted[counter.key.metric.name] += counter.committed
    told = summary(tmp_path / "out")
    for name in ("rows", "images", "rejected", "duplicates", "already_done", "flagged", "units"):
        assert counted[name] == told[name], name
    assert counted["planned"] == told["images"]
