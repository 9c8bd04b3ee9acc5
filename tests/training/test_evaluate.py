"""The measurement of a model: what it asks for is held out, and what it counts is what the checker says."""

import contextlib

import numpy as np
import pytest
from PIL import Image

from sdjax.generate import Result
from sdjax.training import evaluate, scenes


class Painter:
    """Stands in for a model: paints the scene that was asked for, but for every `miss`th, which stays empty."""

    def __init__(self, asked, miss):
        self._scenes, self._miss = [scene for scene, _ in asked], miss

    def stream(self, requests):
        for number, request in enumerate(requests):
            assert request.seed == number
            pixels = scenes.draw(self._scenes[number])
            yield Result(request, "", np.full_like(pixels, pixels[0, 0]) if number % self._miss == 0 else pixels)


def test_what_is_asked_is_held_out_and_repeatable():
    asked = evaluate.held_out(60)
    assert asked == evaluate.held_out(60)
    for scene, caption in asked:
        assert any(scenes.is_held_out(thing.shape, thing.colour, thing.position) for thing in scene.things)
        assert scene.background in caption
    assert len({caption for _, caption in asked}) > 55


@pytest.mark.parametrize("miss", [2, 10])
def test_counts_are_the_checkers(miss):
    asked = evaluate.held_out(100)
    counts, pictures = evaluate.measure(Painter(asked, miss), asked)
    assert len(pictures) == 100
    assert counts.pop("background") == (100, 100)
    singles = [number for number, (scene, _) in enumerate(asked) if len(scene.things) == 1]
    hits = sum(number % miss != 0 for number in singles)
    for fact in ("colour", "shape", "side", "alone"):
        assert counts.pop(fact) == (hits, len(singles))
    for fact in ("pair", "pair shapes", "relation"):
        assert counts.pop(fact) == (100 - 100 // miss - hits, 100 - len(singles))
    assert not counts


def test_a_table_and_a_picture_are_written(monkeypatch, capsys, tmp_path):
    asked = evaluate.held_out(3)
    monkeypatch.setattr(evaluate.StableDiffusion, "from_pretrained", lambda *_, **__: Painter(asked, 10))
    assert evaluate.main(["--captions", "3", "--guidance", "1", "2", "--picture", str(tmp_path / "a.png")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| held-out captions | of | guidance 1 | guidance 2 |"
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 3 * (128 + 8) + 8


@pytest.mark.parametrize(
    "arguments",
    [["--captions", "0"], ["--captions", "x"], ["--picture", "{}/none/a.png"], ["--picture", "{}"]],
)
def test_what_cannot_be_measured_or_kept_is_refused_first(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.StableDiffusion, "from_pretrained", None)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([argument.format(tmp_path) for argument in arguments])
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.parametrize("fault", [None, ConnectionError("the hub is away"), KeyboardInterrupt(), TypeError("ours")])
def test_a_model_that_is_not_there_is_one_line_and_so_is_an_interrupt(capsys, tmp_path, monkeypatch, fault):
    def failing(*_, **__):
        raise fault

    if fault is not None:
        monkeypatch.setattr(evaluate.StableDiffusion, "from_pretrained", failing)
    with pytest.raises(TypeError) if isinstance(fault, TypeError) else contextlib.nullcontext():
        assert evaluate.main(["--model", str(tmp_path)]) == (130 if isinstance(fault, KeyboardInterrupt) else 2)
        assert capsys.readouterr().err.count("\n") == 1
