"""Image sets to latents: every format alike, equal to diffusers' encoders, resumed, bad rows alone, trained on."""

import csv
import functools
import json
import shutil

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import encode_latents, image_sets, latents, verify
from pipelines.sources import SourceError
from sdjax import train
from sdjax.encode import Encoder
from sdjax.training.encoded import EncodedSet
from sdjax.training.samples import DataError
from tests import checkpoints
from tests.pipelines import standin
from tests.pipelines.image_set import CAPTIONS, PICTURES, png, write_set
from tests.pipelines.outputs import account, files, no_load, summary, write_csv

SIZE = 16
FORMATS = ("tar", "folder", "metadata", "bytes")


@functools.cache
def pipe_of(spec_id: str) -> latents.LatentPipe:
    return latents.LatentPipe(SPECS[spec_id], Encoder.from_pretrained(SPECS[spec_id].spec))


SPECS: dict[str, latents.LatentSpec] = {}


def load_once(model, **options):
    """One encoder for all runs, so that its programs are compiled once."""
    return pipe_of(SPECS.setdefault(model.fingerprint, model).fingerprint)


def run(tiny, *argv, load=load_once) -> int:
    return encode_latents.main([*map(str, argv), "--model", str(tiny), "--size", str(SIZE)], load=load)


def manifest(output) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(output / "manifest").to_pylist()}


@pytest.fixture(scope="module")
def encoded(tiny, tmp_path_factory):
    """Each format's output."""
    folder = tmp_path_factory.mktemp("encoded")
    for kind in FORMATS:
        images = write_set(folder / f"{kind}-set", kind)
        assert run(tiny, "--images", images, "--output", folder / kind, "--unit-size", 4) == 0
    return folder


def test_every_format_gives_the_same_examples(encoded):
    rows = {kind: manifest(encoded / kind) for kind in FORMATS}
    for kind in FORMATS:
        assert rows[kind].keys() == rows["tar"].keys()
        assert account(encoded / kind) == (10, 10, 0, 0, 0)
        assert {(id, row["sha256"]) for id, row in rows[kind].items()} == {
            (id, row["sha256"]) for id, row in rows["tar"].items()
        }
        assert sorted(row["caption"] for row in rows[kind].values()) == sorted(CAPTIONS.values())
        assert sorted(p.name for p in (encoded / kind).iterdir()) == ["manifest", "shards", "summary.json"]
        assert verify.main([str(encoded / kind)]) == 0
    for kind in ("tar", "metadata", "bytes"):
        for row in rows[kind].values():
            assert json.loads(row["extras"])["label"] == int(row["caption"][-3:])


def test_the_parquet_of_the_datasets_library_is_read_alike(encoded, tmp_path):
    def pictures(path):
        return [picture for piece in image_sets.cut(path) for _, (picture, _) in image_sets.read(piece)]

    for one, other in zip(
        pictures(str(encoded / "bytes-set" / "set.parquet")), pictures(write_set(tmp_path, "struct")), strict=True
    ):
        assert (one.caption, one.sha256, one.start, one.stop) == (other.caption, other.sha256, other.start, other.stop)


def test_units_hold_neighbours(encoded):
    """Of two tars of six and four pictures, units of four are cut within each."""
    shards: dict[str, set[str]] = {}
    for row in manifest(encoded / "tar").values():
        shards.setdefault(row["shard"], set()).add(row["key"])
    found = sorted(sorted(int(key[-3:]) for key in keys) for keys in shards.values())
    assert found == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]


