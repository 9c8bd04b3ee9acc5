"""A run knows what it was made from: its checkpoints and its latents are not another's."""

import os
import shutil
import threading
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import webdataset
from PIL import Image

from sdjax.parallel import Devices
from sdjax.training import config, identity, latents
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.config import TrainConfigError
from sdjax.training.data import Scenes, open_source
from sdjax.training.step import State
from tests.training.runs import ONE
from tests.training.test_data import _shards

LEAST = {"task": "vae", "output": "x", "steps": 10, "batch_size": 2}


def _pictures(folder, **greys):
    folder.mkdir(exist_ok=True)
    for name, grey in greys.items():
        Image.new("L", (8, 8), grey).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


def _made(data, **change):
    settings = config.build(config.Train, LEAST | {"data": data} | change)
    return identity.of_run(settings, open_source(settings.data), None)


def test_a_run_goes_on_where_its_data_lies_elsewhere_and_its_end_is_later(tmp_path):
    a = _pictures(tmp_path / "a", red=1, blue=2)
    shutil.copytree(a, tmp_path / "b")
    os.utime(tmp_path / "b" / "red.png", (1, 1))
    identity.write(tmp_path / "run", _made({"folder": str(a)}))
    other = {"output": "y", "steps": 20, "log_every": 7, "sheet_every": 9, "checkpoint_every": 8}
    identity.check(tmp_path / "run", _made({"folder": str(tmp_path / "b"), "workers": 5}, **other))
    less_memory = {"task": "unet", "remat": True, "optimizer": {"accumulate": 2}}
    identity.write(tmp_path / "other", _made({"folder": str(a)}, task="unet"))
    identity.check(tmp_path / "other", _made({"folder": str(a)}, **less_memory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "a run with seed 0, not 1; name another --output"),
        ({"optimizer": {"learning_rate": 0.5}}, "optimizer.learning_rate 0.0001, not 0.5; name another --output"),
        ({"model": {"vae": {"norm_num_groups": 2}}}, "another model.vae; name another --output"),
    ],
)
def test_another_configuration_is_named(tmp_path, change, message):
    data = {"folder": str(_pictures(tmp_path / "a", red=1))}
    identity.write(tmp_path, _made(data))
    with pytest.raises(TrainConfigError) as error:
        identity.check(tmp_path, _made(data, **change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_that_an_earlier_version_did_not_know_was_at_its_default(tmp_path):
    data = {"folder": str(_pictures(tmp_path / "a", red=1))}
    earlier = _made(data)
    del earlier["data.aspect_ratio_buckets"]
    identity.write(tmp_path, earlier)
    identity.check(tmp_path, _made(data))
    with pytest.raises(TrainConfigError, match=r"another data\.aspect_ratio_buckets; name another --output"):
        identity.check(tmp_path, _made(data | {"aspect_ratio_buckets": [[8, 8]]}))


def test_another_start_is_named(tmp_path):
    settings = config.build(config.Train, LEAST | {"data": {"generator": "x:y"}})
    identity.write(tmp_path, identity.of_run(settings, Scenes(8, 3), "one"))
    with pytest.raises(TrainConfigError, match="another init"):
        identity.check(tmp_path, identity.of_run(settings, Scenes(8, 3), "two"))


@pytest.mark.parametrize("captions", ["text", "table"])
def test_other_examples_of_a_folder_are_seen(tmp_path, captions):
    folder = _pictures(tmp_path / "set", red=1, blue=2)
    row = '{{"file_name": "{}.png", "text": "{}"}}\n'
    if captions == "table":
        (folder / "metadata.jsonl").write_text(row.format("red", "a") + row.format("blue", "b"))

    def digest(times=False):
        return identity.of_source(open_source(config.Data(folder=str(folder), size=8)), times=times)

    seen, written = [digest()], digest(times=True)
    (folder / "notes.md").write_text("no example")
    assert digest() == seen[0]
    os.utime(folder / "red.png", (1, 1))
    assert digest() == seen[0]
    assert digest(times=True) != written
    (folder / "blue.png").write_bytes(b"mended")
    assert digest() == seen[0]
    if captions == "table":
        (folder / "metadata.jsonl").write_text(row.format("red", "c") + row.format("blue", "b"))
        seen.append(digest())
    _pictures(folder, green=3)
    if captions == "table":
        (folder / "metadata.jsonl").write_text(row.format("red", "c") + row.format("green", "b"))
    seen.append(digest())
    assert len(set(seen)) == (3 if captions == "table" else 2)


@pytest.mark.parametrize("captions", ["text", "table"])
def test_latents_are_of_files_of_one_size(tmp_path, captions):
    """Where a time says nothing, as of a copy that keeps it."""
    folder = _pictures(tmp_path / "set", red=1)
    if captions == "table":
        (folder / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "a"}')
    digests = []
    for content in (b"one", b"longer"):
        (folder / "red.png").write_bytes(content)
        os.utime(folder / "red.png", (1, 1))
        digests.append(identity.of_source(open_source(config.Data(folder=str(folder), size=8)), times=True))
    assert len(set(digests)) == 2


def test_a_shard_of_many_examples_is_asked_of_once(tmp_path, monkeypatch):
    _shards(tmp_path)
    source, asked = open_source(config.Data(shards=f"{tmp_path}/*.tar", size=8)), []
    info = source._fs.info
    monkeypatch.setattr(source._fs, "info", lambda path: asked.append(path) or info(path))
    assert len(list(source.files())) > len(asked) == len(set(asked)) > 0


def test_other_shards_are_seen(tmp_path):
    _shards(tmp_path)

    def digest(times=False):
        return identity.of_source(open_source(config.Data(shards=f"{tmp_path}/*.tar", size=8)), times=times)

    whole, written = digest(), digest(times=True)
    assert digest() == whole
    for key in ("004", "005"):  # a picture is mended, then it is another example
        with webdataset.TarWriter(str(tmp_path / "0002.tar")) as writer:
            writer.write({"__key__": key, "png": b"of another size" * 99, "txt": "picture 004"})
        assert (digest() == whole) == (key == "004")
        assert digest(times=True) != written
    (tmp_path / "0001.tar").unlink()
    assert digest() != whole


def test_a_state_of_other_networks_is_refused(tmp_path):
    def state(kind=np.float32, **shapes):
        params = {name: np.ones(shape, kind) for name, shape in shapes.items()}
        return State(np.ones((), np.int32), params, params, ())

    kept = Checkpoints(tmp_path / "checkpoints", 2)
    assert not kept.begun
    assert kept.latest(state(a=(2, 3))) is None
    kept.save(state(a=(2, 3)))
    assert kept.begun
    assert kept.latest(state(a=(2, 3))) is not None
    for other in (state(a=(3, 3)), state(b=(2, 3)), state(a=(2, 3), b=(1,)), state()):
        with pytest.raises(TrainConfigError, match="is of other networks; name another --output"):
            kept.latest(other)


def test_a_damaged_checkpoint_is_not_taken_for_one_of_other_networks_alone(tmp_path):
    state = State(np.ones((), np.int32), {"a": np.ones(3)}, {"a": np.ones(3)}, ())
    Checkpoints(tmp_path, 2).save(state)
    Checkpoints(tmp_path, 2).save(state._replace(step=np.int32(2)))
    shutil.rmtree(tmp_path / "2" / "default")
    with pytest.raises(TrainConfigError, match="/2 is damaged, or is of other networks"):
        Checkpoints(tmp_path, 2).latest(state)
    shutil.rmtree(tmp_path / "2")
    found = Checkpoints(tmp_path, 2).latest(state)
    assert found is not None
    assert int(found.step) == 1


def test_the_last_checkpoints_are_kept(tmp_path):
    for keep in (1, 3):
        kept = Checkpoints(tmp_path / str(keep), keep)
        for step in range(1, 6):
            kept.save(State(np.full((), step, np.int32), {}, {}, {"m": np.ones(1)}))
        found = sorted(int(path.name) for path in (tmp_path / str(keep)).iterdir() if path.name.isdigit())
        assert found == list(range(6 - keep, 6))


@pytest.fixture
def standin(tmp_path, monkeypatch):
    """What `latents` needs of a run, with an encoder that gives a picture's first value and half of it."""
    folder = _pictures(tmp_path / "set", **{f"{number:03d}": number for number in range(70)})
    (tmp_path / "run").mkdir()
    calls = []

    def encoder(_run):
        def encode(pixels):
            calls.append(len(pixels))
            first = pixels[:, :1, :1, :1].astype(np.float32)
            return np.concatenate([first, first / 2], axis=-1)

        return encode

    def make(size=8, weight=0.0, devices=ONE):
        data = config.Data(folder=str(folder), size=size)
        networks = SimpleNamespace(configs={"vae": {}}, params={"vae": {"w": jnp.full(2, weight)}})
        return SimpleNamespace(
            config=SimpleNamespace(data=data),
            networks=networks,
            pictures=open_source(data),
            folder=tmp_path / "run",
            devices=devices,
        )

    monkeypatch.setattr(latents, "_encoder", encoder)
    return SimpleNamespace(make=make, calls=calls, folder=folder)


def test_latents_are_kept_in_the_examples_order(standin):
    for _ in range(2):
        np.testing.assert_array_equal(latents.cached(standin.make()).moments[:, 0, 0, 0], np.arange(70))
        assert len(standin.calls) == 2


def test_latents_take_the_disk_that_their_writing_took(standin, monkeypatch):
    """Mapped, they would take it as they are made: a full disk is then a signal, not an error."""
    encode, sizes = latents._encoder(None), []

    def watching(pixels):
        sizes.append(sum(path.stat().st_size for path in standin.make().folder.glob("*.npy")))
        return encode(pixels)

    monkeypatch.setattr(latents, "_encoder", lambda _: watching)
    made = latents.cached(standin.make())
    assert len(sizes) == 2
    assert max(sizes) <= 64 * made.moments[0].nbytes + 128 < (standin.make().folder / "latents.npy").stat().st_size


def test_pictures_are_read_ahead_of_the_encoder(standin, monkeypatch):
    encode, framed, later = latents._encoder(None), latents.framed, threading.Event()

    def reading(source, index):
        if index >= 64:
            later.set()
        return framed(source, index)

    def waiting(pixels):
        assert later.wait(60)
        return encode(pixels)

    monkeypatch.setattr(latents, "framed", reading)
    monkeypatch.setattr(latents, "_encoder", lambda _: waiting)
    np.testing.assert_array_equal(latents.cached(standin.make()).moments[:, 0, 0, 0], np.arange(70))


def test_few_pictures_are_a_small_batch(standin):
    for path in sorted(standin.folder.glob("*.png"))[5:]:
        path.unlink()
    assert len(latents.cached(standin.make()).moments) == 5
    assert standin.calls == [5]
    (standin.make().folder / "latents.sha256").unlink()
    assert len(latents.cached(standin.make(devices=Devices())).moments) == 5
    assert standin.calls == [5, 8]


def test_latents_stop_when_told(standin):
    stop = threading.Event()
    stop.set()
    assert latents.cached(standin.make(), stop) is None
    assert not standin.calls
    assert len(latents.cached(standin.make(), threading.Event()).moments) == 70


@pytest.mark.parametrize("change", ["picture", "count", "size", "vae"])
def test_latents_of_something_else_are_made_anew(standin, change):
    latents.cached(standin.make())
    if change == "picture":
        _pictures(standin.folder, **{"005": 250})
    if change == "count":
        _pictures(standin.folder, zebra=99)
    again = standin.make(size=16 if change == "size" else 8, weight=1.0 if change == "vae" else 0.0)
    made = latents.cached(again).moments[:, 0, 0, 0]
    assert len(standin.calls) == 4
    expected = np.append(np.arange(70), [99] * (change == "count"))
    expected[5] = 250 if change == "picture" else 5
    np.testing.assert_array_equal(made, expected)


def test_the_scaling_factor_makes_the_deviation_one(standin):
    run = standin.make()
    values = [number % 70 for number in range(512)]
    assert latents.scaling_factor(run) == pytest.approx(1 / np.std(values), rel=1e-3)
