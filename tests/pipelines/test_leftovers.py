"""A job deletes what jobs wrote, and nothing else."""

import json
import shutil
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import encode_latents, image_sets, layout, leftovers, verify
from pipelines.layout import image_name, manifest_name, rejects_name, shard_name
from pipelines.storage import Store
from tests.pipelines import standin
from tests.pipelines.image_set import write_set
from tests.pipelines.outputs import write_csv

ID, OTHER = "ab" + "0" * 30, "cd" + "1" * 30
OWN = [
    *("manifest/notes.parquet", "manifest/README.md", f"manifest/old/{ID}.parquet", f"manifest/{ID}.parquet.bak"),
    *("shards/train-0001.tar", f"shards/{ID}.zip", "shards/.hidden", "shards/.train-0001.tar.77"),
    *("images/photo.png", f"images/{ID}.png", f"images/ab/{OTHER}.png", f"images/ab/{ID}.bmp", "images/ab/.x.png.77"),
    *("rejected/essay.jsonl", f"rejected/{ID}.txt", ".progress/mine.json", "notes.md", ".notes.77"),
]
"""A user's own files."""


@pytest.fixture
def output(tmp_path):
    """A folder with files of a user's own; its prompts lie beside it."""
    (tmp_path / "p.txt").write_text("one\ntwo\n\n")
    for name in OWN:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    return tmp_path / "out"


def run(output, *options: str) -> None:
    assert standin.run("--prompts", output.parent / "p.txt", "--output", output, *options) == 0


def files(output) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def own(output) -> list[str]:
    """Which of the user's files are as they were."""
    return [name for name in OWN if (output / name).is_file() and (output / name).read_text() == name]


@pytest.mark.parametrize("format", ["tar", "files"])
def test_files_of_other_names_stay_wherever_they_lie(output, format, capsys):
    for options in ((), (), ("--overwrite",)):
        run(output, "--format", format, *options)
        (output / "summary.json").write_text('{"finished": false}')  # as a killed run leaves it
    assert own(output) == OWN
    assert "that no manifest commits" not in capsys.readouterr().err
    assert verify.verify(str(output)).faults == []


def test_what_a_killed_run_left_goes(output, capsys):
    run(output)
    (output / "summary.json").write_text('{"finished": false}')
    left = [shard_name(ID), shard_name(ID, "safetensors"), image_name(ID, "webp"), f"manifest/.{ID}.parquet.1a"]
    left += [f"shards/.{ID}.tar.1a", f"images/ab/.{ID}.png.1a", f"rejected/.{ID}.jsonl.1a", ".index.html.1a"]
    for name in left:
        (output / name).write_bytes(b"")
    run(output)
    assert f"deleted {len(left)} files" in capsys.readouterr().err
    assert [name for name in left if (output / name).exists()] == []
    assert own(output) == OWN


def test_a_shard_whose_manifest_was_deleted_goes(output, capsys):
    """As verify advises of a damaged one; with further prompts its rows come into a unit of another name."""
    run(output)
    manifest = next(name for name in files(output) if name.startswith("manifest/") and name not in OWN)
    shard = shard_name(layout.unit_of(manifest))
    (output / manifest).unlink()
    (output.parent / "p.txt").write_text("one\ntwo\nthree\n")
    run(output)
    assert "deleted 1 files that no manifest commits" in capsys.readouterr().err
    assert not (output / shard).exists()
    assert verify.verify(str(output)).orphans == []
    assert own(output) == OWN


def test_images_whose_manifest_was_deleted_go(output, capsys):
    """Made again in another form they would stay beside it for good."""
    (output.parent / "p.txt").write_text("one\ntwo\nthree\n")
    run(output, "--format", "files", "--unit-size", "2")
    manifest = next(name for name in sorted(files(output)) if name.startswith("manifest/") and name not in OWN)
    lost = pq.read_table(output / manifest)["file"].to_pylist()
    (output / manifest).unlink()
    run(output)
    assert f"deleted {len(lost)} files that no manifest commits" in capsys.readouterr().err
    assert [name for name in lost if (output / name).exists()] == []
    found = verify.verify(str(output))
    assert (found.images, found.orphans, found.faults) == (3, [], [])
    assert own(output) == OWN


