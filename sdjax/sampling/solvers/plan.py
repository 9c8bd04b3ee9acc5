"""What a sampler's loop is given."""

from collections.abc import Iterator
from dataclasses import dataclass

from sdjax.sampling.schedule import Schedule
from sdjax.sampling.trace import Level, Trace


@dataclass(frozen=True)
class Plan:
    """A run: the levels to visit and the settings.

    levels: where the network is called, then where the run ends; image-to-image has all of them too.
    begin: index of the first level to use; a multistep method starts afresh there.
    order: of the method, where it has one.  eta: 0 is deterministic, 1 ancestral, where a method has both.
    solver_type: the variant of a method, by diffusers' name; "" leaves it to the method.
    listed: whether the levels are timesteps that the request lists, even or not.
    """

    schedule: Schedule
    levels: list[Level]
    begin: int
    order: int
    eta: float
    solver_type: str
    listed: bool = False

    @property
    def first(self) -> Level:
        return self.levels[self.begin]

    @property
    def total(self) -> int:
        """Steps of the whole run, also when it begins in the middle."""
        return len(self.levels) - 1

    def steps(self, trace: Trace) -> Iterator[tuple[Level, Level]]:
        """Neighbouring levels from `begin` on; tells the trace which step its rows belong to."""
        for i in range(self.begin, self.total):
            trace.step = i - self.begin
            yield self.levels[i], self.levels[i + 1]

    def allowed_order(self, i: int) -> int:
        """DPM-Solver's limit at step i: lower at the end of few steps, for stability."""
        left = self.total - i
        if self.total < 15 and left <= 2 and self.schedule.option("lower_order_final", True):
            return left
        return 3
