"""steering_planes.calibration: each rule of METHOD.md 3, and the whole against a second writing."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import calibration_oracle
from steering_planes.artifact import Extraction, Plane
from steering_planes.calibration import (
    Calibration,
    CalibrationError,
    NothingSelectedError,
    Options,
    SiteStatistics,
    auroc,
    calibrate,
    discriminative_sites,
    feature_direction,
    first_component,
    format_confounds,
    separation,
)
from steering_planes.geometry import orthonormality_error
from steering_planes.sites import Selection, Site

WIDTH = 12
Activations = dict[Site, Tensor]


def vector(*entries: float, width: int = WIDTH) -> Tensor:
    """The entries given, then zeros."""
    return torch.tensor([*entries, *[0.0] * (width - len(entries))], dtype=torch.float64)


def around(mean: Tensor, n: int = 40, spread: float = 0.1, seed: int = 0) -> Tensor:
    """[n, d] rows whose mean is exactly `mean`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, len(mean), generator=generator, dtype=torch.float64) * spread
    return mean + noise - noise.mean(0)


def model(seed: int = 0, layers: int = 6) -> tuple[Activations, Activations]:
    """Two classes at two sites a layer: alike in the lower layers, opposite in the upper ones."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
    positive: Activations = {}
    negative: Activations = {}
    for index, site in enumerate(
        Site(layer, role) for layer in range(layers) for role in ("attn_in", "mlp_in")
    ):
        drift = torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        half = (feature + 0.5 * drift) * (0.2 + 0.1 * index)
        offset = feature * 0.4 * (2.6 - site.layer)
        positive[site] = around(offset + half, n=30, spread=1.0, seed=2 * index)
        negative[site] = around(offset - half, n=25, spread=1.0, seed=2 * index + 1)
    return positive, negative


def written_again(
    positive: Mapping[Site, Tensor], negative: Mapping[Site, Tensor], options: Options
) -> dict[Site, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """METHOD.md 3 a second time, in numpy and without a look at the first."""
    sites = sorted(positive)
    p = {s: positive[s].numpy().astype(np.float64) for s in sites}
    q = {s: negative[s].numpy().astype(np.float64) for s in sites}
    raw = {s: p[s].mean(axis=0) - q[s].mean(axis=0) for s in sites}
    kept = [s for s in sites if np.linalg.norm(raw[s]) > 1e-9]
    unit = {s: raw[s] / np.linalg.norm(raw[s]) for s in kept}
    if options.direction == "max_sim":
        score = {s: np.mean([unit[s] @ unit[t] for t in kept]) for s in kept}
    else:
        score = {s: np.linalg.norm(raw[s]) for s in kept}
    best = max(kept, key=lambda s: score[s])
    own = {s: unit[s] if options.planes == "per_site" else unit[best] for s in kept}

    matrix = np.stack([unit[s] for s in kept])
    covariance = np.cov(matrix, rowvar=False)
    pc1 = np.linalg.eigh(covariance)[1][:, -1]

    def projected(x: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ b
        return result

    def passes(s: Site) -> bool:
        a, b = projected(p[s], own[s]), projected(q[s], own[s])
        se = [x.std(ddof=1) / np.sqrt(len(x)) for x in (a, b)]
        return bool(
            a.mean() * b.mean() < 0
            and abs(a.mean()) >= options.margin * se[0]
            and abs(b.mean()) >= options.margin * se[1]
        )

    good = {s for s in kept if passes(s)}
    if options.granularity == "layer":
        good = {s for s in good if all(t in good for t in sites if t.layer == s.layer)}
    b2 = {s: pc1 - (pc1 @ own[s]) * own[s] for s in sorted(good)}
    b2 = {s: v / np.linalg.norm(v) for s, v in b2.items()}
    if sum(projected(q[s], v).mean() for s, v in b2.items()) < 0:
        b2 = {s: -v for s, v in b2.items()}
    return {s: (own[s], v) for s, v in b2.items()}


@pytest.mark.parametrize("direction", ["max_sim", "max_norm"])
@pytest.mark.parametrize("planes", ["global", "per_site"])
@pytest.mark.parametrize("granularity", ["layer", "site"])
@pytest.mark.parametrize("margin", [0.0, 3.0])
def test_agrees_with_a_second_writing(
    direction: Any, planes: Any, granularity: Any, margin: float
) -> None:
    options = Options(direction, planes, granularity, margin)
    for seed in range(5):
        positive, negative = model(seed)
        expected = written_again(positive, negative, options)
        got = calibrate(positive, negative, options)
        assert got.sites == tuple(expected)
        assert 0 < len(got.sites) < len(positive)
        for site, (b1, b2) in expected.items():
            np.testing.assert_allclose(got.bases[site][0], b1, atol=1e-6)
            np.testing.assert_allclose(got.bases[site][1], b2, atol=1e-6)


def test_bases_are_float32_and_orthonormal() -> None:
    for planes in ("global", "per_site"):
        for basis in calibrate(*model(), Options(planes=planes)).bases.values():  # type: ignore[arg-type]
            assert basis.dtype == torch.float32
            assert orthonormality_error(basis) < 1e-6


def test_activations_of_any_float_type_serve() -> None:
    positive, negative = model()
    halves = [{s: x.bfloat16() for s, x in side.items()} for side in (positive, negative)]
    for site, basis in calibrate(*halves).bases.items():
        assert float(basis[0] @ calibrate(positive, negative).bases[site][0]) > 0.999


def test_degrees_grow_from_the_positive_class() -> None:
    """b1 points at the positive class, so 0 degrees does."""
    positive, negative = model()
    result = calibrate(positive, negative)
    for site in result.sites:
        difference = positive[site].mean(0) - negative[site].mean(0)
        assert float(result.bases[site][0].double() @ difference) > 0
        assert result.statistics[site].mean_positive > 0 > result.statistics[site].mean_negative


# Step 3: candidates.

A, B = Site(0, "attn_in"), Site(0, "mlp_in")
C, D = Site(1, "attn_in"), Site(1, "mlp_in")


def contrast(halves: Mapping[Site, Tensor], offset: float = 0.0) -> tuple[Activations, Activations]:
    """Classes at +half and -half of each site, both moved by offset along the half."""
    return (
        {s: around((1 + offset) * h, seed=2 * i) for i, (s, h) in enumerate(halves.items())},
        {s: around((offset - 1) * h, seed=2 * i + 1) for i, (s, h) in enumerate(halves.items())},
    )


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-6])
def test_a_site_without_contrast_is_dropped_with_its_layer(noise: float) -> None:
    positive, negative = contrast({B: vector(1, 0.1), C: vector(1, 0, 0.2), D: vector(1, 0.1, 0.1)})
    same = around(vector(0, 5, 5))
    positive[A], negative[A] = same, same + noise
    result = calibrate(positive, negative)
    assert result.dropped == (A,)
    assert A not in result.statistics
    assert result.sites == (C, D)
    assert calibrate(positive, negative, Options(granularity="site")).sites == (B, C, D)
    # The noise has a direction like any other: kept in, it would have turned PC1.
    del positive[A], negative[A]
    without = calibrate(positive, negative)
    for site in result.sites:
        torch.testing.assert_close(result.bases[site], without.bases[site])


def test_candidates_count_by_direction_not_by_length() -> None:
    short = {
        A: vector(1, 0.1),
        B: vector(1, 0, 0.2),
        C: vector(1, 0, 0, 0.3),
        D: vector(1, 0.1, 0.1),
    }
    scaled = {site: half * 10**i for i, (site, half) in enumerate(short.items())}
    one, other = calibrate(*contrast(short)), calibrate(*contrast(scaled))
    assert one.feature_site == other.feature_site
    torch.testing.assert_close(one.bases[A], other.bases[A])


# Step 4: the feature direction.


def test_max_sim_takes_the_one_most_like_all_others() -> None:
    candidates = {A: vector(1), B: vector(0.6, 0.8), C: vector(0, 1)}
    lengths = {A: 1.0, B: 1.0, C: 9.0}
    assert feature_direction(candidates, lengths, "max_sim") == B
    assert feature_direction(candidates, lengths, "max_norm") == C


def test_the_direction_of_all_sites_is_the_chosen_one() -> None:
    halves = {A: vector(1), B: vector(0.6, 0.8), C: vector(0, 3), D: vector(0.6, 0.7, 0.1)}
    result = calibrate(*contrast(halves), Options(direction="max_norm", granularity="site"))
    assert result.feature_site == C
    for basis in result.bases.values():
        torch.testing.assert_close(basis[0], vector(0, 1).float())


# Step 5: the plane.


def test_pc1_is_mean_centred() -> None:
    """Off centre, the first component would be the candidates' mean itself."""
    candidates = {
        s: v / v.norm()
        for s, v in {
            A: vector(1, 0.2),
            B: vector(1, -0.2),
            C: vector(1, 0, 0.1),
            D: vector(1, 0, -0.1),
        }.items()
    }
    pc1, share = first_component(candidates)
    assert abs(float(pc1[1])) == pytest.approx(1.0)
    assert share == pytest.approx(0.8, abs=0.01)


