"""Checkpoints of a run: the whole state, by orbax, written whole or not at all."""

from functools import cached_property
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from sdjax.training.config import TrainConfigError
from sdjax.training.step import State


class Checkpoints:
    """The last few states of a run, in a folder."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's, which makes the folder: not before there is something to write."""
        # Synchronous: a state is donated to the next step, and these are written seldom.
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, enable_async_checkpointing=False)
        return ocp.CheckpointManager(self._folder.absolute(), options=options)

    def save(self, state: State) -> None:
        """Write a state that has no device axis, under its step; a step that is there already is left."""
        step = int(state.step)
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state._asdict()))

    @property
    def begun(self) -> bool:
        """Whether there is a state."""
        return self._folder.exists() and self._manager.latest_step() is not None

    def latest(self, like: State) -> State | None:
        """Return the last state that was written whole, or None; `like` gives shapes and dtypes.

        Raises:
            TrainConfigError: it has others, or is damaged.
        """
        if not self.begun:
            return None
        step = self._manager.latest_step()
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like._asdict())
        where, what = self._manager.directory / str(step), "is of other networks; name another --output"
        try:
            found = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        except ValueError as error:  # where names differ, or files are gone or cut short
            raise TrainConfigError(f"{where} is damaged, or {what}") from error
        # Of arrays that a host wrote, orbax returns those that are there, whatever was asked for.
        if not jax.tree.all(jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), found, target)):
            raise TrainConfigError(f"{where} {what}")
        return State(**found)