def test_the_arrays_are_those_of_diffusers(encoded, tiny):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny)
    source = EncodedSet(str(encoded / "folder"))
    rows = [
        row for path in sorted((encoded / "folder" / "manifest").iterdir()) for row in pq.read_table(path).to_pylist()
    ]
    assert len(source) == len(rows) == 10

    def states(caption):
        ids = pipe.tokenizer(caption, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return pipe.text_encoder(ids).last_hidden_state[0].numpy()

    with torch.no_grad():
        for index, row in enumerate(rows):
            pixels = latents.cut(Image.fromarray(PICTURES[row["caption"][-3:]]), SIZE, SIZE)
            posterior = pipe.vae.encode(torch.tensor(pixels / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None])
            expected = torch.cat([posterior.latent_dist.mean, posterior.latent_dist.logvar], 1)[0].permute(1, 2, 0)
            moments = source.moments(index)
            assert moments.dtype == np.float16
            np.testing.assert_allclose(moments, expected, atol=2e-3 * float(expected.abs().max()))
            expected = states(row["caption"])
            np.testing.assert_allclose(source.text(index).states, expected, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_allclose(source.unconditional.states, states(""), atol=4e-3)


def test_a_rerun_makes_only_what_is_missing(encoded, tiny, tmp_path, capsys):
    shutil.copytree(encoded / "folder-set", tmp_path / "set")
    shutil.copytree(encoded / "folder", tmp_path / "out")
    before = files(tmp_path / "out")
    arguments = ("--images", tmp_path / "set", "--output", tmp_path / "out", "--unit-size", 4)
    assert run(tiny, *arguments, load=no_load) == 0
    assert "nothing to make" in capsys.readouterr().out
    assert files(tmp_path / "out") == before

    lost = min((tmp_path / "out" / "manifest").iterdir())  # its shard was written, and then the run was killed
    count = pq.read_metadata(lost).num_rows
    lost.unlink()
    (tmp_path / "out" / "summary.json").write_text('{"finished": false}')
    (tmp_path / "set" / "new.png").write_bytes(png(PICTURES["000"][:10]))
    (tmp_path / "set" / "new.txt").write_text("a cat")
    assert run(tiny, *arguments) == 0
    assert "deleted 1 files that no manifest commits" in capsys.readouterr().err
    assert account(tmp_path / "out") == (11, count + 1, 0, 0, 10 - count)
    assert verify.verify(str(tmp_path / "out")).faults == []


def test_another_dtypes_latents_stay_and_the_job_says_so(encoded, tiny, tmp_path, capsys):
    shutil.copytree(encoded / "folder", tmp_path / "out")
    arguments = ("--images", encoded / "folder-set", "--output", tmp_path / "out", "--unit-size", 4)
    assert run(tiny, *arguments, load=no_load) == 0
    assert "another model" not in capsys.readouterr().err
    before = files(tmp_path / "out")
    assert run(tiny, *arguments, "--dtype", "bfloat16") == 0
    assert capsys.readouterr().err.count("made by another model or dtype (") == 1
    assert before.items() < files(tmp_path / "out").items()


def test_latents_of_another_size_stay_and_the_job_says_so(encoded, tiny, tmp_path, capsys):
    """Training refuses the two in one folder."""
    shutil.copytree(encoded / "folder", tmp_path / "out")
    arguments = ("--images", encoded / "folder-set", "--output", tmp_path / "out", "--unit-size", 4)
    assert run(tiny, *arguments, load=no_load) == 0
    assert "--size" not in capsys.readouterr().err
    assert encode_latents.main([*map(str, arguments), "--model", str(tiny), "--size", str(2 * SIZE)]) == 0
    assert f"what is there was made with --size {SIZE}; it stays, and" in capsys.readouterr().err


def test_what_generate_images_wrote_is_encoded_alike_whatever_its_format(tiny, tmp_path):
    """Only what a manifest commits is there; files of both kinds may lie in one output."""
    found = {}
    for name, options in {"tar": [["tar"]], "files": [["files"]], "both": [["tar"], ["files", "--seed", "9"]]}.items():
        for option in options:
            write_csv(tmp_path / "p.csv", [{"prompt": f"a cat {i}", "label": f"{i}"} for i in range(3)])
            made = ("--prompts", tmp_path / "p.csv", "--output", tmp_path / name, "--format", *option)
            assert standin.run(*made, "--unit-size", 2) == 0
        (tmp_path / name / "images" / "ab").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "images" / "ab" / f"ab{'0' * 30}.png").write_bytes(png(PICTURES["000"]))
        assert run(tiny, "--images", tmp_path / name, "--output", tmp_path / f"{name}-latents") == 0
        found[name] = manifest(tmp_path / f"{name}-latents")
    assert found["files"].keys() == found["tar"].keys()
    assert len(found["both"]) == 6
    for id, row in found["tar"].items():
        assert (found["files"][id]["caption"], found["files"][id]["key"]) == (row["caption"], row["key"])
        assert json.loads(found["files"][id]["extras"]) == json.loads(row["extras"])


def test_bad_samples_are_rejected_alone(encoded, tiny, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(encoded / "metadata-set", folder)
    (folder / "broken.png").write_bytes(png(PICTURES["000"])[:200])
    (folder / "empty.png").write_bytes(b"")
    bad = [
        ({"file_name": "broken.png", "text": "x"}, "is broken"),
        ({"file_name": "empty.png", "text": "x"}, "holds no image's bytes"),
        ({"file_name": "absent.png", "text": "x"}, "is not there"),
        ({"file_name": "../set/000.png", "text": "x"}, "is no file below"),
        ({"file_name": "000.png"}, "has no caption"),
        ({"file_name": "000.png", "text": 5}, "has no caption"),
        ("{", "not JSON"),
        ({"file_name": "\ud83d.png", "text": "x"}, "name that is not valid UTF-8"),
        ({"file_name": "a\0.png", "text": "x"}, "is no file below"),
        ({"file_name": "nope::foo", "text": "x"}, "is no file below"),
        ({"file_name": ".", "text": "x"}, "is a folder"),
        ({"file_name": "000.png/x", "text": "x"}, "is not there"),
        ({"file_name": "000.png", "text": "half \ud83d"}, "half of a surrogate pair"),
        ({"file_name": "000.png", "text": "x", "note": "half \ud83d"}, "half of a surrogate pair"),
    ]
    with (folder / "metadata.jsonl").open("a") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row, _ in bad)
        file.write(json.dumps({"file_name": "000.png", "text": CAPTIONS["000"], "label": "again"}) + "\n")
    assert run(tiny, "--images", folder, "--output", tmp_path / "out") == 0
    assert account(tmp_path / "out") == (11 + len(bad), 10, len(bad), 1, 0)
    lines = [json.loads(x) for f in (tmp_path / "out" / "rejected").iterdir() for x in f.read_text().splitlines()]
    for line, (_, reason) in zip(sorted(lines, key=lambda line: line["row"]), bad, strict=True):
        assert reason in line["reason"]
        assert line["file"].endswith("metadata.jsonl")
    kept = {(id, row["sha256"]) for id, row in manifest(tmp_path / "out").items()}
    assert kept == {(id, row["sha256"]) for id, row in manifest(encoded / "metadata").items()}


def test_an_image_that_changes_after_planning_costs_its_own_row_only(encoded, tiny, tmp_path):
    shutil.copytree(encoded / "folder-set", tmp_path / "set")

    def load_after_change(model, **options):
        (tmp_path / "set" / "003.png").write_bytes(png(PICTURES["000"]))
        (tmp_path / "set" / "004.png").unlink()
        return load_once(model)

    arguments = ("--images", tmp_path / "set", "--output", tmp_path / "out")
    assert run(tiny, *arguments, load=load_after_change) == 0
    assert account(tmp_path / "out") == (10, 8, 2, 0, 0)
    assert verify.main([str(tmp_path / "out")]) == 0


class Overflowing:
    """An encoder whose third picture is not finite."""

    def __init__(self, encoder):
        self._encoder = encoder
        self.batch_size, self.devices, self.unconditional = encoder.batch_size, encoder.devices, encoder.unconditional

    def stream(self, examples):
        for i, encoded in enumerate(self._encoder.stream(examples)):
            yield encoded._replace(finite=i != 2)


def test_what_is_not_finite_is_flagged_and_not_trained_on(encoded, tiny, tmp_path):
    def load(model, **options):
        pipe = load_once(model)
        return latents.LatentPipe(pipe.spec, Overflowing(pipe._encoder))

    assert run(tiny, "--images", encoded / "folder-set", "--output", tmp_path / "out", load=load) == 0
    assert summary(tmp_path / "out")["flagged"] == 1
    assert [row["key"] for row in manifest(tmp_path / "out").values() if row["flags"]] == ["002.png"]
    assert len(EncodedSet(str(tmp_path / "out"))) == 9


def test_sets_that_no_job_can_run_on_are_refused(tmp_path, tiny, capsys):
    (tmp_path / "x.png").write_bytes(png(PICTURES["000"]))
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "p.parquet")
    (tmp_path / "empty").mkdir()
    for images, message in [
        (tmp_path, "its images have no captions"),
        (tmp_path / "empty", "it holds no image"),
        (tmp_path / "p.parquet", "needs a column image and one of text"),
        (tmp_path / "absent.tar", "no such file"),
        (tmp_path / "absent", "no such file or folder"),
        (tmp_path / "*.tar", "no file matches"),
        (tmp_path / "x.png", "no image set"),
    ]:
        with pytest.raises(SourceError, match=message):
            image_sets.find([str(images)])
        assert run(tiny, "--images", images, "--output", tmp_path / "out", load=no_load) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line
    assert encode_latents.main(["--images", str(tmp_path), "--output", "o", "--model", str(tiny), "--size", "17"]) == 2
    assert "--size=17 is not a multiple of" in capsys.readouterr().err
    assert run(tiny, "--images", "", "--output", tmp_path / "out", load=no_load) == 2  # it is not the folder here
    assert "--images is empty; give it a value, or leave it out" in capsys.readouterr().err
    for option, value, message in [
        ("--lora", "x.safetensors", "--lora would change the text encoder"),
        ("--variant", "fp16", "--variant may read other weights than training does"),
        ("--model", "x.safetensors", "--model=x.safetensors is a single file, and training starts from a folder"),
        ("--model", "https://hub/x.ckpt?download=true", "is a single file, and training starts from a folder"),
    ]:
        arguments = ["--images", str(tmp_path), "--output", str(tmp_path / "out"), option, value]
        assert encode_latents.main(arguments, load=no_load) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert message in line


