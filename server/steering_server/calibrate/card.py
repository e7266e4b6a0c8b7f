"""A plane's model card."""

from __future__ import annotations

from steering_server.calibrate.run import Calibrated

# Markdown, with the metadata block that Hugging Face reads.
_CARD = """\
---
base_model: {base}
tags: [activation-steering]
---

# Steering plane `{name}` for {base}

Turns the model's behaviour by an angle per request, without changing a weight or an activation's
length. {angles}
The default mode is `{mode}`; requests may also add, ablate or cap along a direction of the plane,
which changes lengths unless they are kept.

## Intended use

Serving {base} with `steering serve … --steering-plane {name}=FOLDER`. Another model is refused
unless a mismatch is allowed, and so is a fine-tune, which its norms' gains tell. A plane moves a
tendency and is no safeguard: a prompt can outweigh it, and whatever else differs between the two
sides of the contrast set moves too.

## How it was made

    {command}

From {data}, {n} examples a side:
{method}.
{feature}PC1 explains {explained:.1%} of the candidates' variance, and {steered} of {measured}
sites are steered:

| site | positive class on b1 | negative class on b1 | length of the difference |
|---|---|---|---|
{rows}

Means of unit-length activations ± standard error. `report.md` says more.
"""


def card(found: Calibrated, command: str, measured: str | None) -> str:
    """The card in Markdown.

    Args:
        found: the plane, and how it was found.
        command: the command line that made it.
        measured: Markdown, what was measured of it elsewhere.
    """
    plane, calibration = found.plane, found.calibration
    rows = [
        f"| {site} | {of.mean_positive:+.4f} ± {of.stderr_positive:.4f} "
        f"| {of.mean_negative:+.4f} ± {of.stderr_negative:.4f} | {of.difference_norm:.3f} |"
        for site, of in calibration.statistics.items()
        if site in calibration.bases
    ]
    null = calibration.options.direction == "random"
    text = _CARD.format(
        angles=(
            "Its directions are random: it is the null that a study compares with."
            if null
            else "0° points at the contrast set's positive class, about 180° at the negative one."
        ),
        name=plane.name,
        base=plane.config.base_model_name_or_path,
        mode=plane.config.default_mode,
        command=command,
        data=plane.config.extraction.data,
        n=plane.config.extraction.n,
        method=plane.config.extraction.method,
        feature=(
            f"The feature direction comes from site {calibration.feature_site}, "
            if calibration.feature_site is not None
            else ""
        ),
        explained=calibration.explained_variance,
        steered=len(calibration.bases),
        measured=len(calibration.statistics),
        rows="\n".join(rows),
    )
    return text + (f"\n## Measured\n\n{measured.strip()}\n" if measured else "")
