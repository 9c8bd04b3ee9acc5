"""What people see: the account that adds up, the progress line, the contact sheet."""

import base64
import io
import json
import re
import shutil
import threading
import time
from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import contact_sheet, latents, progress, report
from pipelines.layout import manifest_name
from pipelines.progress import Heartbeat, ProgressLine, totals
from pipelines.report import AccountError, Job, add_up, summarize
from pipelines.sinks import MANIFEST
from pipelines.storage import Store
from tests.pipelines import standin

JOB = Job(started=1000.0, model="m", fingerprint="f", options={}, price_per_hour=2.0, contact_sheet=10)


def test_shares_add_up_in_any_order():
    shares = [
        {"rows": 5, "rejected": 1, "seconds": {"read": 1.0}},
        {"duplicates": 1, "already_done": 1},
        {"images": 1, "first": 7.0, "last": 9.0, "seconds": {"write": 0.5}},
        {"images": 1, "first": 5.0, "last": 8.0, "seconds": {"write": 0.25}},
    ]
    expected = {"rows": 5, "rejected": 1, "duplicates": 1, "already_done": 1, "images": 2}
    expected |= {"first": 5.0, "last": 9.0, "seconds": {"read": 1.0, "write": 0.75}}
    for order in (shares, shares[::-1]):
        assert add_up(order) == add_up([add_up(order[:1]), add_up([]), add_up(order[1:])]) == expected
    told = summarize(JOB, expected, now=1360.0)
    assert told["images_per_second"] == 0.5
    assert told["cost_per_1000_images"] == 2.0 * 0.1 / 2 * 1000
    assert told["seconds"] == {"wall": 360.0, "read": 1.0, "write": 0.75}
    assert report.text(told).endswith("; the reasons are in rejected/")
    assert report.text(told).startswith("5 rows = 2 images + 1 rejected + 1 duplicates + 1 already done; 0.50 images/s")


def test_a_row_that_is_lost_fails_the_job():
    with pytest.raises(AccountError, match="5 rows are not 3 images"):
        summarize(JOB, {"rows": 5, "images": 3, "rejected": 1}, now=2000.0)


def test_an_empty_account_is_a_summary_too():
    told = summarize(JOB, {"rows": 2, "already_done": 2}, now=1001.0)
    assert (told["images_per_second"], told["cost_per_1000_images"], told["padding"]) == (None, None, 0.0)
    assert report.text(told).endswith("nothing to make")


