"""From activations of two contrast sets to a plane and the sites it discriminates at.

METHOD.md section 3. "SS" is Selective Steering (arXiv 2601.19375), "AS" Angular Steering (arXiv
2510.26243). Everything is computed in float64; a basis is rounded to float32 once, at the end, and
the class means are those on the rounded one.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from typing import Literal, Self

import torch
from torch import Tensor

from steering_planes.artifact import (
    ANGLE_CONVENTION,
    ClassMeans,
    Extraction,
    Mode,
    Plane,
    PlaneConfig,
)
from steering_planes.fingerprint import Fingerprint
from steering_planes.geometry import orthonormalise
from steering_planes.sites import Selection, Site

Activations = Mapping[Site, Tensor]
"""Each example's activation at every site, as a rule its last prompt token's: [n, d] each."""

RANDOM_CONVENTION = "degrees; 0 points along a random b1, growing from b1 toward a random b2"
SIGN_CONVENTION = "b2's sign: the negative class's mean c2 over the selected sites is >= 0"

# Means that differ by less than this share of the activations' own length differ by rounding only.
_DEGENERATE = 1e-4


class CalibrationError(ValueError):
    """The activations give no plane: malformed, without contrast, or nowhere discriminative."""


class NothingSelectedError(CalibrationError):
    """No site discriminates; `calibration` has what was measured, and no bases."""

    def __init__(self, said: str, calibration: "Calibration") -> None:
        super().__init__(said)
        self.calibration = calibration


@dataclass(frozen=True)
class Options:
    """How to calibrate. The defaults are SS's published method.

    direction: the feature direction is the candidate most similar to all others ("max_sim", SS),
        the one with the longest difference ("max_norm", AS), or the candidates' mean ("mean").
        "random" is the null of a study: the sites of "max_sim", and a random plane at them.
    planes: one plane for all sites ("global"), or b1 = a site's own candidate ("per_site").
    granularity: select a layer only if all its sites discriminate ("layer", SS), or site by site.
    margin: how many standard errors both class means must be from 0 (SS: 0).
    sites: chosen by hand, and not by discriminating.
    seed: of random planes.
    """

    direction: Literal["max_sim", "max_norm", "mean", "random"] = "max_sim"
    planes: Literal["global", "per_site"] = "global"
    granularity: Literal["layer", "site"] = "layer"
    margin: float = 0.0
    sites: Selection | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ValueError(f"margin={self.margin}: must be a finite number of 0 or more")

    def __str__(self) -> str:
        found = f"difference of means, {self.direction} direction, PC1, {self.planes} planes"
        if self.direction == "random":
            found = f"random {self.planes} planes (seed {self.seed}) at the sites of max_sim"
        if self.sites is not None:
            return f"{found}, sites {self.sites} chosen by hand"
        return f"{found}, discriminative by {self.granularity} with margin {self.margin:g}"


@dataclass(frozen=True)
class SiteStatistics:
    """Projections of per-sample unit-length activations on b1, and the size of the contrast."""

    mean_positive: float
    mean_negative: float
    stderr_positive: float
    stderr_negative: float
    difference_norm: float
    """|mean(x_pos) - mean(x_neg)|, in the activations' own units."""

    def discriminates(self, margin: float) -> bool:
        """SS Eq. 9, mean_positive * mean_negative < 0, with both means `margin` errors from 0."""
        return (
            self.mean_positive * self.mean_negative < 0
            and abs(self.mean_positive) >= margin * self.stderr_positive
            and abs(self.mean_negative) >= margin * self.stderr_negative
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """A calibrated plane before it has a name.

    bases: [2, d] float32 for every selected site, sorted.
    means: where the classes' raw means lie on these bases, and how far apart.
    statistics: every site that was measured and not dropped.
    directions: what each of them is judged by, b1 [d] float64.
    feature_site: where the feature direction comes from, None if it is no one site's.
    dropped: sites whose class means don't differ.
    explained_variance: PC1's share of the candidates' variance, 0..1.
    candidates: every site's own direction, unit, [d] float64.
    auroc: how well a site separates the classes on held-out examples; empty if not measured.
    """

    bases: Mapping[Site, Tensor]
    means: Mapping[Site, ClassMeans]
    statistics: Mapping[Site, SiteStatistics]
    directions: Mapping[Site, Tensor]
    feature_site: Site | None
    dropped: tuple[Site, ...]
    explained_variance: float
    candidates: Mapping[Site, Tensor]
    options: Options = field(default_factory=Options)
    auroc: Mapping[Site, float] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The selected sites, sorted."""
        return tuple(self.bases)

    def with_separation(self, auroc: Mapping[Site, float]) -> Self:
        """With what :func:`separation` measured."""
        return replace(self, auroc=auroc)

    def to_plane(
        self,
        *,
        name: str,
        base_model_name_or_path: str,
        model_type: str,
        num_layers: int,
        extraction: Extraction,
        revision: str | None = None,
        default_mode: Mode = "rotate_by",
        default_angle: float | None = None,
        gate: float | None = None,
        fingerprint: Fingerprint | None = None,
    ) -> Plane:
        """Name the plane and say what model it is for."""
        config = PlaneConfig(
            name=name,
            base_model_name_or_path=base_model_name_or_path,
            revision=revision,
            model_type=model_type,
            hidden_size=next(iter(self.bases.values())).shape[1],
            num_layers=num_layers,
            sites=self.sites,
            default_mode=default_mode,
            default_angle=default_angle,
            angle_convention=(
                RANDOM_CONVENTION
                if self.options.direction == "random"
                else f"{ANGLE_CONVENTION}; {SIGN_CONVENTION}"
            ),
            gate=gate,
            extraction=extraction,
            fingerprint=dict(fingerprint) if fingerprint else None,
            statistics={
                str(site): asdict(of) | ({"auroc": self.auroc[site]} if site in self.auroc else {})
                for site, of in self.statistics.items()
            },
        )
        return Plane(config, self.bases, self.means)


def calibrate(
    positive: Activations, negative: Activations, options: Options | None = None
) -> Calibration:
    """Find the plane and the discriminative sites; METHOD.md 3, steps 3 to 6.

    `positive` and `negative` map the same sites to [n, d], where n may differ between the two and
    is at least 2. Raises CalibrationError if they are malformed, if the classes differ nowhere, if
    the candidates span no plane, or if a site was chosen at which they don't differ;
    NothingSelectedError if no site discriminates (then nothing is selected, rather than
    everything).
    """
    options = options or Options()
    _check(positive, negative)
    differences, candidates, feature_site, b1 = _directions(positive, negative, options)
    pc1, explained = first_component(candidates)
    found = Calibration(
        bases={},
        means={},
        statistics={
            site: _statistics(positive[site], negative[site], b1[site], differences[site])
            for site in candidates
        },
        directions=b1,
        feature_site=feature_site,
        dropped=tuple(site for site in differences if site not in candidates),
        explained_variance=explained,
        candidates=candidates,
        options=options,
    )
    selected = _selected(found, positive, negative)
    if options.direction == "random":
        return _at_random(found, selected, positive, negative)
    try:
        bases = {site: _orthogonal(b1[site], pc1) for site in selected}
    except ValueError as error:
        raise CalibrationError(f"the candidates span no plane: {error}") from None
    # One sign for all sites, so that an angle turns the same way at each of them.
    c2 = sum(float(projections(negative[site], bases[site][1]).mean()) for site in selected)
    if c2 < 0:
        bases = {site: _orthogonal(b1[site], -pc1) for site in selected}
    return _with_bases(found, bases, positive, negative)


def _with_bases(
    found: Calibration,
    bases: Mapping[Site, Tensor],
    positive: Activations,
    negative: Activations,
) -> Calibration:
    rounded = {site: basis.float() for site, basis in bases.items()}
    means = {
        site: _class_means(positive[site], negative[site], basis) for site, basis in rounded.items()
    }
    return replace(found, bases=rounded, means=means)


def _directions(
    positive: Activations, negative: Activations, options: Options
) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Site | None, dict[Site, Tensor]]:
    """(differences, candidates, the feature direction's site, b1 of each candidate's site)."""
    differences = {
        site: positive[site].double().mean(0) - negative[site].double().mean(0)
        for site in sorted(positive)
    }
    candidates = {
        site: difference / difference.norm()
        for site, difference in differences.items()
        if not _is_degenerate(difference, positive[site], negative[site])
    }
    if not candidates:
        raise CalibrationError("the two classes have the same mean activation at every site")
    if options.direction == "mean":
        feature_site, mean = None, torch.stack(list(candidates.values())).mean(0)
        feature = mean / mean.norm()
    else:
        feature_site = feature_direction(
            candidates,
            {site: float(differences[site].norm()) for site in candidates},
            # A random plane is put where the published method would put its own.
            "max_sim" if options.direction == "random" else options.direction,
        )
        feature = candidates[feature_site]
    b1 = {
        site: candidate if options.planes == "per_site" else feature
        for site, candidate in candidates.items()
    }
    return differences, candidates, feature_site, b1


def _selected(found: Calibration, positive: Activations, negative: Activations) -> tuple[Site, ...]:
    """The sites to steer, by hand or by discriminating."""
    options = found.options
    if options.sites is not None:
        try:
            chosen = options.sites.among(tuple(positive))
        except ValueError as error:
            raise CalibrationError(str(error)) from None
        if same := [str(site) for site in chosen if site in found.dropped]:
            raise CalibrationError(f"the classes do not differ at {', '.join(same)}")
        return chosen
    selected = discriminative_sites(found.statistics, tuple(positive), options)
    if not selected:
        raise NothingSelectedError(
            f"no {options.granularity} discriminates with margin {options.margin:g}: the two "
            f"classes lie on one side of 0 everywhere; {suggestion(positive, negative, options)}",
            found,
        )
    return selected


def suggestion(positive: Activations, negative: Activations, options: Options) -> str:
    """Which other options would select sites, the nearest first, in words."""
    others = [
        replace(options, planes=planes, granularity=granularity, margin=margin)
        for margin, planes, granularity in product(
            dict.fromkeys((options.margin, 0.0)),
            dict.fromkeys((options.planes, "per_site")),
            dict.fromkeys((options.granularity, "site")),
        )
    ]
    said = []
    for other in others[1:]:
        differences, candidates, _, b1 = _directions(positive, negative, other)
        statistics = {
            site: _statistics(positive[site], negative[site], b1[site], differences[site])
            for site in candidates
        }
        if selected := discriminative_sites(statistics, tuple(positive), other):
            flags = [
                f"--{name} {value:g}" if name == "margin" else f"--{name} {value}"
                for name in ("planes", "granularity", "margin")
                if (value := getattr(other, name)) != getattr(options, name)
            ]
            said.append(f"{' '.join(flags)} finds {len(selected)} sites")
    if said:
        return "; ".join(said)
    return (
        "no other planes, granularity or margin find any: choose sites by hand (--sites), or "
        "contrast more strongly"
    )


def _at_random(
    found: Calibration, selected: Sequence[Site], positive: Activations, negative: Activations
) -> Calibration:
    """Random planes at the selected sites, and how the classes lie on them."""
    planes = _random_planes(positive, found.options)
    statistics = {
        site: replace(
            _statistics(positive[site], negative[site], planes[site][0], found.candidates[site]),
            difference_norm=of.difference_norm,
        )
        for site, of in found.statistics.items()
    }
    directions = {site: planes[site][0] for site in found.candidates}
    found = replace(found, statistics=statistics, directions=directions, feature_site=None)
    return _with_bases(found, {site: planes[site] for site in selected}, positive, negative)


def _random_planes(activations: Activations, options: Options) -> dict[Site, Tensor]:
    """[2, d] float64 a site: the same one, or each its own."""
    generator = torch.Generator().manual_seed(options.seed)
    width = next(iter(activations.values())).shape[1]

    def draw() -> Tensor:
        drawn = torch.randn(2, width, generator=generator, dtype=torch.float64)
        return orthonormalise(drawn).double()

    one = draw()
    return {site: one if options.planes == "global" else draw() for site in sorted(activations)}


def separation(
    positive: Activations, negative: Activations, options: Options, every: int
) -> dict[Site, float]:
    """AUROC of c1 at each site, on every `every`-th example, with b1 from the other examples.

    0.5 is chance, 1 is perfect. Empty where fewer than two examples of a class would be held out,
    or kept.
    """
    kept, held = (
        [
            {site: x[_held(len(x), every) == out] for site, x in side.items()}
            for side in (positive, negative)
        ]
        for out in (False, True)
    )
    if min(len(x) for side in (*kept, *held) for x in side.values()) < 2:
        return {}
    _, candidates, _, b1 = _directions(kept[0], kept[1], options)
    if options.direction == "random":
        planes = _random_planes(positive, options)
        b1 = {site: planes[site][0] for site in candidates}
    return {
        site: auroc(projections(held[0][site], d), projections(held[1][site], d))
        for site, d in b1.items()
    }


def auroc(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive score [n] exceeds a negative one [m]; ties count half."""
    difference = positive[:, None] - negative[None]
    return float((difference > 0).double().mean() + (difference == 0).double().mean() / 2)


def _held(n: int, every: int) -> Tensor:
    return torch.arange(n) % every == every - 1


def feature_direction(
    candidates: Mapping[Site, Tensor],
    lengths: Mapping[Site, float],
    rule: Literal["max_sim", "max_norm"],
) -> Site:
    """The site whose candidate (unit, [d]) is the feature direction; the first one on a tie.

    "max_sim" takes the largest mean cosine to all candidates (SS), "max_norm" the longest
    un-normalised difference, given in `lengths` (AS).
    """
    sites = list(candidates)
    if rule == "max_norm":
        return max(sites, key=lambda site: lengths[site])
    stacked = torch.stack([candidates[site] for site in sites])  # [k, d]
    return sites[int((stacked @ stacked.T).mean(1).argmax())]


def first_component(candidates: Mapping[Site, Tensor]) -> tuple[Tensor, float]:
    """(PC1 [d], its share of the variance) of the mean-centred candidates; the sign is arbitrary.

    Raises CalibrationError unless the candidates differ.
    """
    stacked = torch.stack(list(candidates.values())).double()
    centred = stacked - stacked.mean(0)
    _, singular, components = torch.linalg.svd(centred, full_matrices=False)
    variance = float(singular.square().sum())
    # Unit vectors: rounding alone gives 1e-30.
    if variance < 1e-12:
        raise CalibrationError(
            f"all {len(candidates)} candidates are the same direction: there is no second axis"
        )
    return components[0], float(singular[0]) ** 2 / variance


def discriminative_sites(
    statistics: Mapping[Site, SiteStatistics], measured: Sequence[Site], options: Options
) -> tuple[Site, ...]:
    """The selected sites, sorted.

    `measured` are all sites of the model. By "layer" one of them without statistics, because its
    classes don't differ, keeps its whole layer out.
    """
    passing = {s for s, of in statistics.items() if of.discriminates(options.margin)}
    if options.granularity == "site":
        return tuple(sorted(passing))
    layers = groupby(sorted(measured), key=lambda site: site.layer)
    groups = [tuple(sites) for _, sites in layers]
    return tuple(site for group in groups if passing.issuperset(group) for site in group)


def format_confounds(positive: Sequence[str], negative: Sequence[str]) -> list[str]:
    """Warnings, one line each, where two sets of prompts differ by form rather than by content.

    A wrapper around one set only becomes part of the direction (SS's harmless set has one).
    Compared are openings and closings of three words, the last character, and the word count.
    """
    forms: dict[str, Callable[[str], str]] = {
        "begin with": lambda text: " ".join(text.split()[:3]),
        "end with": lambda text: " ".join(text.split()[-3:]),
        "have the last character": lambda text: text.rstrip()[-1:],
    }
    warnings = []
    for what, form in forms.items():
        shares = [_shares([form(text) for text in texts]) for texts in (positive, negative)]
        here, there = shares
        for value in sorted(here.keys() | there.keys()):
            p, q = here.get(value, 0.0), there.get(value, 0.0)
            if abs(p - q) >= 0.5:
                warnings.append(
                    f"{p:.0%} of the positive and {q:.0%} of the negative prompts {what} {value!r}"
                )
    a, b = (
        torch.tensor([float(len(text.split())) for text in texts], dtype=torch.float64)
        for texts in (positive, negative)
    )
    if min(len(a), len(b)) >= 2:
        gap = abs(float(a.mean() - b.mean()))
        error = math.sqrt(float(a.var() / len(a) + b.var() / len(b)))
        shorter, longer = sorted((float(a.mean()), float(b.mean())))
        # Systematic (4 standard errors), and more than a fifth.
        if gap > 4 * error and longer > 1.2 * shorter:
            warnings.append(
                f"positive prompts have {float(a.mean()):.1f} words on average, negative ones "
                f"{float(b.mean()):.1f}"
            )
    return warnings


def _shares(values: Sequence[str]) -> dict[str, float]:
    return {value: count / len(values) for value, count in Counter(values).items()}


def _check(positive: Activations, negative: Activations) -> None:
    if not positive:
        raise CalibrationError("there are no sites")
    if positive.keys() != negative.keys():
        odd = ", ".join(map(str, sorted(positive.keys() ^ negative.keys())))
        raise CalibrationError(f"only one class has activations at {odd}")
    width = next(iter(positive.values())).shape[-1]
    for label, activations in (("positive", positive), ("negative", negative)):
        for site, x in activations.items():
            if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] != width:
                raise CalibrationError(
                    f"{label} activations at {site} have shape {list(x.shape)}: must be "
                    f"[n, {width}] with n >= 2"
                )
            if not bool(x.isfinite().all()):
                raise CalibrationError(f"{label} activations at {site} are not all finite")


