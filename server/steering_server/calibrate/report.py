"""What a reader needs to decide whether to trust a calibrated plane: a page and a figure, and if
asked for the activations themselves."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from steering_planes import Site
from steering_planes.calibration import Calibration, projections, suggestion
from steering_planes.sites import named
from steering_server.calibrate.run import HELD_OUT, Measured

FIGURE = "report.png"
PAGE = "report.md"
ACTIVATIONS = "activations.safetensors"

SEPARATED = 0.75
"""The least held-out AUROC of the best selected site with which classes are said to separate."""

_PAGE = """\
# How `{name}` was calibrated

- **Do the classes separate?** {separates}
- **How many sites?** {selected} of {measured} are selected{where}.
- **Next:** {next}

![projections, selection, similarity, variance]({figure})

- {n_positive} positive and {n_negative} negative examples, from {data}.
- Method: {method}.
- Feature direction: {feature}. PC1 of the candidates explains {explained:.1%} of their variance,
  {needed} components explain 90 %.
- Candidates agree with their sites' b1 by a mean cosine of {agreement:.2f}.{dropped}
- {separation}

A site discriminates where the two classes' means on b1 lie on opposite sides of 0, each at least
{margin:g} standard errors from it (Selective Steering, Eq. 9). {rule}

| site | selected | why | positive mean | negative mean | difference's length | held-out AUROC |
|---|---|---|---|---|---|---|
{rows}

Means are of unit-length activations, ± their standard error.
"""


def page(measured: Measured) -> str:
    """The report in Markdown, of a plane or of why there is none."""
    found = measured.calibration
    options = found.options
    spectrum = variance_explained(found)
    needed = int((spectrum.cumsum(0) < 0.9).sum()) + 1
    agreement = torch.stack([c @ found.directions[s] for s, c in found.candidates.items()]).mean()
    feature = f"the {options.direction} one" if options.direction != "mean" else "their mean"
    if found.feature_site is not None:
        feature = f"the candidate of {found.feature_site}"
    dropped = ", ".join(map(str, found.dropped))
    return _PAGE.format(
        name=measured.name,
        separates=_verdict(measured),
        where=f": {named(found.sites)}" if found.sites else "",
        next=_next(measured),
        figure=FIGURE,
        n_positive=_count(measured.positive),
        n_negative=_count(measured.negative),
        data=measured.extraction.data,
        method=measured.extraction.method,
        feature=feature,
        explained=found.explained_variance,
        needed=needed,
        agreement=float(agreement),
        selected=len(found.sites),
        measured=len(found.statistics) + len(found.dropped),
        dropped=f" The classes do not differ at {dropped}." if dropped else "",
        separation=_separation(found),
        margin=options.margin,
        rule=_rule(found),
        rows="\n".join(_row(found, site) for site in found.statistics),
    )


def is_page(file: Path) -> bool:
    """Whether a file is such a report."""
    text = file.read_text("utf-8", errors="replace")
    return text.startswith("# How `") and "**Do the classes separate?**" in text


def best(found: Calibration) -> float | None:
    """The greatest held-out AUROC of a selected site; None where none was measured."""
    return max((found.auroc[site] for site in found.sites if site in found.auroc), default=None)


def _verdict(measured: Measured) -> str:
    found = measured.calibration
    if not found.auroc:
        return "Not measured: too few examples to hold any out."
    of = [site for site in found.sites or found.auroc if site in found.auroc]
    at = max(of, key=lambda site: found.auroc[site], default=None)
    if at is None:
        return "Not measured at the selected sites."
    top, what = found.auroc[at], "selected sites" if found.sites else "sites"
    middle = median(found.auroc[site] for site in of)
    # The best of many sites is good by chance, too; half of them are not.
    verdict = "Yes" if middle >= SEPARATED else "In part" if top >= SEPARATED else "Hardly"
    if found.options.direction == "random":
        verdict = "Not asked, the directions are random, a study's null"
    held = f"{_count(measured.positive) // HELD_OUT} and {_count(measured.negative) // HELD_OUT}"
    return (
        f"{verdict}: the held-out AUROC of the {what} is {middle:.2f} in the middle and {top:.2f} "
        f"at best, at {at} (0.5 is chance; {held} examples were held out)."
    )


def _next(measured: Measured) -> str:
    found = measured.calibration
    top = best(found)
    if not found.sites:
        return f"{suggestion(measured.positive, measured.negative, found.options)}."
    if found.options.direction == "random":
        return "serve it beside the real plane, at the same angles."
    if top is not None and top < SEPARATED:
        return "contrast more strongly, or with more examples, before serving this plane."
    return (
        "serve it and sweep the angle (`rotate_to` from 0 to 180), reading the answers; fewer "
        "sites (--margin, --sites) do less damage."
    )


def _rule(found: Calibration) -> str:
    if found.options.sites is not None:
        return f"Here sites were chosen by hand: `{found.options.sites}`."
    if found.options.granularity == "layer":
        return "By `layer`, a layer is selected if all its sites discriminate."
    return "By `site`, each is selected for itself."


def _count(activations: Any) -> int:
    return len(next(iter(activations.values())))


def _separation(found: Calibration) -> str:
    if not found.auroc:
        return "Too few examples to hold any out: how well the classes separate was not measured."
    of = found.sites or tuple(found.auroc)
    measured = [found.auroc[site] for site in of if site in found.auroc]
    return (
        f"On every {HELD_OUT}th example, held out, the {'selected ' if found.sites else ''}sites "
        f"separate the classes with an AUROC of {min(measured):.2f} to {max(measured):.2f} (0.5 is "
        "chance)."
    )


def _row(found: Calibration, site: Site) -> str:
    of = found.statistics[site]
    if found.options.sites is not None:
        why = "chosen by hand" if site in found.bases else "not chosen"
    elif found.options.direction == "random":
        why = "max_sim selects it" if site in found.bases else "max_sim does not"
    elif site in found.bases:
        why = "discriminates"
    elif of.mean_positive * of.mean_negative >= 0:
        why = "both means on one side of 0"
    elif not of.discriminates(found.options.margin):
        why = "a mean too near to 0"
    else:
        why = "another site of its layer does not"
    separated = f"{found.auroc[site]:.2f}" if site in found.auroc else "–"
    return (
        f"| {site} | {'yes' if site in found.bases else 'no'} | {why} "
        f"| {of.mean_positive:+.4f} ± {of.stderr_positive:.4f} "
        f"| {of.mean_negative:+.4f} ± {of.stderr_negative:.4f} | {of.difference_norm:.3f} "
        f"| {separated} |"
    )


def variance_explained(found: Calibration) -> Tensor:
    """[k]: the share of the candidates' variance that each principal component explains."""
    stacked = torch.stack(list(found.candidates.values()))
    singular = torch.linalg.svdvals(stacked - stacked.mean(0))
    shares: Tensor = singular.square() / singular.square().sum()
    return shares


