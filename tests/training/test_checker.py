"""The checker reads drawn scenes right, and does not call wrong pictures right."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from sdjax.training import checker, scenes


def _facts(count, seed):
    right, total = Counter(), Counter()
    for index in range(count):
        scene = scenes.scene(index, seed, ("train", "heldout")[index % 2])
        for fact, holds in checker.check(scene, checker.read(scenes.draw(scene))).items():
            right[fact] += holds
            total[fact] += 1
    return {fact: right[fact] / total[fact] for fact in total}


def test_drawn_scenes_are_read_right():
    rates = _facts(600, seed=11)
    expected = {"background", "colour", "shape", "side", "alone", "pair", "pair shapes", "relation"}
    assert set(rates) == expected
    assert min(rates.values()) >= 0.99, rates


def test_noise_and_soft_edges_are_forgiven():
    rng = np.random.default_rng(0)
    rates = Counter()
    for index in range(100):
        scene = scenes.scene(index, seed=12)
        pixels = np.clip(scenes.draw(scene) + rng.normal(0, 6, (64, 64, 3)), 0, 255).astype(np.uint8)
        rates[all(checker.check(scene, checker.read(pixels)).values())] += 1
    assert rates[True] >= 97


@pytest.mark.parametrize(
    ("fact", "change"),
    [
        ("colour", lambda thing: {"colour": "pink" if thing.colour != "pink" else "blue"}),
        ("shape", lambda thing: {"shape": "cross" if thing.shape != "cross" else "circle"}),
        ("side", lambda thing: {"x": 1 - thing.x}),
    ],
)
def test_a_wrong_picture_is_called_wrong(fact, change):
    checked = 0
    for index in range(60):
        scene = scenes.scene(index, seed=13)
        thing = scene.things[0]
        other = {"colour": ("pink", "blue"), "shape": (), "side": ()}[fact]
        if len(scene.things) == 2 or scene.background in other or (fact == "side" and abs(thing.x - 0.5) < 0.1):
            continue
        wrong = dataclasses.replace(scene, things=(dataclasses.replace(thing, **change(thing)),))
        facts = checker.check(scene, checker.read(scenes.draw(wrong)))
        assert not facts[fact]
        assert all(holds for name, holds in facts.items() if name != fact)
        checked += 1
    assert checked >= 5


def test_a_swapped_pair_has_the_wrong_relation():
    scene = next(s for s in (scenes.scene(i, seed=14) for i in range(50)) if len(s.things) == 2)
    mirrored = scenes.draw(scene)[::-1, ::-1]
    facts = checker.check(scene, checker.read(mirrored))
    assert facts["pair"]
    assert not facts["relation"]


def test_pictures_without_things():
    scene = scenes.scene(0)
    pixels = np.full((64, 64, 3), scenes.COLOURS["blue"], np.uint8)
    assert checker.read(pixels) == checker.Reading("blue", ())
    assert not any(holds for fact, holds in checker.check(scene, checker.read(pixels)).items() if fact != "background")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert all(thing.shape is None for thing in checker.read(noise).things)