def _is_degenerate(difference: Tensor, positive: Tensor, negative: Tensor) -> bool:
    length = torch.cat((positive, negative)).double().norm(dim=1).mean()
    return float(difference.norm()) <= _DEGENERATE * float(length)


def projections(x: Tensor, direction: Tensor) -> Tensor:
    """[n]: of the unit-normalised rows of x [n, d]; a row of zeros projects to 0."""
    rows = x.double()
    return torch.nn.functional.normalize(rows, dim=1) @ direction


def _statistics(
    positive: Tensor, negative: Tensor, b1: Tensor, difference: Tensor
) -> SiteStatistics:
    p, q = projections(positive, b1), projections(negative, b1)
    return SiteStatistics(
        mean_positive=float(p.mean()),
        mean_negative=float(q.mean()),
        stderr_positive=float(p.std()) / math.sqrt(len(p)),
        stderr_negative=float(q.std()) / math.sqrt(len(q)),
        difference_norm=float(difference.norm()),
    )


def _class_means(positive: Tensor, negative: Tensor, basis: Tensor) -> ClassMeans:
    means = torch.stack((positive.double().mean(0), negative.double().mean(0)))  # [2, d]
    (p1, p2), (n1, n2) = (means @ basis.double().T).tolist()
    return ClassMeans((p1, p2), (n1, n2), rho=float((means[0] - means[1]).norm()))


def _orthogonal(b1: Tensor, pc1: Tensor) -> Tensor:
    return orthonormalise(torch.stack((b1, pc1))).double()