def test_per_site_planes_have_their_own_b1_and_share_pc1() -> None:
    halves = {A: vector(1, 0.2), B: vector(1, -0.3), C: vector(1, 0, 0.1), D: vector(1, 0, -0.1)}
    result = calibrate(*contrast(halves), Options(planes="per_site"))
    for site, half in halves.items():
        torch.testing.assert_close(result.bases[site][0], (half / half.norm()).float())
    signs = {bool(basis[1, 1] > 0) for basis in result.bases.values()}
    assert len(signs) == 1


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_negative_class_has_c2_of_0_or_more(side: float) -> None:
    positive, negative = contrast(
        {A: vector(1, 0.2), B: vector(1, -0.2), C: vector(1, 0, 0.1), D: vector(1, 0, -0.1)}
    )
    for activations in (positive, negative):
        for site in activations:
            activations[site] = activations[site] + side * vector(0, 1.5)
    result = calibrate(positive, negative)
    assert len(result.sites) == 4
    for site in result.sites:
        assert float(negative[site].mean(0) @ result.bases[site][1].double()) > 0
    assert float(result.bases[A][1, 1]) == pytest.approx(side, abs=0.01)


def test_the_sign_goes_by_the_selected_sites_alone() -> None:
    """A layer that isn't steered has no say in which way the angle turns."""
    halves = {A: vector(1, 0.2), B: vector(1, -0.2), C: vector(1, 0, 0.1), D: vector(1, 0, -0.1)}
    positive, negative = contrast(halves)
    for activations in (positive, negative):
        for site in (A, B):  # on one side of 0, and far off along -PC1
            activations[site] = activations[site] + vector(3, -9)
        for site in (C, D):
            activations[site] = activations[site] + vector(0, 0.5)
    result = calibrate(positive, negative)
    assert result.sites == (C, D)
    assert float(result.bases[C][1, 1]) > 0.9


