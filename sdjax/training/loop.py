"""A training run from its configuration to its exported model."""

import contextlib
import glob
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sdjax import text
from sdjax.config import VAEConfig
from sdjax.parallel import Devices
from sdjax.sampling.schedule import Schedule
from sdjax.training import buckets, controlnet, identity, latents, lora, objective
from sdjax.training.checkpoints import Checkpoints
from sdjax.training.config import Train, TrainConfigError
from sdjax.training.data import Source, buckets_of, open_source
from sdjax.training.encoded import EncodedSet
from sdjax.training.loader import Loader
from sdjax.training.networks import Networks, Params
from sdjax.training.progress import Progress
from sdjax.training.sheet import Sheet
from sdjax.training.start import is_conditioned, prepare
from sdjax.training.step import State, initial, make_step, microbatches
from sdjax.training.stored import Stored
from sdjax.weights.single_file import open_checkpoint


class Run:
    """A run with its networks, ready to be trained or exported.

    Args:
        config: what to do.
        devices: None takes all local devices.

    Raises:
        TrainConfigError, DataError, CheckpointError, ConfigError: something of the configuration cannot be used.
    """

    def __init__(self, config: Train, devices: Devices | None = None) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.devices = Devices() if devices is None else devices
        pieces = len(self.devices) * config.optimizer.accumulate
        if config.batch_size % pieces:
            raise TrainConfigError(
                f"batch_size is {config.batch_size}; {len(self.devices)} devices and optimizer.accumulate "
                f"{config.optimizer.accumulate} need a multiple of {pieces}"
            )
        start = None
        if config.init is not None:
            said = {"tokenizer": config.tokenizer, "prediction_type": config.prediction_type}
            start = open_checkpoint(config.init, allow_pickle=config.allow_ckpt, **said)
        self._conditioned = is_conditioned(config, start)
        self.source = open_source(config.data, captions=config.denoises, conditioned=self._conditioned)
        self.networks: Networks = prepare(config, self.source, start)
        if config.task == "controlnet":
            controlnet.add(self.networks, config)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", config.keep_checkpoints)
        trained = {config.task}
        if config.diffusion.train_text_encoder:
            trained |= set(self.networks.text_encoders)
        params = self.networks.params
        encoded = {"vae"} if config.data.cache_latents else set()  # before the first step
        if isinstance(self.source, EncodedSet):
            encoded = {"vae", *self.networks.text_encoders}
        begun, stays = {name: params[name] for name in sorted(trained)}, params.keys() - encoded
        if config.lora.rank:
            rng = np.random.default_rng(config.seed)
            begun = {name: lora.start(own, config.lora.rank, rng) for name, own in begun.items()}
            if config.lora.init is not None:
                begun = lora.resume(begun, self.networks, config)
        else:
            stays -= trained
        self.frozen: dict[str, Params] = {name: params[name] for name in sorted(stays)}
        fresh = initial(begun, config.optimizer, config.steps)
        self._made = identity.of_run(config, self.source, self.networks.init)
        if self.checkpoints.begun:
            identity.check(self.folder, self._made)
        self.state = self.checkpoints.latest(fresh) or fresh
        self._sheet = Sheet(self)

    @property
    def pictures(self) -> Source:
        """The source, of which nothing is encoded yet."""
        assert not isinstance(self.source, EncodedSet)
        return self.source

    def train(self, stop: threading.Event | None = None) -> bool:
        """Take the steps that remain and write a checkpoint; return False if `stop` was set before the end.

        Raises:
            FloatingPointError: the loss, a weight, an average or a moment is not finite; checkpoints before it stay,
                and a Run is made anew from them: this one's state is gone.
            DataError, OSError: an example can't be read, or a file can't be written; a checkpoint was written first.
        """
        config = self.config
        identity.write(self.folder, self._made)
        if shapes := config.data.aspect_ratio_buckets:
            assert isinstance(self.source, Stored)  # others are refused
            path, data = self.folder / "buckets.json", self._made["data"]
            self.source.buckets = buckets.kept(path, self.source, shapes, data=data, stop=stop)
            if self.source.buckets is None:
                return False
        cache = None
        if config.data.cache_latents:
            cache = latents.cached(self, stop)
            if cache is None:
                return False
        step = make_step(
            self._objective(),
            config.optimizer,
            steps=config.steps,
            batch_size=config.batch_size,
            seed=config.seed,
            devices=self.devices,
        )
        # Copied: what a step gives up must not be shared with the host's arrays.
        state = jax.tree.map(lambda leaf: self.devices.replicate(np.array(leaf)), self.state)
        frozen = {
            name: {key: self.devices.replicate(leaf.astype(self.networks.dtypes[name])) for key, leaf in own.items()}
            for name, own in self.frozen.items()
        }
        start, last = int(self.state.step), None
        progress = Progress(self.folder, start, config.steps, config.batch_size)
        finished = True
        try:
            for number, batch in enumerate(self._batches(start, cache), start + 1):
                state, values = step(state, frozen, batch)
                jax.block_until_ready(last)  # one step runs ahead, not as many as devices queue: a stop waits for them
                last = values
                progress.add(number, values)
                finished = number == config.steps
                stopped = stop is not None and stop.is_set()
                saving = number % config.checkpoint_every == 0 or finished or stopped
                showing = config.has_sheets and (number % config.sheet_every == 0 or finished)
                logging = number % config.log_every == 0 or saving or showing
                if logging:
                    progress.write()
                if saving or showing:
                    self._fetch(state)
                if saving:
                    self._save()
                if showing:
                    self._sheet.write(number)
                if logging:
                    progress.rest()
                if stopped and not finished:
                    break
        except FloatingPointError:  # with its state nothing can be begun
            raise
        except Exception:
            with contextlib.suppress(RuntimeError):  # a step that failed took its state with it
                progress.write()
                self._fetch(state)
                self._save()
            raise
        finally:
            progress.close()
        return finished

    def export(self, folder: Path, dtype: str | None = None) -> None:
        """Write what was trained, averaged, in place of one that is there: a model, a LoRA or a ControlNet.

        It is there whole or not at all. A model card, README.md, is kept.

        Raises:
            TrainConfigError: nothing is trained yet, or `folder` holds something else.
        """
        if not int(self.state.step):
            raise TrainConfigError(f"{self.folder / 'checkpoints'} holds no checkpoint")
        check_replaceable(folder, self.config)
        if self.config.task == "vae" and not self.config.reconstruction.decoder_only:
            self.networks.configs["vae"]["scaling_factor"] = latents.scaling_factor(self)
        folder = folder.resolve()  # of a link, what it leads to
        name = f".{glob.escape(folder.name)}.????????"  # of an export that was killed
        for left in folder.parent.glob(f"{name}.new"):
            shutil.rmtree(left, ignore_errors=True)
        for left in folder.parent.glob(f"{name}.old"):
            if folder.exists() and any(folder.iterdir()):
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(folder)
        mark = uuid.uuid4().hex[:8]
        new, old = (folder.with_name(f".{folder.name}.{mark}.{age}") for age in ("new", "old"))
        try:
            if self.config.lora.rank:
                lora.save(new, self.state.average, dtype)
            elif self.config.task == "controlnet":
                controlnet.save(new, self.networks, self.state.average["controlnet"], dtype)
            else:
                self.networks.export(new, self.state.average, dtype)
            if (folder / "README.md").exists():
                shutil.copyfile(folder / "README.md", new / "README.md")
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

    def _batches(self, start: int, cache: latents.Cache | None) -> Iterator[Any]:
        """The batches of the steps after `start`, on the devices; with `cache`, latents in place of pictures."""
        config = self.config
        words = config.denoises and not isinstance(self.source, EncodedSet)
        tokenizers, xl = self.networks.tokenizers() if words else [], self.networks.xl
        side = self.source.size if isinstance(self.source, EncodedSet) else config.data.size
        cut = buckets_of(self.source)
        loader = Loader(
            self.source,
            config.batch_size,
            config.seed,
            images=cache is None,
            captions=words,
            conditioning=self._conditioned,
            caption_dropout=config.diffusion.caption_dropout,
            workers=config.data.workers,
            flip=config.data.flip,
        )
        place = np.arange(config.batch_size, dtype=np.int32)
        names = ("pixels", "conditioning", "is_unseen", "moments", "context", "pooled")
        for batch in loader.batches(start, config.steps):
            given = {name: getattr(batch, name) for name in names}
            arrays = {name: array for name, array in given.items() if array is not None}
            arrays["place"] = place
            if batch.captions is not None:
                if (most := config.data.caption_chunks) > 1:
                    arrays["ids"] = text.chunked(tokenizers, batch.captions, most)
                else:
                    arrays["ids"] = np.stack([tokenizer(batch.captions)[0] for tokenizer in tokenizers], axis=1)
            if cache is not None:
                arrays["moments"] = cache.moments[batch.indices]
            if xl is not None and batch.empty is not None:
                frames = np.asarray(batch.frames if cache is None else cache.frames[batch.indices])
                target = np.full((config.batch_size, 2), side if cut is None else cut.shape(int(batch.indices[0])))
                arrays["time_ids"] = np.concatenate([frames, target], axis=1).astype(np.float32)
                arrays["is_zero"] = batch.empty & xl.zeroes_empty
            yield microbatches(arrays, config.optimizer.accumulate, self.devices)

    def _objective(self) -> objective.Objective:
        config, modules = self.config, self.networks.modules
        if config.task == "vae":
            return objective.reconstruction(modules, config.reconstruction)
        if rank := config.lora.rank:
            modules = modules | {name: lora.adapted(modules[name], rank) for name in self.state.params}
        return objective.denoising(
            modules,
            Schedule.from_config(self.networks.scheduler),
            config.diffusion,
            scaling_factor=VAEConfig.from_dict(self.networks.configs["vae"]).scaling_factor,
            batch_size=config.batch_size,
            text_encoders=self.networks.text_encoders,
            is_xl=self.networks.xl is not None,
            inpaints=self.networks.inpaints,
            edits=self.networks.edits,
        )

    def _fetch(self, state: State) -> None:
        """Take the state of all devices for the run's, which is let go of first: it is as large."""
        self.state = State(np.zeros((), np.int32), {}, {}, ())
        # A copy, as the next step is given the device's; of a shard, as leaf[0] would be compiled for each shape.
        found = jax.tree.map(lambda leaf: np.array(leaf.addressable_shards[0].data)[0, ...], state)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            if not np.isfinite(leaf).all():
                name = jax.tree_util.keystr(path, simple=True, separator=" ")
                raise FloatingPointError(f"{name} is not finite after step {found.step}")
        self.state = found

    def _save(self) -> None:
        if int(self.state.step):
            self.checkpoints.save(self.state)


def check_output(folder: Path) -> None:
    """Raise TrainConfigError where a run's folder is none, or cannot be made."""
    whole = folder.absolute()
    there = next(path for path in (whole, *whole.parents) if path.exists())
    if not there.is_dir():
        raise TrainConfigError(f"output is {folder}, and {there} is no folder")


def check_replaceable(folder: Path, config: Train) -> None:
    """Raise TrainConfigError where an export into `folder` would take away something other than what it writes."""
    what, is_one = {
        "model": ("model", lambda: (folder / "model_index.json").exists()),
        "lora": ("LoRA", lambda: (folder / lora.FILE).exists()),
        "controlnet": ("ControlNet", lambda: controlnet.is_one(folder)),
    }[config.result]
    if folder.is_dir() and (not any(folder.iterdir()) or is_one()):
        return
    if folder.exists():
        raise TrainConfigError(f"{folder} holds something other than a {what}; name another folder")
