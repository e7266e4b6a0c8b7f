"""Steering sites: roles, and finding the norm modules of a decoder by role.

A site is the output of a norm module inside a decoder layer, after the norm's gain, as it feeds
the next sublayer. Families give the same child name different roles (`post_attention_layernorm` is
`mlp_in` in Llama and `attn_out` in Gemma-2), so everything outside this file goes by role.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from torch import nn

ROLES = ("attn_in", "mlp_in", "attn_out", "mlp_out")


class SitesNotFoundError(ValueError):
    """The model has no decoder layers, or no norms in them, that a known layout describes."""


@dataclass(frozen=True, order=True)
class Site:
    """One norm of one decoder layer; `str(Site(18, "attn_in"))` is `"18.attn_in"`.

    Raises ValueError for a negative layer or an unknown role.
    """

    layer: int
    role: str

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"layer={self.layer}: a layer is 0 or more")
        if self.role not in ROLES:
            raise ValueError(f"role={self.role!r}: a role is one of {', '.join(ROLES)}")

    def __str__(self) -> str:
        return f"{self.layer}.{self.role}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of `str`; raises ValueError naming the text."""
        layer, dot, role = text.partition(".")
        # Only canonical digits: "018", "+18" and "١٨" would give one site several names.
        if not dot or not layer.isdecimal() or str(int(layer)) != layer:
            raise ValueError(f"site={text!r}: a site is written <layer>.<role>, like 18.attn_in")
        return cls(int(layer), role)