def test_what_a_finished_job_left_whole_is_not_looked_through(output, monkeypatch):
    run(output, "--format", "files")
    monkeypatch.delattr(leftovers, "orphans")
    run(output, "--format", "files")


def test_nothing_is_left_over_where_no_job_ever_ran(output):
    mine = [image_name(ID, "png"), shard_name(ID)]
    for name in mine:
        (output / name).write_bytes(b"named as jobs name theirs")
    run(output)
    assert [name for name in mine if not (output / name).exists()] == []


@pytest.mark.parametrize("format", ["tar", "files"])
def test_what_another_worker_commits_meanwhile_is_not_left_over(output, monkeypatch, format):
    run(output, "--format", format, "--unit-size", "1")
    for path in (output / "manifest").glob("*.parquet"):
        if layout.is_ours(f"manifest/{path.name}") and path.name != f"{ID}.parquet":
            path.rename(output / path.name)
    find = Store.find

    def commits_one_after_each_listing(self, folder, **options):
        found = find(self, folder, **options)
        for path in sorted(output.glob("*.parquet"))[:1]:
            path.rename(output / "manifest" / path.name)
        return found

    monkeypatch.setattr(Store, "find", commits_one_after_each_listing)
    assert [x for x in leftovers.orphans(Store(str(output))) if x not in OWN] == []


def test_what_another_worker_commits_before_the_sweep_deletes_stays(output, monkeypatch):
    run(output)
    before = {name for name in files(output) if name.startswith("shards/")}
    (output / "summary.json").write_text('{"finished": false}')
    monkeypatch.setattr(leftovers, "orphans", lambda store: [shard_name(ID), *sorted(before - set(OWN))])
    (output / shard_name(ID)).write_bytes(b"of a killed run")
    leftovers.sweep(Store(str(output)))
    assert {name for name in files(output) if name.startswith("shards/")} == before


def test_overwrite_takes_all_that_jobs_wrote(output):
    run(output, "--format", "files")
    theirs = {name for name in files(output) if name not in OWN and "/" in name}
    (output.parent / "p.txt").write_text("three\n")
    run(output, "--overwrite")
    assert len(theirs) == 4  # two images, a manifest and a file of rejects
    assert not theirs & files(output).keys()
    assert own(output) == OWN


def test_a_killed_overwrite_is_swept_by_the_next_run(output, monkeypatch, capsys):
    run(output)
    shard = next(name for name in files(output) if name.startswith("shards/") and name not in OWN)
    (output.parent / "p.txt").write_text("three\n")

    def only_manifests(self, names):
        if not all(name.startswith("manifest/") for name in names):
            raise KeyboardInterrupt
        delete(self, names)

    delete = Store.delete
    with monkeypatch.context() as patch:
        patch.setattr(Store, "delete", only_manifests)
        arguments = ("--prompts", output.parent / "p.txt", "--output", output, "--overwrite")
        assert standin.run(*arguments) == 130
    assert (output / shard).exists()
    run(output)
    assert "deleted 1 files that no manifest commits" in capsys.readouterr().err
    assert not (output / shard).exists()


def test_manifests_are_read_together(output, monkeypatch):
    (output.parent / "p.txt").write_text("one\ntwo\nthree\n")
    run(output, "--format", "files", "--unit-size", "1")
    (output / image_name(ID, "png")).write_bytes(b"of a killed run")
    read, together = Store.read, threading.Barrier(3)

    def wait_for_the_others(self, name, *range):
        together.wait(60)
        return read(self, name, *range)

    monkeypatch.setattr(Store, "read", wait_for_the_others)
    assert leftovers.orphans(Store(str(output))) == [image_name(ID, "png")]


