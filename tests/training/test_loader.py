"""A step's batch: which examples it is of is a function of the step, and what is not needed is not read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.training.data import Scenes
from sdjax.training.loader import Loader, indices
from sdjax.training.samples import DataError


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_each_epoch_shows_every_example_once(length, batch_size, seed):
    steps = -(-3 * length // batch_size)
    seen = np.concatenate([indices(step, batch_size, length, seed) for step in range(steps)])[: 3 * length]
    for epoch in seen.reshape(3, length):
        assert sorted(epoch) == list(range(length))


def test_each_epoch_and_each_seed_has_its_own_order():
    orders = [tuple(indices(epoch, 50, 50, seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({*orders, tuple(range(50))}) == 5


def _loader(source, batch_size, seed=0, *, images=True, captions=True, dropout=0.0):
    return Loader(source, batch_size, seed, images=images, captions=captions, caption_dropout=dropout, workers=2)


def test_batches_do_not_depend_on_where_one_starts():
    loader = _loader(Scenes(16, 50), 8, seed=1, dropout=0.3)
    whole = list(loader.batches(0, 12))
    later = list(loader.batches(7, 12))
    assert len(whole) == 12
    for a, b in zip(whole[7:], later, strict=True):
        np.testing.assert_array_equal(a.pixels, b.pixels)
        np.testing.assert_array_equal(a.indices, b.indices)
        assert a.captions == b.captions
    assert {tuple(batch.captions) for batch in whole} != {tuple(whole[0].captions)}


def test_captions_are_dropped_as_often_as_asked():
    for share in (0.0, 0.25, 1.0):
        loader = _loader(Scenes(16, 500), 50, images=False, dropout=share)
        empty = np.mean([caption == "" for batch in loader.batches(0, 20) for caption in batch.captions])
        assert abs(empty - share) < 0.04


def test_what_is_not_needed_is_not_read():
    class Blind(Scenes):
        def image(self, index):
            raise AssertionError

    batch = next(_loader(Blind(16, 10), 2, images=False).batches(0, 1))
    assert batch.pixels is None
    assert next(_loader(Scenes(16, 10), 2, captions=False).batches(0, 1)).captions is None


def test_an_error_of_the_source_arrives():
    class Broken(Scenes):
        def image(self, index):
            raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        list(_loader(Broken(16, 10), 2).batches(0, 3))