def test_the_progress_line_follows_all_processes(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    a, b = Heartbeat(store), Heartbeat(store)
    a.add(rows=10, rejected=1)
    b.add(rows=5)
    for heartbeat in (a, b):
        heartbeat.flush()
    assert totals(store) == Counter(rows=15, rejected=1)
    line = ProgressLine(store, io.StringIO())
    assert line.line(totals(store), now=0.0) == "15 rows read, 1 rejected"
    counts = Counter(rows=1000, rejected=1, planned=999, images=100)
    assert line.line(counts, now=10.0) == "100 of 999 images, 1 rejected"
    counts["images"] = 150
    assert line.line(counts, now=20.0) == "150 of 999 images, 5.00 images/s, 0:02:50 left, 1 rejected"
    b.add(rows=1)
    b.flush()
    (tmp_path / progress.FOLDER / "half.json").write_text('{"rows": ')
    assert totals(store)["rows"] == 16


def test_the_counts_of_processes_are_read_together(tmp_path, monkeypatch):
    """A bucket answers in tens of milliseconds, and a job may have a thousand processes."""
    store, read, together = Store(str(tmp_path)), Store.read, threading.Barrier(3)
    for i in range(3):
        store.write_json(f".progress/host-{i}-{'0' * 8}.json", {"rows": 5})

    def wait_for_the_others(self, name, *part):
        together.wait(60)
        return read(self, name, *part)

    monkeypatch.setattr(Store, "read", wait_for_the_others)
    assert totals(store) == Counter(rows=15)


def test_the_line_is_drawn_while_a_job_runs_and_gone_after(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setitem(progress._EVERY, True, 0.01)
    store, terminal = Store(str(tmp_path)), Terminal()
    Heartbeat(store).add(rows=3)
    with ProgressLine(store, terminal) as line:
        while "3 rows read" not in terminal.getvalue():
            line._ended.wait(0.01)
    assert terminal.getvalue().endswith("\r\x1b[K")


def test_a_heartbeat_never_fails_a_job(monkeypatch):
    heartbeat = Heartbeat(Store("memory://heartbeat"))
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "pipe_file", None)
    heartbeat.add(rows=1)
    heartbeat.flush()


def test_who_counts_waits_for_no_bucket_and_the_last_counts_are_written(monkeypatch):
    store = Store("memory://slow")
    write, silent, written = store.fs.pipe_file, threading.Event(), []

    def pipe_file(path, value, **options):
        silent.wait(60)
        written.append(value)
        write(path, value, **options)

    monkeypatch.setattr(store.fs, "pipe_file", pipe_file)
    heartbeat = Heartbeat(store)
    for _ in range(200):
        heartbeat.add(rows=1)
    silent.set()
    heartbeat.flush()
    heartbeat.flush()
    assert totals(store) == Counter(rows=200)
    assert len(written) <= 2


def test_a_heartbeat_writes_what_it_heard_last_unless_the_job_has_ended(tmp_path, monkeypatch):
    monkeypatch.setitem(progress._EVERY, True, 0.05)
    store = Store(str(tmp_path))
    heartbeat = Heartbeat(store)
    heartbeat.add(rows=1)
    while totals(store) != Counter(rows=1):
        time.sleep(0.01)
    heartbeat.add(rows=1)
    while totals(store) != Counter(rows=2):
        time.sleep(0.01)
    progress.clear(store)
    heartbeat.add(rows=1)
    while heartbeat._follows:
        time.sleep(0.01)
    assert store.find(progress.FOLDER) == []


def test_the_progress_line_begins_anew_with_the_counts(tmp_path):
    line = ProgressLine(Store(str(tmp_path)), io.StringIO())
    assert line.line(Counter(), now=0.0) == "0 rows read, 0 rejected"
    assert "600 of 999" in line.line(Counter(rows=999, planned=999, images=600), now=1.0)
    assert line.line(Counter(), now=2.0) == ""  # a launcher has swept what an earlier run left
    assert "images to make" in line.line(Counter(rows=999, planned=399), now=3.0)
    assert line.line(Counter(rows=999, planned=399, images=100), now=10.0) == "100 of 399 images, 0 rejected"
    assert "10.00 images/s" in line.line(Counter(rows=999, planned=399, images=200), now=20.0)


def cards(page: str) -> list[dict]:
    return json.loads(re.search(r'id="cards">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    prompts = [
        "</script><script>alert(1)</script>",
        "<!-- <script> &lt;",
        "<b>bold</b> & 'quoted'",
        "a Bär 🐻",
        *map(str, range(8)),
    ]
    (folder / "p.txt").write_text("\n".join(prompts))
    assert standin.run("--prompts", folder / "p.txt", "--output", folder / "out", "--unit-size", 5) == 0
    return folder / "out", prompts


def test_the_contact_sheet_shows_every_image_and_needs_nothing_else(made):
    output, prompts = made
    page = (output / "index.html").read_text(encoding="utf-8")
    assert sorted(card["prompt"] for card in cards(page)) == sorted(prompts)
    assert page.count("</script>") == page.count("<script") == 2
    assert "<!--" not in page
    assert not re.search(r'(src|href)="|url\(|https?:', page)
    assert f"{len(prompts)} images" in page
    for card in cards(page):
        with Image.open(io.BytesIO(base64.b64decode(card["thumb"]))) as image:
            assert image.size == (standin.SIDE, standin.SIDE)


def test_a_longer_output_is_shown_in_part_and_thumbnails_are_kept(made, monkeypatch):
    output, prompts = made
    store = Store(str(output))
    monkeypatch.setattr(contact_sheet, "thumbnail", None)  # every one of them is in the page already
    contact_sheet.write(store, 7)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert len(cards(page)) == 7
    assert f"7 of {len(prompts)} images" in page


def test_an_image_that_was_made_again_elsewhere_is_named_where_it_lies(made, tmp_path):
    output = shutil.copytree(made[0], tmp_path / "out")
    contact_sheet.write(Store(str(output)), 100)
    shutil.rmtree(output / "manifest")
    shutil.rmtree(output / "shards")
    (output.parent / "p.txt").write_text("\n".join(made[1]))
    assert standin.run("--prompts", output.parent / "p.txt", "--output", output, "--format", "files") == 0
    files = [card["file"] for card in cards((output / "index.html").read_text(encoding="utf-8"))]
    assert [file for file in files if not (output / file).exists()] == []


def test_a_page_that_a_killed_job_did_not_come_to_is_made_by_the_next(made, tmp_path):
    output = shutil.copytree(made[0], tmp_path / "out")
    page = (output / "index.html").read_bytes()
    (tmp_path / "p.txt").write_text("one more\n")
    assert standin.run("--prompts", tmp_path / "p.txt", "--output", output) == 0
    (output / "index.html").write_bytes(page)
    (output / "summary.json").write_text('{"finished": false}')
    assert standin.run("--prompts", tmp_path / "p.txt", "--output", output) == 0
    assert "one more" in [card["prompt"] for card in cards((output / "index.html").read_text(encoding="utf-8"))]


def test_a_page_of_another_number_is_made_where_nothing_else_is(made, tmp_path):
    output = shutil.copytree(made[0], tmp_path / "out")
    (tmp_path / "p.txt").write_text("\n".join(made[1]))
    shown = []
    for options in (["--contact-sheet", 3], ["--contact-sheet", 7], ["--contact-sheet", 0], []):
        assert standin.run("--prompts", tmp_path / "p.txt", "--output", output, *options) == 0
        shown.append(len(cards((output / "index.html").read_text(encoding="utf-8"))))
    assert shown == [3, 7, 7, len(made[1])]


CARD = {"id": "x", "prompt": "", "facts": "", "file": "", "thumb": ""}
NO_CARDS = ["{", "null", "2", '{"id": "x"}', "[" * 100_000]
NO_CARDS += [json.dumps([card]) for card in ("x", [], None, {**CARD, "id": 2}, {**CARD, "id": []}, {"id": "x"})]


@pytest.mark.parametrize("page", ["latin-1", "no script", *NO_CARDS], ids=range(2 + len(NO_CARDS)))
def test_a_page_without_cards_of_its_own_is_made_anew(made, tmp_path, page):
    output = shutil.copytree(made[0], tmp_path / "out")
    script = f'<script type="application/json" id="cards">{page}</script>'
    text = {"latin-1": "Bär".encode("latin-1"), "no script": b"mine"}.get(page, script.encode())
    (output / "index.html").write_bytes(text)
    contact_sheet.write(Store(str(output)), 100)
    assert len(cards((output / "index.html").read_text(encoding="utf-8"))) == len(made[1])


def test_cards_that_are_broken_are_made_anew(made, tmp_path):
    output = shutil.copytree(made[0], tmp_path / "out")
    contact_sheet.write(Store(str(output)), 100)
    page = (output / "index.html").read_text(encoding="utf-8")
    whole = cards(page)
    (output / "index.html").write_text(page.replace('"thumb":', '"other":'), encoding="utf-8")
    contact_sheet.write(Store(str(output)), 100)
    assert cards((output / "index.html").read_text(encoding="utf-8")) == whole


DAMAGES = ["no shard", "no image", "no prompts", "null", "shards/../../beside.png", "../beside.png"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_image_that_cannot_be_shown_costs_its_own_card(made, tmp_path, damage):
    output = shutil.copytree(made[0], tmp_path / "out")
    (output / "index.html").unlink()
    manifest = min((output / "manifest").iterdir())
    rows = pq.read_table(manifest).to_pylist()
    lost = 1
    if damage == "no shard":
        (output / rows[0]["shard"]).unlink()
        lost = len(rows)
    elif damage == "no image":
        data = bytearray((output / rows[0]["shard"]).read_bytes())
        data[rows[0]["offset"] : rows[0]["offset"] + rows[0]["bytes"]] = bytes(rows[0]["bytes"])
        (output / rows[0]["shard"]).write_bytes(data)
    elif damage == "no prompts":
        column = MANIFEST.get_field_index("prompt")
        start = pq.read_metadata(manifest).row_group(0).column(column).dictionary_page_offset
        data = bytearray(manifest.read_bytes())
        data[start : start + 16] = bytes(16)
        manifest.write_bytes(data)
        lost = len(rows)
    elif damage == "null":
        rows[0] |= dict.fromkeys(("shard", "file", "guidance_scale"))
        pq.write_table(pa.Table.from_pylist(rows, MANIFEST), manifest)
    else:
        shutil.copy(output / rows[0]["shard"], tmp_path / "beside.png")
        rows[0]["shard"] = damage
        pq.write_table(pa.Table.from_pylist(rows, MANIFEST), manifest)
    contact_sheet.write(Store(str(output)), 100)
    page = (output / "index.html").read_text(encoding="utf-8")
    assert len(cards(page)) == len(made[1]) - lost
    assert f"{len(cards(page))} of {len(made[1])} images" in page


def test_a_manifest_of_latents_has_no_cards(made, tmp_path):
    output = shutil.copytree(made[0], tmp_path / "out")
    pq.write_table(latents.MANIFEST.empty_table(), output / manifest_name("a" * 32))
    contact_sheet.write(Store(str(output)), 100)
    assert f"{len(made[1])} images" in (output / "index.html").read_text(encoding="utf-8")


def test_manifests_are_read_together(made, monkeypatch):
    output, prompts = made
    read, together = Store.read, threading.Barrier(3)  # as many as there are units

    def wait_for_the_others(self, name, *range):
        if name.startswith("manifest/"):
            together.wait(60)
        return read(self, name, *range)

    monkeypatch.setattr(Store, "read", wait_for_the_others)
    contact_sheet.write(Store(str(output)), 2)
    assert f"2 of {len(prompts)} images" in (output / "index.html").read_text(encoding="utf-8")


def test_no_page_reads_nothing(made, tmp_path, monkeypatch):
    shutil.copytree(made[0] / "manifest", tmp_path / "manifest")
    monkeypatch.setattr(Store, "read", None)
    told = report.write({"rows": 1, "images": 1}, JOB._replace(contact_sheet=0), str(tmp_path))
    assert told["images"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest", "summary.json"]
