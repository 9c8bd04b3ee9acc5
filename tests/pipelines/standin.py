"""A model that needs no devices: the interface of sdjax.generate, pictures drawn from a request's id.

Lets the job's own properties be tested at sizes and in numbers of runs that a network would not allow.
"""

import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipelines import generate_images
from sdjax.request import Request, id_of
from sdjax.values import RequestError

SIDE = 16
NAN_PROMPT = "overflow"  # makes a black picture with the flag that a network's NaN gets


@dataclass(frozen=True)
class Spec:
    name: str = "stand-in"
    fingerprint: str = "f" * 64

    def resolve(self, request: Request) -> Request:
        if request.sampler == "none":
            raise RequestError("sampler='none' is unknown; allowed are ddim, euler")
        if request.image is not None and not (request.image.startswith("data:") or Path(request.image).exists()):
            raise RequestError(f"image {request.image} cannot be read")
        defaults = {"width": SIDE, "height": SIDE, "sampler": "ddim", "sigmas": "default"}
        return dataclasses.replace(request, **{k: v for k, v in defaults.items() if getattr(request, k) is None})

    def hashed(self) -> str:
        return self.fingerprint

    def id(self, resolved: Request) -> str:
        return id_of(self.fingerprint, vars(resolved))

    def program(self, resolved: Request) -> tuple:
        return resolved.width, resolved.height

    def calls(self, resolved: Request) -> int:
        return resolved.num_inference_steps


@dataclass(frozen=True)
class Result:
    request: Request
    id: str
    pixels: np.ndarray
    flags: tuple[str, ...] = ()


class Devices(list):
    devices = property(lambda self: [SimpleNamespace(device_kind="stand-in")])


@dataclass
class Pipe:
    spec: Spec
    batch_size: int = 4
    devices: Devices = field(default_factory=lambda: Devices([0, 1]))
    delay: float = 0.0

    def generate(self, requests):
        return list(self.stream(requests))

    def stream(self, requests):
        for request in map(self.spec.resolve, requests):
            time.sleep(self.delay)
            yield picture(self.spec, request)


def picture(spec: Spec, resolved: Request) -> Result:
    id = spec.id(resolved)
    if resolved.prompt == NAN_PROMPT:
        return Result(resolved, id, np.zeros((resolved.height, resolved.width, 3), np.uint8), ("nan",))
    tile = np.frombuffer(hashlib.sha256(f"{spec.name} {id}".encode()).digest() * 6, np.uint8).reshape(8, 8, 3)
    return Result(resolved, id, np.tile(tile, (resolved.height // 8, resolved.width // 8, 1)))


def spec(model, **options) -> Spec:
    return Spec()


def load(model, *, batch_size=None, delay=0.0, **options) -> Pipe:
    return Pipe(model, batch_size or 4, delay=delay)


def load_slowly(model, **options) -> Pipe:
    """For tests that kill the job: slow enough to be in the middle of something."""
    return load(model, delay=0.002, **options)


def run(*argv: object, load=load) -> int:
    return generate_images.main([str(a) for a in argv], spec=spec, load=load)
