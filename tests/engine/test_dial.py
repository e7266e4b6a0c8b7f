"""The bundled plane is a dial: the mood of held-out answers follows the angle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines import Engine
from steering_server.evaluation.sentiment import mean_compound, ngram_repetition, spearman

HELD_OUT = Path(__file__).parents[2] / "steering_vectors/contrast_sets/sentiment_heldout.jsonl"
ANGLES = range(0, 181, 30)


@dataclass(frozen=True)
class Sweep:
    """Mean VADER compound and mean 4-gram repetition at each of ANGLES."""

    scores: list[float]
    repetition: list[float]


@pytest.fixture(scope="module")
def sweep(v1: Engine) -> Sweep:
    prompts = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()]
    assert len(prompts) == 30
    asked = [(prompt, angle) for angle in ANGLES for prompt in prompts]
    fields = [{"steering_plane": "sentiment", "steering_angle": angle} for _, angle in asked]
    answers = v1.chat([prompt for prompt, _ in asked], fields, 48, ignore_eos=False)
    texts = [[a.text for a in answers[i : i + 30]] for i in range(0, len(answers), 30)]
    return Sweep(
        [mean_compound(of_angle) for of_angle in texts],
        [sum(map(ngram_repetition, of_angle)) / 30 for of_angle in texts],
    )


def test_mood_follows_the_angle(sweep: Sweep) -> None:
    assert spearman(list(ANGLES), sweep.scores) <= -0.9, sweep
    assert sweep.scores[-1] <= 0.30, sweep
    assert sweep.scores[0] - sweep.scores[-1] >= 0.5, sweep


# Not met yet: +0.74 at 0 degrees, and 0.074 repetition at 90 (the plane's model card).
@pytest.mark.xfail(strict=True, reason="the bundled plane reaches +0.74 and 0.074")
def test_cheerful_is_cheerful_and_text_stays_text(sweep: Sweep) -> None:
    assert sweep.scores[0] >= 0.75, sweep
    assert max(sweep.repetition) <= 0.05, sweep
