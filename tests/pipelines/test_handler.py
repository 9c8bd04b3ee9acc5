"""The model handler in other people's pipelines: loaded once, bad examples alone, and five lines long."""

import contextlib
import functools
import json
import time

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.util import assert_that, equal_to

from pipelines import verify
from pipelines.handler import SdjaxModelHandler
from pipelines.layout import manifest_name
from pipelines.lazy_model import LazyModel
from pipelines.options import IN_PROCESS
from pipelines.sinks import Images
from pipelines.sources import Place
from pipelines.unit_handler import UnitHandler
from pipelines.units import Row, packed_units, unpack
from sdjax.request import Request
from sdjax.values import RequestError
from tests.pipelines import standin

SPEC = standin.Spec()


def load_by_name(model, **options):
    assert model == "my/model"
    return standin.load(SPEC, **options)


def test_requests_and_prompts_become_results_and_a_bad_one_is_alone():
    examples = ["a cat", Request(prompt="a dog", seed=7), Request(prompt="x", sampler="none"), ""]

    def check(results):
        made = {str(r.example): r for r in results}
        assert len(made) == 4
        for example in examples[:2]:
            request = SPEC.resolve(Request(prompt=example) if isinstance(example, str) else example)
            inference = made[str(example)].inference
            assert inference.id == SPEC.id(request)
            np.testing.assert_array_equal(inference.pixels, standin.picture(SPEC, request).pixels)
            assert made[str(example)].model_id == SPEC.fingerprint
        for example in examples[2:]:
            assert isinstance(made[str(example)].inference, RequestError)

    with beam.Pipeline(runner=IN_PROCESS) as pipeline:
        images = pipeline | beam.Create(examples) | RunInference(SdjaxModelHandler("my/model", load=load_by_name))
        assert_that(images, check)


def test_a_picture_that_goes_after_it_was_checked_is_alone(monkeypatch):
    def stream(pipe, requests):
        for request in requests:
            if request.prompt == "gone":
                raise RequestError("image a.png is not there")
            yield standin.picture(pipe.spec, pipe.spec.resolve(request))

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    handler = SdjaxModelHandler("my/model", load=load_by_name)
    examples = ["gone", *(f"cat {i}" for i in range(5)), "gone"]
    results = [result.inference for result in handler.run_inference(examples, handler.load_model())]
    assert [isinstance(result, RequestError) for result in results] == [True, *[False] * 5, True]
    assert [result.request.prompt for result in results[1:-1]] == examples[1:-1]


def test_keys_travel_along():
    handler = KeyedModelHandler(SdjaxModelHandler("my/model", load=load_by_name))
    with beam.Pipeline(runner=IN_PROCESS) as pipeline:
        keyed = pipeline | beam.Create([("a", "a cat"), ("b", "a dog")]) | RunInference(handler)
        pairs = keyed | beam.MapTuple(lambda key, result: (key, result.inference.request.prompt))
        assert_that(pairs, equal_to([("a", "a cat"), ("b", "a dog")]))


def test_the_model_is_loaded_when_first_asked_for_and_once():
    loads = []
    model = LazyModel(lambda: loads.append(1) or "pipe")
    assert loads == []
    assert [model.get(), model.get()] == ["pipe", "pipe"]
    assert loads == [1]
    assert set(model.take_seconds()) == {"load"}
    assert model.take_seconds() == {}


class JaxRuntimeError(RuntimeError):
    """By the name of what a device raises."""


@pytest.fixture
def units_of_two(tmp_path):
    """Four rows in two units, and a handler that makes them."""
    requests = [SPEC.resolve(Request(prompt=f"cat {i}", num_inference_steps=1 + i)) for i in range(4)]
    rows = [Row(SPEC.id(r), "", SPEC.calls(r), r, "{}", Place("f", i)) for i, r in enumerate(requests)]
    packed = list(packed_units(rows, 2))
    return packed, UnitHandler(str(tmp_path), Images("tar", "png"), SPEC, load=standin.load)


def account(shares):
    return [(share.get("images", 0), share.get("rejected", 0)) for share in shares]


def rejected(folder):
    lines = (line for file in (folder / "rejected").iterdir() for line in file.read_text().splitlines())
    return {line["row"]: line["reason"] for line in map(json.loads, lines)}