def damage_shard(output):
    path = min((output / "shards").iterdir())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_shard(output):
    path = min((output / "shards").iterdir())
    path.write_bytes(path.read_bytes()[:-9])


def lose_shard(output):
    min((output / "shards").iterdir()).unlink()


@pytest.mark.parametrize("damage", [damage_shard, cut_shard, lose_shard])
def test_verify_finds_damage(encoded, tmp_path, damage):
    shutil.copytree(encoded / "folder", tmp_path / "out")
    damage(tmp_path / "out")
    assert verify.main([str(tmp_path / "out")]) == 1


def configuration(folder, latents_folder, init, more="") -> list[str]:
    path = folder / "train.toml"
    path.write_text(f"""
task = "unet"
output = "{folder / "run"}"
init = "{init}"
steps = 2
batch_size = 8
log_every = 1
[data]
latents = "{latents_folder}"
[diffusion]
caption_dropout = 0.5
{more}""")
    return ["--config", str(path)]


def test_a_unet_is_trained_on_them(encoded, tiny, tmp_path):
    assert train.main(configuration(tmp_path, encoded / "bytes", tiny)) == 0
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors").exists()


def test_another_models_latents_and_options_that_make_no_sense_are_refused(encoded, tmp_path, capsys):
    checkpoints.saved(tmp_path / "other", seed=5)
    assert train.main(configuration(tmp_path, encoded / "tar", tmp_path / "other")) == 2
    assert "was not encoded by the text_encoder, tokenizer, vae of" in capsys.readouterr().err
    more = "train_text_encoder = true"
    assert train.main(configuration(tmp_path, encoded / "tar", tmp_path / "other", more)) == 2
    assert "diffusion.train_text_encoder does not go with data.latents" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no encoded image"):
        EncodedSet(str(tmp_path))


