"""The one error of this room."""


class SamplingError(ValueError):
    """A sampler, a schedule or a setting that cannot be had, in one line that says what can."""