@pytest.mark.parametrize("gone", [{2}, {0, 1, 2, 3}, {0, 2}])
def test_a_unit_that_is_committed_before_another_fails_counts(units_of_two, tmp_path, monkeypatch, gone):
    packed, handler = units_of_two
    first, lost = tmp_path / manifest_name(unpack(packed[0]).name), []

    def stream(pipe, requests):
        for i, request in enumerate(map(pipe.spec.resolve, requests)):
            if i == 2 and not lost:
                while not first.exists():
                    time.sleep(0.01)
                lost.extend(f"cat {row}" for row in gone)
            if request.prompt in lost:
                raise RequestError("image a.png is not there")
            yield standin.picture(pipe.spec, request)

    def resolve(spec, request):
        if request.prompt in lost:
            raise RequestError("image a.png is not there")
        return request

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    monkeypatch.setattr(standin.Spec, "resolve", resolve)
    shares = account(handler.run_inference(packed, handler.load_model()))
    left = gone & {2, 3}
    assert shares == [(2, 0), (0, len(left))] + ([(2 - len(left), 0)] if len(left) < 2 else [])
    assert rejected(tmp_path).keys() == left
    assert verify.verify(str(tmp_path)).faults == []
    # Its worker is lost, and the units come again one by one.
    again = [share for unit in packed for share in handler.run_inference([unit], handler.load_model())]
    assert sorted(account(again)) == sorted(shares)
    assert verify.verify(str(tmp_path)).rejected == len(left)


@pytest.mark.parametrize("error", [RequestError("image a.png is not there"), JaxRuntimeError("RESOURCE_EXHAUSTED")])
def test_what_an_attempt_rejected_stays_rejected_at_the_next(units_of_two, tmp_path, monkeypatch, error):
    """Its worker is lost after that, and then what was away is there again."""
    packed, handler = units_of_two

    def fails(request):
        if request.prompt == "cat 2":
            raise error
        return request

    with monkeypatch.context() as patch:
        patch.setattr(standin.Spec, "resolve", lambda spec, request: fails(request))
        first = account(handler.run_inference(packed, handler.load_model()))
    assert sorted(account(handler.run_inference(packed, handler.load_model()))) == sorted(first)
    found = verify.verify(str(tmp_path))
    assert (found.images, found.rejected, found.faults) == (*map(sum, zip(*first, strict=True)), [])


@pytest.mark.parametrize("format", ["tar", "files"])
@pytest.mark.parametrize(
    ("first", "moment", "gone"),
    [
        ("rejects", "rejected", {2}),
        ("rejects", "rejected", {2, 3}),
        ("rejects", "writes", {2}),
        ("rejects", "writes", {1, 2}),
        ("makes all", "writes", {2}),
        ("makes all", "writes", {1, 2}),
    ],
)
def test_two_workers_at_one_unit_agree_on_what_was_rejected(
    units_of_two, tmp_path, monkeypatch, format, first, moment, gone
):
    """One rejects rows that the other makes, on other hardware; the second does all of its work amid the first's."""
    packed, _ = units_of_two

    class Lacking(standin.Spec):
        def resolve(self, request):
            if int(request.prompt[-1]) in gone:
                raise RequestError("image a.png is not there")
            return request

    def works(spec):
        handler = UnitHandler(str(tmp_path), Images(format, "png"), spec, load=standin.load)
        return handler.run_inference(packed, handler.load_model())

    rejecting, whole = works(Lacking("other hardware")), works(SPEC)
    mine, others = (rejecting, whole) if first == "rejects" else (whole, rejecting)
    shares, theirs = [], []
    write = Images.write

    def after_the_other(*arguments):
        monkeypatch.setattr(Images, "write", write)
        theirs.extend(others)
        return write(*arguments)

    if moment == "writes":
        monkeypatch.setattr(Images, "write", after_the_other)
    for share in mine:
        shares.append(share)
        if moment == "rejected" and share.get("rejected"):
            theirs.extend(others)
    found = verify.verify(str(tmp_path))
    accounts = [tuple(map(sum, zip(*account(told), strict=True))) for told in (shares, theirs)]
    assert accounts == [(found.images, found.rejected)] * 2
    assert (sum(accounts[0]), found.faults, found.orphans) == (4, [], [])


def test_a_unit_that_another_worker_commits_meanwhile_counts_as_it_stands(units_of_two, monkeypatch):
    packed, handler = units_of_two
    write = Images.write
    monkeypatch.setattr(Images, "write", lambda *arguments: 0 * write(*arguments))
    shares = list(handler.run_inference(packed, handler.load_model()))
    assert [share["images"] for share in shares] == [2, 2]
    assert min(share["bytes"] for share in shares) > 0


@pytest.mark.parametrize("faults", [2, 100])
def test_pictures_that_come_and_go_are_tried_again(units_of_two, monkeypatch, faults):
    packed, handler = units_of_two
    left = [RequestError("image https://a/a.png cannot be read")] * faults

    def stream(pipe, requests):
        if left:
            raise left.pop()
        return map(functools.partial(standin.picture, pipe.spec), requests)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    made = handler.run_inference(packed, handler.load_model())
    if faults > 10:
        with pytest.raises(RequestError, match="cannot be read"):
            list(made)
        assert len(left) == faults - 4
    else:
        assert account(made) == [(2, 0), (2, 0)]


