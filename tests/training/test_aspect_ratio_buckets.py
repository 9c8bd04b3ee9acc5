"""Aspect-ratio buckets: pictures keep their shape, and an epoch's batches are a function of the step."""

import io
import itertools
import json
import re
import threading

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sdjax.parallel import Devices
from sdjax.training import buckets, config, latents, loop
from sdjax.training.buckets import Buckets
from sdjax.training.config import TrainConfigError
from sdjax.training.loader import Loader
from sdjax.training.loop import Run
from sdjax.training.samples import DataError
from sdjax.training.stored import Folder, Shards
from tests.training.runs import ONE, losses, write
from tests.training.test_examples import _tar

SHAPES = ((16, 16), (8, 16), (16, 8), (32, 2))  # heights and widths; the last is nearest to none
SIZES = [(20, 22), (9, 20), (40, 18), (16, 16), (8, 17), (30, 15), (8, 16), (12, 20), (10, 20)]
OF = [0, 1, 2, 0, 1, 2, 1, 1, 1]


def file(height, width, kind="png", **options):
    data = io.BytesIO()
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        (folder / f"{number}.png").write_bytes(file(*size))
        (folder / f"{number}.txt").write_text(f"picture {number}")
    return folder


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
def test_a_pictures_sides_are_those_it_is_seen_with(tmp_path, kind):
    plain, over, aside = (file(300, 200, kind, exif=turned(number)) for number in (1, 3, 6))
    large = file(300, 200, kind, **{"exif": turned(6)} | ({"icc_profile": b"a" * 70000} if kind == "jpeg" else {}))
    contents = {f"{number}.{kind}": content for number, content in enumerate((plain, over, aside, large, b"none"))}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for source in (Folder(str(tmp_path), 8), Shards(_tar(tmp_path / "a.tar", contents).shards, 8)):
        assert [source.sides(index) for index in range(4)] == [(300, 200), (300, 200), (200, 300), (200, 300)]
        with pytest.raises(DataError, match="is no picture"):
            source.sides(4)


