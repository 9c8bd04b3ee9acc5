"""TPU chips that programs can be compiled for without one, and what they are said to do."""

from typing import NamedTuple


class Chip(NamedTuple):
    """A TPU chip, as one JAX device.

    Attributes:
        name: as in the topologies that libtpu knows.
        clock: cycles a second, which turn the compiler's estimates into seconds.
        peak: bfloat16 operations a second.
        multiplier: side of its matrix multipliers, to whose multiples a head's channels are padded.
        busy: the share of the time that the attention kernel keeps them busy, by the compiler's schedule of its steps.
        bandwidth: bytes a second of main memory.
        gib: GiB of main memory that a program may use, as libtpu says where one needs more.
        price: US dollars an hour on demand in a US region, by the list prices of 2026; a user's may differ.
        host: a host's topology, the smallest that libtpu compiles for.
    """

    name: str
    clock: float
    peak: float
    multiplier: int
    busy: float
    bandwidth: float
    gib: float
    price: float
    host: str

    @property
    def topology(self) -> str:
        """What `jax.experimental.topologies` calls a host of them."""
        return f"{self.name}:{self.host}"

    @property
    def options(self) -> dict[str, str]:
        """What else libtpu must be told: of a v4, that its two cores are one device."""
        return {"chip_config_name": "megacore"} if self.name == "v4" else {}

    @property
    def memory(self) -> int:
        """Bytes of main memory that a program may use."""
        return int(self.gib * 2**30)

    @property
    def bytes_per_cycle(self) -> float:
        return self.bandwidth / self.clock


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1.05e9, 275e12, 128, 0.61, 1228e9, 30.75, 3.22, "2x2x1"),
        Chip("v5e", 1.5e9, 197e12, 128, 0.94, 819e9, 15.75, 1.20, "2x2"),
        Chip("v5p", 1.75e9, 459e12, 128, 0.91, 2765e9, 95.74, 4.20, "2x2x1"),
        Chip("v6e", 1.75e9, 918e12, 256, 0.72, 1640e9, 31.25, 2.70, "2x2"),
    )
}
