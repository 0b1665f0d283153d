"""Named streams: repeatable, independent, and silent toward the global state."""

import random

import numpy as np
import torch

from mia_utils import seeds


def test_a_stream_repeats_and_its_neighbors_differ():
    draw = lambda *names: seeds.rng(0, *names).random(4)  # noqa: E731
    assert np.array_equal(draw("partcrop", "a"), draw("partcrop", "a"))
    others = [draw("partcrop", "b"), draw("encodermi", "a"), seeds.rng(1, "partcrop", "a").random(4)]
    assert all(not np.array_equal(draw("partcrop", "a"), other) for other in others)


def test_names_are_not_glued_together():
    assert seeds.derive(0, "ab", "c") != seeds.derive(0, "a", "bc")


def test_a_known_stream_stays_what_it_was():
    assert seeds.derive(0, "partcrop", "train/1.png") == 4791977469040547774


def test_nothing_touches_the_global_state():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    torch.rand(3, generator=seeds.generator(0, "x")), seeds.rng(0, "x").random(3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1]) and before[2] == random.getstate()