def test_the_convention_is_stored() -> None:
    config = named(calibrate(*model())).config
    assert "negative class's mean c2 over the selected sites is >= 0" in config.angle_convention
    assert "b1" in config.angle_convention


# Where the classes lie in the plane.


@pytest.mark.parametrize("planes", ["global", "per_site"])
def test_the_class_means_agree_with_a_second_writing(planes: Any) -> None:
    positive, negative = model(3)
    result = calibrate(positive, negative, Options(planes=planes))
    assert tuple(result.means) == result.sites
    p, q = (
        {(s.layer, s.role): x.numpy() for s, x in side.items()} for side in (positive, negative)
    )
    bases = {(s.layer, s.role): basis.double().numpy() for s, basis in result.bases.items()}
    means, rho = calibration_oracle.class_means(p, q, bases)
    for site, of in result.means.items():
        key = (site.layer, site.role)
        np.testing.assert_allclose([of.positive, of.negative], means[key], rtol=1e-6, atol=1e-7)
        assert of.rho == pytest.approx(rho[key], rel=1e-6)


@pytest.mark.parametrize("planes", ["global", "per_site"])
def test_the_class_means_differ_by_the_difference_of_the_classes(planes: Any) -> None:
    positive, negative = model(3)
    result = calibrate(positive, negative, Options(planes=planes))
    for site, of in result.means.items():
        difference = positive[site].mean(0) - negative[site].mean(0)
        gaps = np.subtract(of.positive, of.negative)
        expected = result.bases[site].double() @ difference
        np.testing.assert_allclose(gaps, expected, rtol=1e-5, atol=1e-6)
        assert of.rho == pytest.approx(result.statistics[site].difference_norm, rel=1e-6)
        if planes == "per_site":
            # b1 is the difference's own direction.
            np.testing.assert_allclose(gaps, [of.rho, 0], rtol=1e-5, atol=1e-6)
        else:
            assert 0 < gaps[0] < of.rho * (1 + 1e-6)


def test_the_class_means_are_of_raw_activations() -> None:
    """Ten times the activations, ten times the means; the statistics are of unit-length ones."""
    positive, negative = model()
    one = calibrate(positive, negative)
    ten = calibrate(*({s: 10 * x for s, x in side.items()} for side in (positive, negative)))
    for site, of in one.means.items():
        there = ten.means[site]
        np.testing.assert_allclose(there.positive, np.multiply(10, of.positive), rtol=1e-5)
        np.testing.assert_allclose(there.negative, np.multiply(10, of.negative), rtol=1e-5)
        assert there.rho == pytest.approx(10 * of.rho, rel=1e-6)
        mean = one.statistics[site].mean_positive
        assert ten.statistics[site].mean_positive == pytest.approx(mean)


