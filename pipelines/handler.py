"""Stable Diffusion as a Beam ModelHandler, for any pipeline."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from apache_beam.ml.inference.base import ModelHandler, PredictionResult

from pipelines.lazy_model import LazyModel
from pipelines.units import NAMESPACE
from sdjax.console import is_out_of_memory
from sdjax.request import Request
from sdjax.values import RequestError


def load_spec(model: str | None, **options: Any) -> Any:
    """`sdjax.spec.Spec` of a checkpoint, the bundled one where none is named."""
    from sdjax.parts import BUNDLED
    from sdjax.spec import Spec

    return Spec(model or BUNDLED, **options)


def load_stable_diffusion(model: Any, *, compilation_cache: str | None = None, **options: Any) -> Any:
    """`sdjax.StableDiffusion.from_pretrained`, imported where it is called: a launcher needs no devices.

    Args:
        model: a checkpoint's folder, hub id or URL, or its `Spec`; None for the bundled one.
        compilation_cache: folder or bucket in which all workers keep compiled programs; None: the user's cache folder.
    """
    from sdjax import compile_cache
    from sdjax.generate import StableDiffusion
    from sdjax.parts import BUNDLED

    compile_cache.use(compilation_cache)
    return StableDiffusion.from_pretrained(model or BUNDLED, **options)


class SdjaxModelHandler(ModelHandler[Request | str, PredictionResult, LazyModel]):
    """Requests, or prompts as text, to images:

        images = requests | RunInference(SdjaxModelHandler("gs://models/sd15", dtype="bfloat16"))

    Each `PredictionResult` holds the example as given, and as its inference the `sdjax.generate.Result`, or the
    `RequestError` of an example that cannot be honoured: a bad one does not touch the others. The model is loaded once
    a process, when the first batch comes, and shared by its threads.

    Args:
        model: folder, hub id or fsspec URL of a checkpoint, or its `Spec`; None for the bundled one.
        dtype: of parameters and activations.
        batch_size: images that one device runs at once; None for the model's default.
        max_batch_size: examples that Beam hands over at a time; several device batches, so that devices stay fed.
        load: makes the pipe from the model and the options; must be picklable.
        options: others that `load` takes.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        dtype: str = "float32",
        batch_size: int | None = None,
        max_batch_size: int = 64,
        load: Callable[..., Any] = load_stable_diffusion,
        **options: Any,
    ):
        super().__init__(min_batch_size=max_batch_size, max_batch_size=max_batch_size)
        self._model, self._load = model, load
        self._options = {"dtype": dtype, "batch_size": batch_size, **options}

    def load_model(self) -> LazyModel:
        return LazyModel(self._load_pipe)

    def _load_pipe(self, **options: Any) -> Any:
        return self._load(self._model, **self._options, **options)

    def run_inference(
        self, batch: Sequence[Request | str], model: LazyModel, inference_args: Mapping[str, Any] | None = None
    ) -> Iterable[PredictionResult]:
        pipe = model.get()
        inferences: list[Any] = []
        good: list[Request] = []
        for example in batch:
            try:
                request = Request(prompt=example) if isinstance(example, str) else example
                good.append(pipe.spec.resolve(request))
                inferences.append(None)
            except RequestError as error:
                inferences.append(error)
        with model.devices_lock:
            results = iter(_made(pipe, good))
        for example, error in zip(batch, inferences, strict=True):
            inference = next(results) if error is None else error
            yield PredictionResult(example, inference, pipe.spec.fingerprint)

    def get_num_bytes(self, batch: Sequence[Any]) -> int:
        """Bytes of text; Beam's default would pickle every batch to know."""
        return sum(len(x if isinstance(x, str) else x.prompt) for x in batch)

    def get_metrics_namespace(self) -> str:
        return NAMESPACE


def _made(pipe: Any, requests: list[Request]) -> list[Any]:
    """A result for each request; the RequestError of one whose picture is gone by now, or that is too large."""
    try:
        return pipe.generate(requests)
    except RequestError as error:
        failed = error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = no_memory(pipe, requests[0])
    # From here on nothing holds what lay on the devices: the traceback of an exception that is handled would.
    if len(requests) == 1:
        return [failed]
    middle = len(requests) // 2
    return _made(pipe, requests[:middle]) + _made(pipe, requests[middle:])


def no_memory(pipe: Any, request: Request) -> RequestError:
    """Of a request that no device has room for."""
    size = f"{request.width}x{request.height} at a batch of {pipe.batch_size}"
    return RequestError(f"a device has no memory for {size}; give a smaller size, or --batch-size")
