"""The bundled plane is a dial: the mood of held-out answers follows the angle."""

from __future__ import annotations

import json
from pathlib import Path

from engines import Engine
from steering_server.evaluation.sentiment import mean_compound, ngram_repetition, spearman

HELD_OUT = Path(__file__).parents[2] / "steering_vectors/contrast_sets/sentiment_heldout.jsonl"
ANGLES = range(0, 181, 30)


def test_mood_follows_the_angle(v1: Engine) -> None:
    prompts = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()]
    assert len(prompts) == 30
    asked = [(prompt, angle) for angle in ANGLES for prompt in prompts]
    fields = [{"steering_plane": "sentiment", "steering_angle": angle} for _, angle in asked]
    answers = v1.chat([prompt for prompt, _ in asked], fields, 48, ignore_eos=False)
    texts = [[a.text for a in answers[i : i + 30]] for i in range(0, len(answers), 30)]
    scores = [mean_compound(of_angle) for of_angle in texts]
    repetition = [sum(map(ngram_repetition, of_angle)) / 30 for of_angle in texts]
    assert scores[0] >= 0.75, scores
    assert scores[-1] <= 0.30, scores
    assert spearman(list(ANGLES), scores) <= -0.9, scores
    assert max(repetition) <= 0.05, repetition
