"""The model handler in other people's pipelines: loaded once, bad examples alone, and five lines long."""

import apache_beam as beam
import numpy as np
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.testing.util import assert_that, equal_to

from pipelines.handler import LazyModel, SdjaxModelHandler, UnitHandler
from pipelines.options import IN_PROCESS
from pipelines.sinks import Images
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


def test_what_beam_asks_of_a_handler():
    handler = SdjaxModelHandler(max_batch_size=16)
    assert handler.get_metrics_namespace() == "sdjax"
    assert handler.get_num_bytes(["four", Request(prompt="five5")]) == 9
    assert handler.batch_elements_kwargs() == {"min_batch_size": 16, "max_batch_size": 16}
    assert UnitHandler("out", Images("tar", "png")).get_num_bytes([]) == 0