# Step 6: discriminative sites.


def test_projections_are_of_unit_length_samples() -> None:
    """One long activation doesn't outvote forty others."""
    positive, negative = contrast({A: vector(1, 0.1), B: vector(1, -0.1), C: vector(1, 0, 0.1)})
    negative[A] = torch.cat((negative[A], vector(60)[None]))
    assert float(negative[A].mean(0)[0]) > 0
    result = calibrate(positive, negative, Options(granularity="site"))
    assert A in result.sites
    assert result.statistics[A].mean_negative == pytest.approx(-39 / 41, abs=0.1)


def of(mean_positive: float, mean_negative: float, error: float = 0.01) -> SiteStatistics:
    return SiteStatistics(mean_positive, mean_negative, error, error, 1.0)


def test_only_opposite_signs_discriminate() -> None:
    assert of(0.1, -0.1).discriminates(0)
    assert of(-0.1, 0.1).discriminates(0)
    assert not of(0.1, 0.3).discriminates(0)
    assert not of(-0.1, -0.3).discriminates(0)
    assert not of(0.1, 0.0).discriminates(0)


def test_the_margin_holds_on_both_sides() -> None:
    # Qwen2.5-7B's layer 14: selected by SS's code however close one mean is to 0.
    assert of(0.076, -0.003, 0.002).discriminates(1.5)
    assert not of(0.076, -0.003, 0.002).discriminates(2)
    assert not of(0.003, -0.076, 0.002).discriminates(2)
    assert of(0.076, -0.076, 0.002).discriminates(38)


def test_a_layer_passes_whole_or_not_at_all() -> None:
    statistics = {A: of(0.1, -0.1), B: of(0.1, 0.1), C: of(0.1, -0.1), D: of(0.1, -0.1)}
    assert discriminative_sites(statistics, (A, B, C, D), Options()) == (C, D)
    by_site = Options(granularity="site")
    assert discriminative_sites(statistics, (A, B, C, D), by_site) == (A, C, D)
    del statistics[D]
    assert discriminative_sites(statistics, (A, B, C, D), Options()) == ()
    assert discriminative_sites(statistics, (A, B, C), Options()) == (C,)


def test_the_margin_is_in_standard_errors() -> None:
    positive, negative = model()
    sites = [calibrate(positive, negative, Options(margin=m)).sites for m in (0.0, 3.0)]
    assert set(sites[1]) < set(sites[0])
    statistics = calibrate(positive, negative).statistics[sites[0][0]]
    projected = (
        torch.nn.functional.normalize(positive[sites[0][0]], dim=1)
        @ calibrate(positive, negative).bases[sites[0][0]][0].double()
    )
    error = float(projected.std()) / math.sqrt(len(projected))
    assert statistics.stderr_positive == pytest.approx(error, rel=1e-4)


def test_per_site_planes_are_selected_by_their_own_direction() -> None:
    # At A the classes lie apart along its own candidate, and on one side of 0 along the others'.
    halves = {A: vector(0.1, 1), B: vector(1, 0.1), C: vector(1, 0, 0.1), D: vector(1, 0, -0.1)}
    positive, negative = contrast(halves)
    for activations in (positive, negative):
        activations[A] = activations[A] + vector(0.9, -0.09)
    everywhere = Options(granularity="site")
    assert A not in calibrate(positive, negative, everywhere).sites
    assert A in calibrate(positive, negative, replace(everywhere, planes="per_site")).sites


# Refusals: never steer everything, never guess.


def test_no_discriminative_site_is_refused() -> None:
    halves = {A: vector(1, 0.1), B: vector(1, 0, 0.2)}
    with pytest.raises(CalibrationError, match=r"no layer discriminates with margin 0"):
        calibrate(*contrast(halves, offset=3.0))
    with pytest.raises(CalibrationError, match=r"no site discriminates with margin 1e\+06"):
        calibrate(*contrast(halves), Options(margin=1e6, granularity="site"))


def test_classes_that_are_the_same_are_refused() -> None:
    x = {A: around(vector(1)), B: around(vector(2))}
    with pytest.raises(CalibrationError, match="same mean activation at every site"):
        calibrate(x, x)


