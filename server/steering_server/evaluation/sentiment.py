"""What a sentiment plane does: mean VADER score and 4-gram repetition of steered text, by angle.

`python -m steering_server.evaluation.sentiment MODEL PLANE PROMPTS` generates with transformers
and forward hooks, greedily and in fp32, and prints a Markdown table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from steering_planes.artifact import Plane
from steering_planes.examples import load_prompts


def mean_compound(texts: Sequence[str]) -> float:
    """Mean VADER compound score, -1 (negative) to 1 (positive); Hutto and Gilbert 2014.

    Needs vaderSentiment. Raises ValueError if there are no texts.
    """
    from vaderSentiment.vaderSentiment import (  # type: ignore[import-untyped]
        SentimentIntensityAnalyzer,
    )

    if not texts:
        raise ValueError("there are no texts to score")
    analyzer = SentimentIntensityAnalyzer()
    scores = [float(analyzer.polarity_scores(text)["compound"]) for text in texts]
    return sum(scores) / len(scores)


def ngram_repetition(text: str, n: int = 4) -> float:
    """Share of a text's word n-grams that occurred before in it, 0..1; 0 for fewer than n words."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_repetition(texts: Sequence[str], n: int = 4) -> float:
    """Mean `ngram_repetition`; raises ValueError if there are no texts."""
    if not texts:
        raise ValueError("there are no texts to score")
    return sum(ngram_repetition(text, n) for text in texts) / len(texts)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, with average ranks for ties; nan if one side is constant."""
    rx, ry = _ranks(x), _ranks(y)
    rx, ry = rx - rx.mean(), ry - ry.mean()
    scale = float(np.sqrt((rx @ rx) * (ry @ ry)))
    return float(rx @ ry) / scale if scale else float("nan")


def _ranks(values: Sequence[float]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    result: np.ndarray[Any, np.dtype[np.float64]] = (last - (counts - 1) / 2)[inverse]
    return result


def sweep(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder.")],
    plane: Annotated[Path, typer.Argument(help="A plane's folder.")],
    prompts: Annotated[Path, typer.Argument(help='JSONL of {"prompt": ...} lines.')],
    angles: Annotated[str, typer.Option(help="Degrees, comma-separated.")] = (
        "0,30,60,90,120,150,180,210,240,270,300,330"
    ),
    max_tokens: Annotated[int, typer.Option(min=1)] = 48,
) -> None:
    """Print mean sentiment and repetition of the plane's default mode at every angle."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from steering_server.evaluation.generation import generate

    loaded = Plane.load(plane)
    asked = load_prompts(prompts)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    typer.echo(f"| {loaded.config.default_mode} | mean VADER compound | 4-gram repetition |")
    typer.echo("|---|---|---|")
    degrees = [float(angle) for angle in angles.split(",")]
    scores = []
    for angle in (None, *degrees):
        texts = generate(
            network, tokenizer, asked, max_tokens=max_tokens, plane=loaded, angle=angle
        )
        scores.append(mean_compound(texts))
        label = "unsteered" if angle is None else f"{angle:g}°"
        typer.echo(f"| {label} | {scores[-1]:+.2f} | {mean_repetition(texts):.3f} |")
    half = [(a, score) for a, score in zip(degrees, scores[1:], strict=True) if 0 <= a <= 180]
    rho = spearman([a for a, _ in half], [score for _, score in half])
    typer.echo(f"\nSpearman correlation of angle and score over 0..180°: {rho:+.2f}.")


if __name__ == "__main__":
    typer.run(sweep)
