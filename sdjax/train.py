"""Train the VAE, the UNet or a ControlNet: python -m sdjax.train --config configs/X.toml

A run writes into its output folder: checkpoints/ (from which the same command goes on), run.json (what it is made from:
another is refused), metrics.csv, tensorboard/, sheets/ (pictures of how far it is) and, at its end, model/ (the
averaged weights in the diffusers layout), lora/ or controlnet/.
Ctrl-C writes a checkpoint and stops; a second one stops at once.
"""

import argparse
import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdjax.console import is_out_of_memory, say, says_why
from sdjax.files import folder_here, held
from sdjax.request_options import refuse_empty
from sdjax.training import config as training_config

if TYPE_CHECKING:
    from sdjax.training.loop import Run


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Returns 0 at the end of training, 130 if it was stopped before, 1 if it broke off, 2 if it could not start.
    """
    parser = argparse.ArgumentParser(prog="python -m sdjax.train", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a TOML file; configs/ holds examples")
    parser.add_argument("--output", help="the run's folder, in place of the configuration's")
    parser.add_argument("--init", help="the checkpoint to start from, in place of the configuration's")
    parser.add_argument("--steps", type=int, help="the number of steps, in place of the configuration's")
    parser.add_argument("--export", help="train nothing: write the last checkpoint's model into this folder")
    parser.add_argument("--export-dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    arguments = parser.parse_args(argv)
    with contextlib.ExitStack() as holding:
        try:
            refuse_empty(arguments)
            config = training_config.load(
                arguments.config, output=arguments.output, init=arguments.init, steps=arguments.steps
            )
            # JAX, seconds to import, after what a typing error can spoil.
            from sdjax import compile_cache
            from sdjax.training.loop import Run, check_output, check_replaceable

            compile_cache.use()
            output = folder_here(config.output)
            model = output / config.result if arguments.export is None else folder_here(arguments.export)
            check_replaceable(model, config)  # before the steps that lead to it
            if arguments.export is None:
                check_output(output)
                busy = f"another run is writing to {output}; wait until it has ended, or name another --output"
                is_new = not output.exists()
                holding.enter_context(held(output, busy))  # before its last checkpoint is read
                if is_new:
                    holding.callback(_remove_empty, output)
            run = Run(config)
            if arguments.export is not None:
                run.export(model, arguments.export_dtype)
                return 0
            if int(run.state.step) > config.steps:
                raise ValueError(
                    f"{output} has taken {int(run.state.step)} steps, and steps is {config.steps}; "
                    "--export writes the model that it has come to"
                )
        except KeyboardInterrupt:
            say(parser.prog, "interrupted before the first step")
            return 130
        except Exception as error:
            if not says_why(error):
                raise
            say(parser.prog, error)
            return 2
        return _trained(run, model, arguments.export_dtype, parser.prog)


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a run that could not start."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _trained(run: "Run", model: Path, dtype: str, command: str) -> int:
    """Take the run's steps and write its model; returns the command's exit status."""
    from sdjax.training.samples import DataError

    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask(*_: Any) -> None:
        stop.set()
        for name in signals:  # the second time at once, which may be in the middle of a step
            signal.signal(name, signal.SIG_DFL)

    before = {name: signal.signal(name, ask) for name in signals}
    try:
        if not run.train(stop):
            print(f"stopped at step {int(run.state.step)}; the same command goes on from there", file=sys.stderr)
            return 130
        run.export(model, dtype)
    except Exception as error:
        said: object = error
        if is_out_of_memory(error):
            less = "a larger optimizer.accumulate, remat for a UNet, a smaller batch_size or smaller pictures take less"
            said = f"the devices have too little memory; {less}"
        elif isinstance(error, DataError):
            said = f"{said}; once that is mended, the same command goes on"
        elif not (isinstance(error, FloatingPointError) or says_why(error)):
            raise
        say(command, said)
        return 1
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    return 0


if __name__ == "__main__":
    sys.exit(main())
