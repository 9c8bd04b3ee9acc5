"""Sizes that datasets have: a million rows planned, ten thousand images on a page."""

import contextlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests

from pipelines import generate_images, sources
from pipelines.options import parse
from pipelines.units import unpack
from tests.pipelines import standin
from tests.pipelines.conftest import free_port

ROOT = Path(__file__).parents[2]


def write_parquet(path: Path, rows: int) -> None:
    with pq.ParquetWriter(path, pa.schema({"prompt": pa.string(), "seed": pa.int64(), "label": pa.string()})) as writer:
        for start in range(0, rows, 100_000):
            seeds = range(start, min(rows, start + 100_000))
            prompts = [f"a photo of object number {i} in a field of flowers at dusk" for i in seeds]
            labels = [f"class {i % 1000}" for i in seeds]
            writer.write_table(pa.table({"prompt": prompts, "seed": list(seeds), "label": labels}))


def write_template(path: Path, rows: int) -> None:
    a, b = [json.dumps([f"{kind} {i}" for i in range(n)]) for kind, n in (("thing", rows // 1000), ("place", 100))]
    path.write_text(f'images_per_prompt = 10\nprompts = ["a {{a}} near {{b}}"]\n[lists]\na = {a}\nb = {b}')


def plan(prompts: str, output: str) -> None:
    """Plan a job and print its images, seconds and peak memory in MB: what a process of its own is started for."""
    started = time.monotonic()
    job = parse(["--prompts", prompts, "--output", output])
    with beam.Pipeline(options=job.beam) as pipeline:
        units, _ = generate_images.plan(pipeline, job, sources.find(job.prompts), standin.Spec())
        images = units | beam.Map(lambda unit: len(unpack(unit).rows)) | beam.CombineGlobally(sum)
        _ = images | beam.io.WriteToText(f"{output}/images", num_shards=1, shard_name_template="")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([int(Path(output, "images").read_text()), time.monotonic() - started, peak]))


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "write"), [(".parquet", write_parquet), (".toml", write_template)])
def test_a_million_rows_are_planned_in_minutes_and_little_memory(tmp_path, suffix, write):
    measured = {}
    for rows in (10_000, 100_000, 1_000_000):
        path = tmp_path / f"{rows}{suffix}"
        write(path, rows)
        call = f"from tests.pipelines.test_scale import plan; plan({str(path)!r}, {str(tmp_path / str(rows))!r})"
        told = subprocess.run([sys.executable, "-c", call], cwd=ROOT, capture_output=True, check=True).stdout
        images, seconds, peak = json.loads(told.splitlines()[-1])
        print(f"{suffix}: {rows:,} rows in {seconds:.1f} s, peak {peak:.0f} MB")
        assert images == rows
        measured[rows] = seconds, peak
    assert measured[1_000_000][0] < 300
    assert measured[1_000_000][1] - measured[10_000][1] < 500


@pytest.fixture(scope="module")
def sheet(tmp_path_factory) -> Path:
    """A page of ten thousand images."""
    folder = tmp_path_factory.mktemp("sheet")
    (folder / "p.txt").write_text("".join(f"prompt {i} of the sheet\n" for i in range(10_000)))
    arguments = ("--prompts", folder / "p.txt", "--output", folder / "out", "--contact-sheet", 10_000)
    assert standin.run(*arguments) == 0
    return folder / "out" / "index.html"


CHROMIUM = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")


@pytest.mark.slow
@needs_chromium
def test_a_browser_shows_and_searches_ten_thousand_images(sheet):
    def browse(fragment: str) -> str:
        command = [*CHROMIUM, "--virtual-time-budget=3000", "--dump-dom", f"file://{sheet}{fragment}"]
        return subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.decode()

    whole = browse("")
    assert ">10,000 images<" in whole
    assert 100 <= whole.count("<figure") < 1000  # the rest is drawn as it is scrolled to
    found = browse("#prompt 7777 SHEET")
    assert ">1 found<" in found
    assert found.count("<figure") == 1
    assert ">prompt 7777 of the sheet</figcaption>" in found
    assert ">0 found<" in browse("#100%")


@pytest.mark.slow
@needs_chromium
def test_a_browser_goes_on_drawing_while_the_end_is_near_its_window(sheet, tmp_path):
    """In a window so wide that a hundred images are three rows; after a search too, when the end has not moved away."""
    probe = """<script>
        const say = () => document.title = document.querySelectorAll("figure").length + " of " + shown.length;
        const enter = text => { search.value = text; search.dispatchEvent(new Event("input")); };
        setTimeout(() => { enter("7777"); setTimeout(() => { enter(""); setInterval(say, 100); }, 500); }, 500);
    </script>"""
    page, port = tmp_path / "page.html", free_port()
    page.write_text(sheet.read_text(encoding="utf-8") + probe, encoding="utf-8")
    options = [f"--remote-debugging-port={port}", f"--user-data-dir={tmp_path}/profile", "--window-size=7680,2160"]
    browser = subprocess.Popen([*CHROMIUM, *options, f"file://{page}"], stderr=subprocess.DEVNULL)
    drawn, deadline = 0, time.monotonic() + 60
    try:
        while drawn < 400 and time.monotonic() < deadline:
            time.sleep(0.5)
            with contextlib.suppress(requests.ConnectionError):
                tabs = requests.get(f"http://127.0.0.1:{port}/json", timeout=10).json()
                drawn = max([int(tab["title"].split()[0]) for tab in tabs if tab["title"].endswith(" of 10000")] or [0])
    finally:
        browser.terminate()
        browser.wait()
    assert 400 <= drawn < 2000