def test_candidates_of_one_direction_are_refused() -> None:
    with pytest.raises(CalibrationError, match="no second axis"):
        calibrate(*contrast({A: vector(1)}))
    with pytest.raises(CalibrationError, match="no second axis"):
        calibrate(*contrast({A: vector(1), B: vector(2)}))


def test_candidates_on_one_line_are_refused() -> None:
    """d and -d differ, but only along d."""
    positive, negative = contrast({A: vector(1), B: vector(-1)})
    with pytest.raises(CalibrationError, match="span no plane"):
        calibrate(positive, negative)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda p, n: (p.clear(), n.clear()), "no sites"),
        (lambda p, n: n.pop(B), r"only one class has activations at 0\.mlp_in"),
        (lambda p, n: p.update({A: p[A][:1]}), r"positive activations at 0\.attn_in .*\[1, 12\]"),
        (lambda p, n: n.update({B: n[B][:, :5]}), r"negative .* 0\.mlp_in .*\[40, 5\].*\[n, 12\]"),
        (lambda p, n: n.update({B: n[B].mean(0)}), r"shape \[12\]"),
        (
            lambda p, n: n[B].fill_(math.nan),
            r"negative activations at 0\.mlp_in are not all finite",
        ),
    ],
)
def test_malformed_activations_are_refused(change: Any, rule: str) -> None:
    positive, negative = contrast({A: vector(1, 0.1), B: vector(1, 0, 0.2)})
    change(positive, negative)
    with pytest.raises(CalibrationError, match=rule):
        calibrate(positive, negative)


@pytest.mark.parametrize("margin", [-1.0, math.nan, math.inf])
def test_a_margin_is_a_number_of_errors(margin: float) -> None:
    with pytest.raises(ValueError, match="margin="):
        Options(margin=margin)


# The result as a plane.


def named(calibration: Calibration) -> Plane:
    return calibration.to_plane(
        name="mood",
        base_model_name_or_path="some-org/model",
        model_type="llama",
        num_layers=6,
        extraction=Extraction(method=str(calibration.options), data="mood.json", n=25),
    )


def test_it_becomes_a_plane() -> None:
    result = calibrate(*model())
    plane = named(result)
    assert plane.sites == result.sites
    assert plane.config.hidden_size == WIDTH
    assert set(plane.config.statistics) == {str(site) for site in result.statistics}
    first = str(result.sites[0])
    mean = result.statistics[result.sites[0]].mean_positive
    assert plane.config.statistics[first]["mean_positive"] == mean
    assert "max_sim" in plane.config.extraction.method
    assert plane.config.format_version == 2
    assert plane.means == result.means


def test_calibrating_twice_gives_the_same_plane() -> None:
    assert named(calibrate(*model())).digest == named(calibrate(*model())).digest


# Format confounds.

TOPICS = ["cats", "rivers and lakes", "the moon", "a house", "bread", "trains at night", "snow"]


def test_the_same_form_on_both_sides_is_no_confound() -> None:
    positive = [f"Tell me about {topic}." for topic in TOPICS]
    negative = [f"Tell me about {topic}." for topic in reversed(TOPICS)]
    assert format_confounds(positive, negative) == []
    assert format_confounds(TOPICS, TOPICS[:3]) == []


@pytest.mark.parametrize(
    ("form", "warning"),
    [
        ("Please respond to {}", "100% of the positive and 0% of the negative prompts begin with"),
        ("{} in one short sentence", "end with 'one short sentence'"),
        ("{}?", r"have the last character '\?'"),
        (
            "{}" + " and so on" * 9,
            r"positive prompts have 28\.\d words on average, negative ones 1\.\d",
        ),
    ],
)
def test_a_wrapper_around_one_side_is_noticed(form: str, warning: str) -> None:
    wrapped = [form.format(topic) for topic in TOPICS]
    assert any(
        pytest.importorskip("re").search(warning, w) for w in format_confounds(wrapped, TOPICS)
    )
    assert format_confounds(wrapped, wrapped) == []


def test_auroc_is_the_chance_of_the_right_order() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0])
    assert auroc(scores + 3, scores) == 1.0
    assert auroc(scores, scores + 3) == 0.0
    assert auroc(scores, scores) == 0.5
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5


