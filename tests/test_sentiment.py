"""steering_server.evaluation.sentiment: the metrics on texts whose values are known."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from steering_server.evaluation.sentiment import (
    mean_compound,
    mean_repetition,
    ngram_repetition,
    spearman,
)


def test_compound_has_the_sign_of_the_text() -> None:
    assert mean_compound(["What a wonderful, happy day!"]) > 0.5
    assert mean_compound(["A horrible, sad disaster."]) < -0.5
    assert mean_compound(["A horrible, sad disaster.", "Water is wet."]) == pytest.approx(
        mean_compound(["A horrible, sad disaster."]) / 2
    )


@pytest.mark.parametrize(
    ("text", "repetition"),
    [
        ("", 0.0),
        ("a b c", 0.0),
        ("a b c d e f", 0.0),
        ("a a a a a", 0.5),
        ("a b c d a b c d", 1 / 5),
        ("a b  c\nd", 0.0),
    ],
)
def test_repetition_counts_what_came_before(text: str, repetition: float) -> None:
    assert ngram_repetition(text) == pytest.approx(repetition)


def test_repetition_is_a_mean_over_texts() -> None:
    assert mean_repetition(["a a a a a", "a b c d e"]) == pytest.approx(0.25)
    assert ngram_repetition("a b a b", n=2) == pytest.approx(1 / 3)


def test_no_texts_have_no_mean() -> None:
    for mean in (mean_compound, mean_repetition):
        with pytest.raises(ValueError, match="no texts"):
            mean([])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_spearman_is_scipys(pairs: list[tuple[int, int]]) -> None:
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