@dataclass(frozen=True)
class Selection:
    """Sites named by hand: `all`, layers (`7`, `12-20`), or of these one role (`12-20.mlp_in`).

    parts: (first layer, last layer, role) each; None for every layer, or for every role.
    text: as it was written.
    """

    parts: tuple[tuple[int | None, int | None, str | None], ...]
    text: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parts separated by commas or spaces; raises ValueError naming the part that is none."""
        words = text.replace(",", " ").split()
        if not words:
            raise ValueError(f"sites={text!r}: names none")
        return cls(tuple(map(_part, words)), " ".join(words))

    def among(self, sites: Collection[Site]) -> tuple[Site, ...]:
        """The selected ones of these sites, sorted; raises ValueError for a part that has none."""
        selected: set[Site] = set()
        for word, (first, last, role) in zip(self.text.split(), self.parts, strict=True):
            found = {
                site
                for site in sites
                if (first is None or last is None or first <= site.layer <= last)
                and role in (None, site.role)
            }
            layers = {site.layer for site in found}
            if first is not None and last is not None:
                missing = [layer for layer in range(first, last + 1) if layer not in layers]
                if missing:
                    what = f"layer {missing[0]}" + (f", {role}" if role else "")
                    raise ValueError(f"sites={word!r}: {what} is not among {named(sites)}")
            elif not found:
                raise ValueError(f"sites={word!r}: none of that role among {named(sites)}")
            selected |= found
        return tuple(sorted(selected))


def _part(word: str) -> tuple[int | None, int | None, str | None]:
    match = re.fullmatch(r"(all|(\d{1,5})(?:-(\d{1,5}))?)(?:\.([a-z_]+))?", word, re.ASCII)
    if match is None:
        rule = "sites are written all, 7, 12-20 or 12-20.mlp_in"
        raise ValueError(f"sites={word!r}: {rule}")
    _, first, last, role = match.groups()
    if role is not None and role not in ROLES:
        raise ValueError(f"sites={word!r}: a role is one of {', '.join(ROLES)}")
    if first is None:
        return None, None, role
    low, high = int(first), int(last or first)
    if low > high:
        raise ValueError(f"sites={word!r}: {low} is after {high}")
    return low, high, role


def named(sites: Collection[Site]) -> str:
    """Sites in few words, `0-29.attn_in, 0-29.mlp_in`; or none."""
    words = []
    for role in ROLES:
        layers = sorted(site.layer for site in sites if site.role == role)
        starts = [layer for layer in layers if layer - 1 not in layers]
        ends = [layer for layer in layers if layer + 1 not in layers]
        words += [
            f"{first}.{role}" if first == last else f"{first}-{last}.{role}"
            for first, last in zip(starts, ends, strict=True)
        ]
    return ", ".join(words) or "none"


# Child name -> role, by family. The first layout whose names are all children of a layer holds for
# that layer, so a layout stands before those whose names are a subset of its own.
_LAYOUTS: tuple[Mapping[str, str], ...] = (
    {  # Gemma-2, -3, -3n, -4
        "input_layernorm": "attn_in",
        "post_attention_layernorm": "attn_out",
        "pre_feedforward_layernorm": "mlp_in",
        "post_feedforward_layernorm": "mlp_out",
    },
    {  # AFMoE, openPangu
        "input_layernorm": "attn_in",
        "post_attention_layernorm": "attn_out",
        "pre_mlp_layernorm": "mlp_in",
        "post_mlp_layernorm": "mlp_out",
    },
    {  # GLM-4 dense
        "input_layernorm": "attn_in",
        "post_self_attn_layernorm": "attn_out",
        "post_attention_layernorm": "mlp_in",
        "post_mlp_layernorm": "mlp_out",
    },
    # Llama, Qwen, Mistral, Phi-3, GPT-NeoX, BLOOM
    {"input_layernorm": "attn_in", "post_attention_layernorm": "mlp_in"},
    # OLMo-2, EXAONE-4: norms after the sublayers only
    {"post_attention_layernorm": "attn_out", "post_feedforward_layernorm": "mlp_out"},
    {"input_layernorm": "attn_in", "pre_ff_layernorm": "mlp_in"},  # Jamba, Falcon-H1
    {"ln_1": "attn_in", "ln_2": "mlp_in"},  # GPT-2
    {"attention_norm": "attn_in", "ffn_norm": "mlp_in"},  # InternLM2
    {"operator_norm": "attn_in", "ffn_norm": "mlp_in"},  # LFM2
    {"ln_attn": "attn_in", "ln_mlp": "mlp_in"},  # Falcon-40B
    # Parallel attention and MLP behind one norm: Cohere, Phi-2, GPT-J
    {"input_layernorm": "attn_in"},
    {"ln_1": "attn_in"},
)

# Towers of multimodal models and draft heads may well have as many layers as the decoder.
NOT_THE_DECODER = ("vision", "visual", "image", "audio", "speech", "encoder", "draft", "mtp")


def find_sites(model: nn.Module, num_layers: int) -> dict[Site, nn.Module]:
    """Every site of a loaded model and the norm module behind it, in order of layer and role.

    Goes by structure, so it serves transformers and vLLM modules, wrappers included: the decoder
    is the ModuleList of length `num_layers` whose layers have known norms. Placeholders of other
    pipeline stages and layers without known norms (Mamba blocks) contribute nothing. The model's
    final norm and q/k norms are no sites.

    Raises SitesNotFoundError, naming the classes seen, if nothing or more than one decoder fits.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    found = {
        name: sites
        for name, layers in lists.items()
        if not any(word in name.lower() for word in NOT_THE_DECODER)
        and (sites := _sites_of(layers))
    }
    if len(found) == 1:
        return next(iter(found.values()))
    what = type(model).__name__
    if found:
        raise SitesNotFoundError(
            f"{what}: several stacks of {num_layers} layers could be the decoder: "
            f"{', '.join(found)}"
        )
    if not lists:
        raise SitesNotFoundError(
            f"{what}: no ModuleList of num_layers={num_layers} among its modules "
            f"({_classes(model.children())})"
        )
    seen = "; ".join(f"{name}: {_classes(layers)}" for name, layers in lists.items())
    raise SitesNotFoundError(
        f"{what}: no layer has norms of a known layout (seen: {seen}); "
        f"children of its layers: {_child_names(lists.values())}"
    )


def roles(names: Collection[str]) -> Mapping[str, str]:
    """Name -> role, by the first layout whose names are all among a layer's children's; or {}."""
    return next((layout for layout in _LAYOUTS if layout.keys() <= set(names)), {})


def _sites_of(layers: Iterable[nn.Module]) -> dict[Site, nn.Module]:
    sites: dict[Site, nn.Module] = {}
    for index, layer in enumerate(layers):
        # An Identity stands for no norm at all; LongCat's lists of norms fit no single role.
        children = {
            name: child
            for name, child in layer.named_children()
            if not isinstance(child, nn.Identity | nn.ModuleList)
        }
        layout = roles(children)
        by_role = {role: children[name] for name, role in layout.items()}
        sites |= {Site(index, role): by_role[role] for role in sorted(by_role)}
    return sites


def _classes(modules: Iterable[nn.Module]) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules})) or "none"


def _child_names(stacks: Iterable[nn.ModuleList]) -> str:
    names = {name for layers in stacks for layer in layers for name, _ in layer.named_children()}
    return ", ".join(sorted(names)) or "none"