def test_every_name_that_a_sink_gives_is_known():
    for name in (manifest_name(ID), shard_name(ID), shard_name(ID, "safetensors"), rejects_name(ID)):
        assert layout.is_ours(name)
    for image_format in ("png", "jpg", "webp"):
        assert layout.is_ours(image_name(ID, image_format))


@pytest.mark.parametrize("folder", ["images", "shards/mine"])
def test_pictures_where_a_job_sweeps_are_refused(tmp_path, folder, capsys):
    (tmp_path / "out" / folder).mkdir(parents=True)
    images = write_set(tmp_path / "out" / folder, "folder")
    before = files(tmp_path / "out")
    for named in (images, f"file://{images}", f"{tmp_path}/out/./{folder}"):
        assert encode_latents.main(["--images", named, "--output", str(tmp_path / "out"), "--overwrite"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{named} lies in {tmp_path}/out/{folder.split('/')[0]}" in line
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["folder", "metadata"])
def test_a_set_that_holds_images_of_earlier_jobs_is_refused(output, kind, capsys):
    """Of its pictures --overwrite would delete some; where no job made any yet, none."""
    images = write_set(output, kind)
    leftovers.refuse_inputs(Store(str(output)), map(image_sets.folder_of, image_sets.find([images])))
    shutil.copy(output / "images/photo.png", output / image_name(ID, "png"))
    before = files(output)
    assert encode_latents.main(["--images", images, "--output", str(output), "--overwrite"]) == 2
    assert f"holds {output}/images, where jobs delete what others left" in capsys.readouterr().err
    assert files(output) == before


@pytest.mark.parametrize(
    ("suffix", "column"),
    [(".csv", "image"), (".jsonl", " Mask_Image"), (".parquet", "control_image"), (".toml", "image")],
)
def test_pictures_that_overwriting_would_delete_are_refused(output, suffix, column, capsys):
    run(output, "--format", "files")
    picture = next(f"{output}/{name}" for name in files(output) if name.startswith("images/") and name not in OWN)
    rows = [{"prompt": "a", column: ""}, {"prompt": "b", column: "nowhere://a::b"}, {"prompt": "c", column: picture}]
    file = output.parent / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == ".toml":
        file.write_text(f'prompts = ["a"]\n[lists]\n{column} = ["{picture}"]\n')
    elif suffix == ".csv":
        write_csv(file, rows)
    else:
        rows.insert(0, {"prompt": "d", column: "\ud800.png"})
        file.write_text("[]\n" + "\n".join(map(json.dumps, rows)))
    before = files(output)
    option = f"--{column.strip().lower().replace('_', '-')}"
    for named in (["--prompts", file], ["--prompts", output.parent / "p.txt", option, picture]):
        assert standin.run(*named, "--output", output, "--overwrite") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{picture} lies in {output}/images, where jobs delete what others left" in line
        assert files(output) == before
    assert standin.run("--prompts", file, "--output", output.parent / "elsewhere", "--overwrite") == 0


def test_a_prompt_file_may_have_the_name_of_a_sets_table(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"prompt": "a"}\n')
    for _ in range(2):
        named = "--prompts", tmp_path / "metadata.jsonl", "--output", tmp_path / "out"
        assert standin.run(*named, "--format", "files") == 0


def test_prompts_where_a_job_sweeps_are_refused(output, capsys):
    run(output)
    (rejects,) = (name for name in files(output) if name.startswith("rejected/") and name not in OWN)
    shutil.copytree(output, output.parent / "elsewhere")
    arguments = ("--prompts", output / rejects, "--prompt-column", "reason", "--output")
    assert standin.run(*arguments, output) == 2
    assert "where jobs delete what others left; choose another --output" in capsys.readouterr().err
    assert standin.run(*arguments, output.parent / "elsewhere") == 0
