"""The search for the largest batch that fits: what counts, how few compilations it takes, and for which requests."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from sdjax.generate import IN_FLIGHT
from sdjax.networks import build
from sdjax.planning import fit
from sdjax.planning.chips import CHIPS
from sdjax.planning.compiled import Compiled, Memory
from sdjax.planning.fit import Fit
from sdjax.planning.record import Recorded, record
from sdjax.request import Request
from sdjax.spec import Spec

REQUEST = Request(prompt="a red circle", num_inference_steps=7)
EMPTY = "HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n"


class _Stated:
    """A compiler by whose word each image takes `each` bytes of a chip, and of a draft `drafted` times as many."""

    def __init__(self, each: dict[str, int], drafted: float):
        self.name, self.memory, self.each, self.drafted, self.asked = "v5e", CHIPS["v5e"].memory, each, drafted, []

    def compile(self, recorded: Recorded, draft: bool) -> Compiled | None:
        batch = jax.tree.leaves(recorded.result)[0].shape[0]
        self.asked.append((recorded.name, draft))
        images = int(batch * self.each.get(recorded.name, 0) * (self.drafted if draft else 1))
        given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(recorded.arguments))
        return None if images > self.memory else Compiled(Memory(given, 0, 0, images, 0), EMPTY)


def _programs(spec: Spec, request: Request, batch_size: int) -> list[Recorded]:
    """Programs by name and batch alone, of which a search knows no more; to trace those of `record` takes seconds."""
    images = jax.ShapeDtypeStruct((batch_size, 64, 64, 3), jnp.uint8)
    names = "encode_text", "start", "advance", "decode"
    return [Recorded(name, jnp.negative, (images,), (), images, calls=1) for name in names]


@pytest.mark.parametrize("drafted", [0.75, 1, 1.3])
@pytest.mark.parametrize(
    ("each", "expected"),
    [
        ({"decode": 2**31}, 7),
        ({"decode": 2**31, "advance": 5 * 2**30}, 3),
        ({"advance": 2**28}, 62),
        ({"advance": 2**34}, 0),
    ],
)
def test_the_largest_batch_is_found_in_few_compilations(tiny, each, expected, drafted, monkeypatch):
    monkeypatch.setattr(fit, "record", _programs)
    compiler = _Stated(each, drafted)
    found = Fit(Spec(tiny), REQUEST, compiler, lambda _: None).largest()
    assert expected - expected // 16 <= found <= expected
    assert compiler.asked.count(("advance", False)) <= 3


def test_what_else_is_on_the_device_counts(tiny):
    """The networks that a program does not run, and the results of the other batch in flight."""
    found = Fit(Spec(tiny), REQUEST, _Stated({"decode": 1000}, 1), lambda _: None)
    decode = found.place("decode", 3)
    programs = record(Spec(tiny), REQUEST, 3)
    networks = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(build(Spec(tiny))))
    (own,) = [program for program in programs if program.name == "decode"]
    others = networks - sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own.arguments[0]))
    results = sum(leaf.size * leaf.dtype.itemsize for program in programs for leaf in jax.tree.leaves(program.result))
    given = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own.arguments))
    assert decode is not None
    assert decode.memory == given + 3 * 1000 + others + (IN_FLIGHT - 1) * results


def test_a_device_that_is_here_is_asked_for_its_memory(tiny):
    device = jax.devices()[0]
    with pytest.raises(ValueError, match="does not say how much memory it has"):
        fit.local(device)

    class Small:
        """The CPU, by its own word with little memory."""

        device_kind = "small"

        def memory_stats(self):
            return {"bytes_limit": 2**26}

    target = replace(fit.local(Small()), device=device)
    found = Fit(Spec(tiny), REQUEST, target, lambda _: None)
    for draft in (True, False):
        placed = found.place("decode", 2, draft)
        assert placed is not None
        assert 0 < placed.memory < 2**26


@pytest.fixture
def sought(monkeypatch):
    """The requests for which the largest batch was sought, and what it was to be at most; 5 fit, or as many as said."""
    asked, fits = [], {}

    def largest(self, most=None):
        asked.append((self._request, most))
        return min(fits.get(self._request, 5), most or 5)

    monkeypatch.setattr(Fit, "__init__", lambda self, spec, request, *_: setattr(self, "_request", request))
    monkeypatch.setattr(Fit, "largest", largest)
    monkeypatch.setattr(fit, "local", lambda device: device)
    return asked, fits


def test_the_batch_size_is_that_of_the_largest_request(tiny, sought):
    asked, fits = sought
    spec = Spec(tiny)
    small, tall, wide = (
        spec.resolve(Request(prompt="a", width=width, height=height))
        for width, height in [(16, 16), (16, 32), (64, 16)]
    )
    assert fit.largest_here(spec, [small, tall], print) == 5
    fits[wide] = 0
    with pytest.raises(ValueError, match="64x16 does not fit"):
        fit.largest_here(spec, [small, wide, tall], print)
    assert asked == [(tall, None), (wide, None)]


def test_the_batch_size_is_the_least_of_requests_that_ask_for_different_things(tiny, sought, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "image.png")
    asked, fits = sought
    spec = Spec(tiny)
    plain, joined, reusing, large, started, merged = (
        spec.resolve(Request(**{"prompt": "a", "width": 16, "height": 16, **fields}))
        for fields in (
            {},
            {"prompt": "a AND b AND c", "cache_interval": 3},
            {"cache_interval": 2},
            {"width": 32},
            {"image": str(tmp_path / "image.png")},
            {"token_merging_ratio": 0.5},
        )
    )
    assert fit.largest_here(spec, [plain, reusing, joined], print) == 5
    assert asked == [(joined, None)]
    asked.clear()
    fits |= {started: 3, merged: 4}
    assert fit.largest_here(spec, [plain, joined, reusing, large, started, merged], print) == 3
    assert asked[0] == (large, None)
    assert {request for request, _ in asked} == {large, joined, started, merged}
    assert asked[-1][1] == 3


def test_no_more_than_was_asked_for_is_tried(tiny, monkeypatch):
    monkeypatch.setattr(fit, "record", _programs)
    compiler = _Stated({}, 1)
    assert Fit(Spec(tiny), REQUEST, compiler, lambda _: None).largest(7) == 7
    assert len(compiler.asked) == 2 * 4


def test_where_one_program_does_not_fit_the_others_are_not_compiled(tiny, monkeypatch):
    monkeypatch.setattr(fit, "record", _programs)
    compiler = _Stated({"encode_text": 2**40}, 1)
    assert Fit(Spec(tiny), REQUEST, compiler, lambda _: None).fitted(2) is None
    assert compiler.asked == [("encode_text", False)]
