"""Noise from a request's own seed, two ways.

- "jax": threefry draws on the device; a request's key, folded with a number per use (`START`, `POSTERIOR`, a row's).
- "torch": what `torch.Generator("cpu").manual_seed(seed)` draws, in NumPy on the host, in the order in which diffusers
  draws: any posterior sample of an encoded image, the start latent, then each step's. A Brownian motion is drawn apart
  from these, as torchsde draws it from the same seed.

Neither depends on the batch, on the position in it, or on what else is in it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from sdjax.sampling.table import Table

START, POSTERIOR, ROWS = 0, 1, 2
"""What a "jax" key is folded with: for the start latent, for the VAE's posterior, and (plus the row) for each row."""

_DIGITS, _POOL = 6, 24  # of the times in a Brownian tree, and of the entropy for its seeds, as diffusers sets them
_BLOCK = 16  # torch fills in blocks of sixteen, and draws the last sixteen again where the size is no multiple


class TorchGenerator:
    """The stream of `torch.Generator("cpu").manual_seed(seed)`: MT19937 and torch's Box-Muller transform.

    The random bits are torch's own; the normals agree to a few float32 roundings (torch's logarithm and cosine are
    vectorised approximations, these are rounded from float64). seed: any integer; torch uses its low 32 bits.
    """

    def __init__(self, seed: int):
        self.initial_seed = seed
        self._bits = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def normal(self, shape: Sequence[int]) -> Float32[np.ndarray, "..."]:
        """What `torch.randn(shape, generator=...)` gives in float32."""
        size = math.prod(shape)
        if size < _BLOCK:
            return np.array([self._scalar() for _ in range(size)], np.float32).reshape(shape)
        full = size - size % _BLOCK
        uniform = self._uniform(size)
        out = np.empty(size, np.float32)
        out[:full] = _box_muller(uniform[:full])
        if full < size:
            out[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return out.reshape(shape)

    def _words(self, n: int) -> np.ndarray:
        return self._bits.randint(0, 1 << 32, n, np.uint32)

    def _uniform(self, n: int) -> np.ndarray:
        return (self._words(n) & 0xFFFFFF) / 2.0**24

    def _scalar(self) -> float:
        """torch's path below sixteen values: pairs in float64, the second kept for the next call."""
        if self._cached is not None:
            value, self._cached = self._cached, None
            return value
        words = self._words(4).astype(np.uint64)
        turn, u = ((words[0::2] << np.uint64(32) | words[1::2]) & np.uint64((1 << 53) - 1)) / 2.0**53
        radius = math.sqrt(-2 * math.log1p(-u))
        self._cached = radius * math.sin(2 * math.pi * turn)
        return radius * math.cos(2 * math.pi * turn)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Blocks of sixteen: the first eight give radii, the last eight angles."""
    u1, u2 = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log(1 - u1)), 2 * np.pi * u2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).reshape(-1)


def torch_latent(generator: TorchGenerator, shape: Sequence[int]) -> Float32[np.ndarray, "H W C"]:
    """The next latent-shaped draw of diffusers, which draws [1, C, H, W], as [H, W, C]. shape: (H, W, C)."""
    height, width, channels = shape
    return generator.normal((1, channels, height, width))[0].transpose(1, 2, 0)


def torch_step_noise(
    table: Table, generator: TorchGenerator, shape: Sequence[int]
) -> Iterator[Float32[np.ndarray, "H W C"]]:
    """Each row's noise in turn, drawn when it is asked for, as diffusers would draw it; zeros where a row uses none.

    Begin it after the start latent has been drawn from the same generator. Draws that diffusers makes and does not use
    are made too where a used one follows. A Brownian motion is of the generator's seed, as in diffusers where
    noise_sampler_seed is that. shape: (H, W, C).
    """
    nothing, used = np.zeros(tuple(shape), np.float32), table.uses_noise
    if table.walk:
        steps = brownian_steps(generator.initial_seed, table.walk, shape) if used.any() else ()
        yield from itertools.islice(itertools.chain(steps, itertools.repeat(nothing)), table.calls)
        return
    last = int(np.max(np.nonzero(used)[0], initial=-1))
    for row in range(table.calls):
        drawn = torch_latent(generator, shape) if row <= last and table.draws[row] else nothing
        yield drawn if used[row] else nothing


def brownian_steps(seed: int, walk: Sequence[float], shape: Sequence[int]) -> Float32[np.ndarray, "N H W C"]:
    """Steps down a Brownian motion, each over the root of its length: torchsde's BrownianInterval as diffusers has it.

    The motion is a tree: each interval's middle is drawn given its ends, from a seed of its place, until the middle is
    the time asked for, to six digits. So it depends on its seed and its ends alone, and not on the times between.

    seed: 0 or more.  walk: N + 2 falling times: the motion's upper end, then the steps' ends, the last its lower end.
    shape: (H, W, C).
    """
    high, *times = (round(time, _DIGITS) for time in walk)
    low = times[-1]

    def draw(*place: int) -> Float32[np.ndarray, "H W C"]:
        (state,) = np.random.SeedSequence(seed, spawn_key=place, pool_size=_POOL).generate_state(1)
        return torch_latent(TorchGenerator(int(state)), shape)

    path = {low: np.zeros(tuple(shape), np.float32), high: math.sqrt(high - low) * draw()}

    def halve(start: float, end: float, key: int, depth: int, wanted: set[float]) -> None:
        wanted = {time for time in wanted if start < time < end}
        if wanted:
            middle = round((start + end) / 2, _DIGITS)
            share = (middle - start) / (end - start)
            mean = path[start] + share * (path[end] - path[start])
            path[middle] = mean + math.sqrt(share * (end - middle)) * draw(key, depth)
            halve(start, middle, 2 * key, depth + 1, wanted)
            halve(middle, end, 2 * key + 1, depth + 1, wanted)
            if middle not in wanted:
                del path[middle]

    halve(low, high, 0, 0, set(times))
    # Times that are the same to six digits have no step between them.
    pairs = itertools.pairwise(times)
    return np.stack([(path[b] - path[a]) / math.sqrt(max(a - b, 10**-_DIGITS)) for a, b in pairs])


def keys(seeds: Sequence[int]) -> UInt32[np.ndarray, "B 2"]:
    """The requests' "jax" keys: threefry key data from all 64 bits of each seed."""
    return np.array([[seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def jax_latents(keys: UInt32[Array, "B 2"], stream: int | Array, shape: Sequence[int]) -> Float[Array, "B H W C"]:
    """Standard normals in float32, a latent a request. stream: START, POSTERIOR or ROWS + row. shape: (H, W, C)."""

    def draw(key: UInt32[Array, "2"]) -> Float[Array, "H W C"]:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), stream)
        return jax.random.normal(folded, tuple(shape), jnp.float32)

    with jax.threefry_partitionable(True):  # the same values whatever is set
        return jax.vmap(draw)(keys)
