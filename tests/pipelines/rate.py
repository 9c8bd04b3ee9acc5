"""The job's images/s beside those of `generate` on the same prompts: python -m tests.pipelines.rate

Each round takes both, in turns, with one model and its compiled programs; the ratio to quote is the rounds' median.
"""

import argparse
import functools
import statistics
import tempfile
import time

from pipelines import generate_images
from pipelines.storage import Store
from sdjax.generate import StableDiffusion
from sdjax.parts import BUNDLED
from sdjax.request import Request


@functools.cache
def pipe_of(model: str, batch_size: int) -> StableDiffusion:
    """One model, and its compiled programs, for both."""
    return StableDiffusion.from_pretrained(model, batch_size=batch_size)


def load(*_: object, model: str, batch_size: int, **__: object) -> StableDiffusion:
    from tests.pipelines import rate  # Beam copies what is in __main__

    return rate.pipe_of(model, batch_size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.pipelines.rate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=BUNDLED)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    prompts = [f"a red circle above a blue square number {i}" for i in range(options.images)]
    pipe = load(model=options.model, batch_size=options.batch_size)
    requests = [Request(prompt=prompt, num_inference_steps=options.steps) for prompt in prompts]
    pipe.generate(requests[: options.batch_size])
    ratios = []
    for number in range(options.rounds):
        began = time.perf_counter()
        made = sum(1 for _ in pipe.stream(requests))
        alone = made / (time.perf_counter() - began)
        job = of_the_job(prompts, options)
        ratios.append(job / alone)
        print(f"round {number}: generate {alone:.2f} images/s, the job {job:.2f}, {ratios[-1]:.3f}", flush=True)
    print(f"{len(prompts)} images; the median of the ratios is {statistics.median(ratios):.3f}")


def of_the_job(prompts: list[str], options: argparse.Namespace) -> float:
    """Images a second from the first unit's beginning to the last one's manifest."""
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/prompts.txt", "w", encoding="utf-8") as file:
            file.writelines(f"{prompt}\n" for prompt in prompts)
        arguments = ["--prompts", file.name, "--output", f"{folder}/out", "--model", options.model]
        arguments += ["--batch-size", str(options.batch_size), "--num-inference-steps", str(options.steps)]
        loads = functools.partial(load, model=options.model, batch_size=options.batch_size)
        if generate_images.main(arguments, load=loads) != 0:
            raise SystemExit("the job failed")
        return Store(f"{folder}/out").read_json("summary.json")["images_per_second"]


if __name__ == "__main__":
    main()
