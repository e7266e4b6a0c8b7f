"""Planes and vectors that others have published, read without running any code of theirs.

`layouts.LAYOUTS` is what is known; docs/formats.md has a command for each. Of a file becomes either
two directions at each norm (`source.Bases`) or directions a layer (`source.Directions`), and of
these a plane for a certain model (`importing`).

None of these files holds the classes' raw means, so what comes of them are planes of format version
1: requests may not ask them for add or cap. Caps that a file itself names are the exception.
"""

from steering_planes.formats.importing import import_plane
from steering_planes.formats.layouts import LAYOUTS

__all__ = ["LAYOUTS", "import_plane"]
