"""What a reader needs to decide whether to trust a calibrated plane: a page and a figure."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from steering_planes import Site
from steering_planes.calibration import Calibration, projections
from steering_server.calibration import HELD_OUT, Calibrated

FIGURE = "report.png"
PAGE = "report.md"

_PAGE = """\
# How `{name}` was calibrated

![projections, selection, similarity, variance]({figure})

- {n_positive} positive and {n_negative} negative examples, last prompt token, from {data}.
- Method: {method}.
- Feature direction: the candidate of {feature_site}. PC1 of the candidates explains
  {explained:.1%} of their variance, {needed} components explain 90 %.
- Candidates agree with the feature direction by a mean cosine of {agreement:.2f}.
- {selected} of {measured} sites are selected.{dropped}
- {separation}

A site discriminates where the two classes' means on b1 lie on opposite sides of 0, each at least
{margin:g} standard errors from it (Selective Steering, Eq. 9); by `{granularity}`,
{granularity_rule}.

| site | selected | why | positive mean | negative mean | difference's length | held-out AUROC |
|---|---|---|---|---|---|---|
{rows}

Means are of unit-length activations, ± their standard error.
"""


def page(calibrated: Calibrated) -> str:
    """The report in Markdown."""
    found, plane = calibrated.calibration, calibrated.plane
    options = found.options
    spectrum = variance_explained(found)
    needed = int((spectrum.cumsum(0) < 0.9).sum()) + 1
    feature = found.candidates[found.feature_site]
    agreement = torch.stack([c @ feature for c in found.candidates.values()]).mean()
    rule = (
        "a layer is selected if all its sites discriminate"
        if options.granularity == "layer"
        else "each site for itself"
    )
    return _PAGE.format(
        name=plane.name,
        figure=FIGURE,
        n_positive=_count(calibrated.positive),
        n_negative=_count(calibrated.negative),
        data=plane.config.extraction.data,
        method=plane.config.extraction.method,
        feature_site=found.feature_site,
        explained=found.explained_variance,
        needed=needed,
        agreement=float(agreement),
        selected=len(found.sites),
        measured=len(found.statistics) + len(found.dropped),
        dropped=(
            f" The classes do not differ at {', '.join(map(str, found.dropped))}."
            if found.dropped
            else ""
        ),
        separation=_separation(found),
        margin=options.margin,
        granularity=options.granularity,
        granularity_rule=rule,
        rows="\n".join(_row(found, site) for site in found.statistics),
    )


def _count(activations: Any) -> int:
    return len(next(iter(activations.values())))


def _separation(found: Calibration) -> str:
    if not found.auroc:
        return "Too few examples to hold any out: how well the classes separate was not measured."
    selected = [found.auroc[site] for site in found.sites if site in found.auroc]
    return (
        f"On every {HELD_OUT}th example, held out, the selected sites separate the classes with an "
        f"AUROC of {min(selected):.2f} to {max(selected):.2f} (0.5 is chance)."
    )


def _row(found: Calibration, site: Site) -> str:
    of = found.statistics[site]
    if site in found.bases:
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


def figure(calibrated: Calibrated) -> bytes:
    """The report's figure, as PNG."""
    # Without pyplot, which would look for a display and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = calibrated.calibration
    sites = list(found.statistics)
    drawn: Any = Figure(figsize=(14, 10), layout="constrained")
    FigureCanvasAgg(drawn)
    top, bottom = drawn.subfigures(2, 1)
    _draw_projections(top.subplots(), calibrated, sites)
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


def _draw_projections(axes: Any, calibrated: Calibrated, sites: list[Site]) -> None:
    """Every example's unit-length activation on b1, site by site; selected sites are shaded."""
    found = calibrated.calibration
    for index, site in enumerate(sites):
        if site in found.bases:
            axes.axvspan(index - 0.5, index + 0.5, color="tab:green", alpha=0.15, linewidth=0)
        b1 = found.b1(site)
        for activations, colour, offset in (
            (calibrated.positive, "tab:orange", -0.15),
            (calibrated.negative, "tab:blue", 0.15),
        ):
            values = projections(activations[site], b1).numpy()
            axes.plot([index + offset] * len(values), values, ".", color=colour, markersize=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(sites)), [str(site) for site in sites], rotation=90, fontsize=6)
    axes.set(
        title="projection on b1: positive orange, negative blue; selected sites shaded",
        xlim=(-1, len(sites)),
    )