def test_a_picture_goes_where_it_loses_least(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(buckets, "_AHEAD", 4)  # so that they are asked for in parts
    source, path = Folder(str(pictures), 8), tmp_path / "buckets.json"
    stop = threading.Event()
    stop.set()
    assert buckets.kept(path, source, SHAPES, data="a", stop=stop) is None
    assert not path.exists()
    assert buckets.kept(path, source, SHAPES, data="a", stop=None).of.tolist() == OF
    assert capsys.readouterr().err.endswith("data.aspect_ratio_buckets: no picture is nearest to [32, 2]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "sides", None)  # a mended picture is where it was
        assert buckets.kept(path, source, SHAPES, data="a", stop=None).of.tolist() == OF
    assert set(buckets.kept(path, source, SHAPES[:1], data="a", stop=None).of) == {0}
    assert buckets.kept(path, source, SHAPES, data="b", stop=None).of.tolist() == OF


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_shows_every_picture_in_batches_of_one_bucket(of, batch_size, seed):
    table, again = (Buckets(SHAPES, np.array(of)) for _ in range(2))
    count = sum(-(-of.count(bucket) // batch_size) for bucket in range(4))
    steps = [table.indices(step, batch_size, seed) for step in range(2 * count)]
    for epoch in (steps[:count], steps[count:]):
        seen = np.bincount(np.concatenate(epoch), minlength=len(of))
        for bucket in set(of):
            own = seen[np.array(of) == bucket]  # as often as each other, but for those that fill the last batch
            assert 1 <= own.min() <= own.max() <= own.min() + 1
            assert own.sum() - len(own) < batch_size
    assert all(len({of[index] for index in batch}) == 1 and len(batch) == batch_size for batch in steps)
    for step in reversed(range(2 * count)):
        np.testing.assert_array_equal(again.indices(step, batch_size, seed), steps[step])


def test_each_epoch_and_each_seed_has_its_own_order():
    table = Buckets(SHAPES, np.repeat([0, 1], 32))
    orders = [
        [tuple(table.indices(8 * epoch + step, 8, seed)) for step in range(8)] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(table.of[batch[0]] for batch in order) for order in orders}) > 1


def test_what_an_image_is_made_from_is_cut_and_flipped_as_it_is(tmp_path):
    rows, whole = [], {}
    for i, (height, width) in enumerate([(8, 20), (8, 16), (22, 8), (16, 8)]):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        Image.fromarray(255 - pixels).save(tmp_path / f"{i}.from.png")
        rows.append({"file_name": f"{i}.png", "text": str(i), "conditioning_image_file_name": f"{i}.from.png"})
        whole[str(i)] = pixels
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Folder(str(tmp_path), 8, captions=True, conditioned=True)
    source.buckets = Buckets(SHAPES, np.array([1, 1, 2, 2]))
    options = {"images": True, "captions": True, "conditioning": True, "caption_dropout": 0.0, "workers": 1}
    loader, shapes = Loader(source, 2, 3, flip=True, **options), set()
    for step in range(12):
        batch = loader.batch(step)
        shapes.add(batch.pixels.shape)
        np.testing.assert_array_equal(batch.conditioning, 255 - batch.pixels)
        for pixels, (height, width, top, left), name in zip(batch.pixels, batch.frames, batch.captions, strict=True):
            assert whole[name].shape == (height, width, 3)
            there = tuple(slice(at, at + side) for at, side in zip((top, left), pixels.shape, strict=False))
            assert any(np.array_equal(pixels, side[there]) for side in (whole[name], whole[name][:, ::-1]))
    assert shapes == {(2, 8, 16, 3), (2, 16, 8, 3)}


def settings(folder, pictures, shapes=SHAPES, **changes):
    path = write(folder, cache="false")
    text = path.read_text().replace("batch_size = 4", "batch_size = 8")
    shapes = f"aspect_ratio_buckets = {list(map(list, shapes))}"
    path.write_text(re.sub("generator = .*\noptions = .*", f'folder = "{pictures}"\n{shapes}', text))
    return config.load(path, **changes)


@pytest.fixture
def run(pictures, tmp_path, monkeypatch):
    """One that went to its end, with steps whose loss tells the batch that they were given."""

    def step(state, frozen, batch):
        loss = (np.asarray(batch["pixels"], np.float32) ** np.arange(1, 9).reshape(8, 1, 1, 1)).mean()
        return state._replace(step=state.step + 1), {"loss": np.array([loss])}

    monkeypatch.setattr(loop, "make_step", lambda *_, **__: step)
    run = Run(settings(tmp_path, pictures), ONE)
    assert run.train()
    return run


def test_a_run_goes_on_across_buckets(run, pictures, tmp_path):
    (tmp_path / "parts").mkdir()
    for steps in (3, 8):
        assert Run(settings(tmp_path / "parts", pictures, steps=steps), ONE).train()
    whole, parts = (losses(folder) for folder in (run.folder, tmp_path / "parts" / "run"))
    assert whole == parts
    assert len({row["loss"] for row in whole}) > 5  # few pictures of a shape may come in the same order again
    assert (run.folder / "buckets.json").read_text() == (tmp_path / "parts" / "run" / "buckets.json").read_text()


def test_a_loss_is_one_of_pictures_that_are_not_square(run):
    for batch in itertools.islice(run._batches(0, None), 3):
        arrays = jax.tree.map(lambda leaf: leaf[0, 0], batch)
        given = run.state.params, run.networks.params, arrays, jax.random.key(0)
        found, _ = jax.eval_shape(run._objective(), *given)
        assert found.shape == (8,)
    assert {batch["pixels"].shape[3:5] for batch in run._batches(0, None)} == set(SHAPES[:3])


def test_latents_made_beforehand_are_those_of_the_batches(run, monkeypatch):
    def encode(pixels):
        mean = pixels[:, ::2, ::2, :1].astype(np.float32)
        return np.concatenate([mean, mean], axis=-1)

    monkeypatch.setattr(latents, "_encoder", lambda _: encode)
    (run.folder / "latents.npy").write_bytes(b"of squares")
    made = latents.cached(run)
    assert len(list(run.folder.glob("latents*.npy"))) == 3
    monkeypatch.setattr(latents, "_encoder", None)  # they are kept
    for plain, *others in zip(*(run._batches(0, cache) for cache in (None, made, latents.cached(run))), strict=True):
        for batch in others:
            np.testing.assert_array_equal(np.asarray(batch["moments"])[0, 0], encode(np.asarray(plain["pixels"])[0, 0]))
    run.pictures.buckets = Buckets(SHAPES, np.roll(OF, 1))
    with pytest.raises(TypeError):  # another table's are made anew
        latents.cached(run)


def test_eight_devices_share_the_batches_of_one(run, monkeypatch):
    one = [jax.tree.map(run.devices.join, batch) for batch in run._batches(0, None)]
    monkeypatch.setattr(run, "devices", Devices())
    for batch, expected in zip(run._batches(0, None), one, strict=True):
        assert batch["pixels"].shape[:3] == (8, 1, 1)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a)[:, 0, 0], b[0]), batch, expected)


def test_sides_that_the_vae_does_not_take_are_named(pictures, tmp_path):
    with pytest.raises(TrainConfigError, match=r"aspect_ratio_buckets has \[16, 9\]; the vae needs multiples of 2"):
        Run(settings(tmp_path, pictures, [(16, 16), (16, 9)]), ONE)