def test_separation_is_measured_on_what_the_direction_has_not_seen() -> None:
    """In noise a direction separates the examples that made it, and no others."""
    site = Site(0, "mlp_in")
    generator = torch.Generator().manual_seed(0)

    def noise() -> Activations:
        return {site: torch.randn(40, 400, generator=generator, dtype=torch.float64)}

    positive, negative = noise(), noise()
    direction = positive[site].mean(0) - negative[site].mean(0)
    seen = auroc(positive[site] @ direction, negative[site] @ direction)
    assert seen > 0.95
    assert 0.2 < separation(positive, negative, Options(), 5)[site] < 0.8
    shifted = {site: positive[site] + direction * 3}
    assert separation(shifted, negative, Options(), 5)[site] > 0.95


def test_too_few_examples_are_not_held_out() -> None:
    positive, negative = model()
    few = [{site: x[:9] for site, x in side.items()} for side in (positive, negative)]
    assert separation(few[0], few[1], Options(), 5) == {}


# Directions of other kinds, and sites chosen by hand.


def test_the_mean_direction_is_the_candidates_mean() -> None:
    positive, negative = model()
    found = calibrate(positive, negative, Options(direction="mean", granularity="site"))
    mean = torch.stack(list(found.candidates.values())).mean(0)
    for basis in found.bases.values():
        assert float(basis[0].double() @ mean) == pytest.approx(float(mean.norm()), rel=1e-6)
    assert found.feature_site is None


@pytest.mark.parametrize("planes", ["global", "per_site"])
def test_a_random_plane_is_the_null_at_the_published_sites(planes: Any) -> None:
    positive, negative = model()
    real = calibrate(positive, negative, Options(planes=planes))
    null = calibrate(positive, negative, Options(planes=planes, direction="random", seed=5))
    assert null.sites == real.sites
    first = [basis[0] for basis in null.bases.values()]
    assert torch.equal(first[0], first[1]) == (planes == "global")
    for site, basis in null.bases.items():
        assert orthonormality_error(basis) <= 1e-6
        assert torch.equal(null.directions[site].float(), basis[0])
        # rho stays the classes' distance, wherever the plane lies.
        assert null.means[site].rho == real.means[site].rho
    again = calibrate(positive, negative, Options(planes=planes, direction="random", seed=5))
    other = calibrate(positive, negative, Options(planes=planes, direction="random", seed=6))
    site = null.sites[0]
    assert torch.equal(again.bases[site], null.bases[site])
    assert not torch.equal(other.bases[site], null.bases[site])
    assert "random" in str(null.options)
    assert "seed 5" in str(null.options)


def test_a_random_direction_separates_as_chance_does() -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.zeros(64)
    shift[0] = 4.0
    positive = {A: torch.randn(200, 64, generator=generator) + shift}
    negative = {A: torch.randn(200, 64, generator=generator) - shift}
    null = separation(positive, negative, Options(direction="random", seed=1), 5)
    assert separation(positive, negative, Options(), 5)[A] > 0.99
    assert 0.2 < null[A] < 0.95


def test_sites_may_be_chosen_by_hand() -> None:
    positive, negative = model()
    chosen = Options(sites=Selection.parse("0.attn_in, 1"))
    found = calibrate(positive, negative, chosen)
    assert found.sites == Selection.parse("0.attn_in 1").among(tuple(positive))
    assert str(chosen).endswith("sites 0.attn_in 1 chosen by hand")
    with pytest.raises(CalibrationError, match="layer 99 is not among"):
        calibrate(positive, negative, Options(sites=Selection.parse("99")))


def test_a_site_without_contrast_can_not_be_chosen() -> None:
    positive, negative = model()
    positive[A] = negative[A] = torch.ones(len(positive[A]), positive[A].shape[1])
    with pytest.raises(CalibrationError, match=f"do not differ at {A}"):
        calibrate(positive, negative, Options(sites=Selection.parse(str(A))))


def test_where_nothing_discriminates_the_error_says_what_would() -> None:
    """Each site contrasts along its own axis; on another's both classes lie on one side."""
    axes = torch.eye(8)
    noise = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    positive, negative = (
        {
            site: sign * axes[i] + 3 * axes[7] + 0.2 * axes[:4].sum(0) - 0.2 * axes[i] + noise
            for i, site in enumerate((A, B, C, D))
        }
        for sign in (1, -1)
    )
    with pytest.raises(NothingSelectedError, match="no layer discriminates") as caught:
        calibrate(positive, negative, Options())
    assert "--planes per_site finds 4 sites" in str(caught.value)
    measured = caught.value.calibration
    assert measured.sites == ()
    assert set(measured.statistics) == {A, B, C, D}
    found = calibrate(positive, negative, Options(planes="per_site"))
    assert found.sites == (A, B, C, D)