def test_a_row_that_no_device_has_memory_for_costs_its_unit_alone(units_of_two, tmp_path, monkeypatch):
    packed, handler = units_of_two

    def stream(pipe, requests):
        for request in requests:
            if request.prompt == "cat 2":
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 22.00G")
            yield standin.picture(pipe.spec, request)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    assert account(handler.run_inference(packed, handler.load_model())) == [(2, 0), (0, 2)]
    says = "a device has no memory for 16x16 at a batch of 4; give a smaller size, or --batch-size"
    assert rejected(tmp_path) == {2: says, 3: says}


@pytest.mark.parametrize("poison", [{"cat 2"}, {"cat 1", "cat 2"}])
def test_a_row_that_fails_where_others_are_made_is_alone(units_of_two, tmp_path, monkeypatch, poison):
    packed, handler = units_of_two

    def stream(pipe, requests):
        for request in requests:
            if request.prompt in poison:
                raise ZeroDivisionError("a fault\nof ours")
            yield standin.picture(pipe.spec, request)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    rows = [[row.place.row for row in unpack(unit).rows] for unit in packed]
    failing = [sum(f"cat {row}" in poison for row in unit) for unit in rows]
    shares = account(handler.run_inference(packed, handler.load_model()))
    assert sum(images for images, _ in shares) == 4 - len(poison)
    assert failing in ([0, 1], [1, 1])
    says = "it cannot be made: ZeroDivisionError: a fault of ours"
    assert rejected(tmp_path) == {int(prompt[-1]): says for prompt in poison}
    assert verify.verify(str(tmp_path)).faults == []


@pytest.mark.parametrize("times", [2, 1000])
def test_a_fault_of_no_row_rejects_none(units_of_two, tmp_path, monkeypatch, times):
    packed, handler = units_of_two
    left = ["a device is lost"] * times

    def stream(pipe, requests):
        if left:
            raise JaxRuntimeError(left.pop())
        return map(functools.partial(standin.picture, pipe.spec), requests)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    made = handler.run_inference(packed, handler.load_model())
    if times > 2:
        with pytest.raises(JaxRuntimeError, match="a device is lost"):
            list(made)
        assert len(left) > times - 10
    else:
        assert account(made) == [(2, 0), (2, 0)]
    assert not (tmp_path / "rejected").exists()


@pytest.mark.parametrize("after", range(12))
def test_a_device_that_is_lost_rejects_no_row_that_can_be_made(units_of_two, tmp_path, monkeypatch, after):
    packed, handler = units_of_two
    rows = [row for unit in packed for row in unpack(unit).rows]
    packed = list(packed_units(rows, 4))
    made = []

    def stream(pipe, requests):
        for request in requests:
            if request.prompt == "cat 2":
                raise ZeroDivisionError("a fault of ours")
            if len(made) == after:
                raise JaxRuntimeError("a device is lost")
            made.append(request)
            yield standin.picture(pipe.spec, request)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    with contextlib.suppress(JaxRuntimeError, ZeroDivisionError):
        list(handler.run_inference(packed, handler.load_model()))
    assert not (tmp_path / "rejected").exists() or rejected(tmp_path).keys() == {2}


def test_a_request_that_no_device_has_memory_for_is_alone(monkeypatch):
    def stream(pipe, requests):
        for request in requests:
            if request.width == 4096:
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 22.00G")
            if request.prompt == "broken":
                raise JaxRuntimeError("INTERNAL: of no request's fault")
            yield standin.picture(pipe.spec, request)

    monkeypatch.setattr(standin.Pipe, "stream", stream)
    handler = SdjaxModelHandler("my/model", load=load_by_name)
    examples = ["one", Request(prompt="two", width=4096), "three"]
    one, two, three = (result.inference for result in handler.run_inference(examples, handler.load_model()))
    assert str(two) == "a device has no memory for 4096x16 at a batch of 4; give a smaller size, or --batch-size"
    assert [one.request.prompt, three.request.prompt] == ["one", "three"]
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        list(handler.run_inference(["one", "broken"], handler.load_model()))


def test_a_model_that_no_device_has_memory_for_fails_the_job(units_of_two, tmp_path):
    packed, handler = units_of_two

    def load(model, **options):
        raise JaxRuntimeError("RESOURCE_EXHAUSTED: Attempting to allocate 22.00G")

    handler = UnitHandler(str(tmp_path), Images("tar", "png"), SPEC, load=load)
    with pytest.raises(JaxRuntimeError):
        list(handler.run_inference(packed, handler.load_model()))


def test_what_beam_asks_of_a_handler():
    handler = SdjaxModelHandler(max_batch_size=16)
    assert handler.get_metrics_namespace() == "sdjax"
    assert handler.get_num_bytes(["four", Request(prompt="five5")]) == 9
    assert handler.batch_elements_kwargs() == {"min_batch_size": 16, "max_batch_size": 16}
    assert UnitHandler("out", Images("tar", "png")).get_num_bytes([]) == 0