@pytest.mark.parametrize(
    ("column", "other", "message"),
    [("model_fingerprint", "0" * 64, "2 models"), ("size", 8, "2 sizes"), ("dtype", "float16", "2 dtypes")],
)
def test_a_folder_of_two_encodings_is_refused(encoded, tmp_path, column, other, message):
    output = shutil.copytree(encoded / "tar", tmp_path / "out")
    manifest = next((output / "manifest").iterdir())
    table = pq.read_table(manifest)
    place = table.schema.get_field_index(column)
    changed = table.set_column(place, table.schema.field(column), pa.array([other] * len(table)))
    pq.write_table(changed, output / "manifest" / "notes.parquet")
    assert len(EncodedSet(str(output))) == len(EncodedSet(str(encoded / "tar")))  # somebody's own file
    (output / "manifest" / "notes.parquet").rename(output / "manifest" / f"{'ab' * 16}.parquet")
    with pytest.raises(DataError, match=f"holds encodings of {message}; name a folder of one"):
        EncodedSet(str(output))


def test_a_folder_may_be_named_as_a_glob_would_be(encoded, tmp_path):
    output = shutil.copytree(encoded / "tar", tmp_path / "set[1]")
    assert len(EncodedSet(str(output))) == len(EncodedSet(str(encoded / "tar")))


def test_training_names_a_damaged_manifest(encoded, tmp_path):
    output = shutil.copytree(encoded / "tar", tmp_path / "out")
    manifest = next((output / "manifest").iterdir())
    content = bytearray(manifest.read_bytes())
    content[-20] ^= 255  # in the footer, over which pyarrow raises an OSError
    for damaged in (bytes(content), manifest.read_bytes()[:-9], b"PAR1"):
        manifest.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{manifest.name} is no whole manifest"):
            EncodedSet(str(output))