def activations(measured: Measured) -> bytes:
    """Both classes' activations as safetensors: `positive.18.attn_in` and so on, [n, d] float32."""
    from safetensors.torch import save

    sides = (("positive", measured.positive), ("negative", measured.negative))
    return save({f"{side}.{site}": x.contiguous() for side, of in sides for site, x in of.items()})


def figure(measured: Measured) -> bytes:
    """The report's figure, as PNG."""
    # Without pyplot, which would look for a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = measured.calibration
    sites = list(found.statistics)
    drawn: Any = Figure(figsize=(14, 10), layout="constrained")
    FigureCanvasAgg(drawn)
    top, bottom = drawn.subfigures(2, 1)
    _draw_projections(top.subplots(), measured, sites)
    similarity, variance, separated = bottom.subplots(1, 3)

    stacked = torch.stack([found.candidates[site] for site in sites])
    image = similarity.imshow((stacked @ stacked.T).numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    similarity.set(title="cosine of candidates", xlabel="site", ylabel="site")
    bottom.colorbar(image, ax=similarity)

    shares = variance_explained(found).numpy()[:20]
    variance.bar(range(1, len(shares) + 1), shares)
    variance.set(title="variance explained", xlabel="principal component", ylabel="share")

    at = [i for i, site in enumerate(sites) if site in found.auroc]
    colours = ["tab:green" if sites[i] in found.bases else "lightgrey" for i in at]
    separated.bar(at, [found.auroc[sites[i]] for i in at], color=colours)
    separated.axhline(0.5, color="black", linewidth=0.8)
    separated.set(title="held-out AUROC (green: selected)", xlabel="site", ylim=(0, 1.02))

    file = io.BytesIO()
    drawn.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _draw_projections(axes: Any, measured: Measured, sites: list[Site]) -> None:
    """Every example's unit-length activation on b1, site by site; selected sites are shaded."""
    found = measured.calibration
    for index, site in enumerate(sites):
        if site in found.bases:
            axes.axvspan(index - 0.5, index + 0.5, color="tab:green", alpha=0.15, linewidth=0)
        b1 = found.directions[site]
        for activations, colour, offset in (
            (measured.positive, "tab:orange", -0.15),
            (measured.negative, "tab:blue", 0.15),
        ):
            values = projections(activations[site], b1).numpy()
            axes.plot([index + offset] * len(values), values, ".", color=colour, markersize=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(sites)), [str(site) for site in sites], rotation=90, fontsize=6)
    axes.set(
        title="projection on b1: positive orange, negative blue; selected sites shaded",
        xlim=(-1, len(sites)),
    )
