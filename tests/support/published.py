"""Files as the field publishes them, each written to its own library's description."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, LAYERS = 128, 4

NORMS = ("input_layernorm", "post_attention_layernorm")


def directions(k: int, seed: int = 0) -> Tensor:
    """[k, d] float32."""
    return torch.randn(k, HIDDEN, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Published:
    """A source, what `import_plane` must be told of it, and what it means.

    means: site -> the directions [1 or 2, d] that it has there, in the residual stream or, where
        `space` says so, at the norm's output.
    """

    sources: list[Path]
    means: Mapping[str, Tensor]
    told: Mapping[str, Any] = field(default_factory=dict)
    space: str = "residual"


Writer = Callable[[Path], Published]


def both(layer: int, axes: Tensor) -> dict[str, Tensor]:
    """The same directions, read by both of a layer's norms."""
    axes = torch.atleast_2d(axes)
    return {f"{layer}.attn_in": axes, f"{layer}.mlp_in": axes}


def after(by_block: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Outputs of blocks, as the next layer reads them."""
    found: dict[str, Tensor] = {}
    for block, axes in by_block.items():
        found |= both(block + 1, axes) if block + 1 < LAYERS else {}
    return found


# Two axes.


def selective(
    folder: Path,
    *,
    layers: range = range(LAYERS),
    mask: Callable[[str], bool] | None = None,
    mode: str = "selective",
    threshold: float = 0.0,
    targets: bool = True,
    shape: Callable[[Tensor, Tensor], dict[str, Any]] = lambda b1, b2: {"basis": (b1, b2)},
) -> Path:
    """Selective Steering's folder: bfloat16, as its ArtifactsManager saves it."""
    folder.mkdir(parents=True)
    b1, b2 = torch.linalg.qr(directions(2).T)[0].T.bfloat16()
    modules = [f"model.layers.{i}.{norm}" for i in layers for norm in NORMS]
    extra: dict[str, Any] = {"target_layers": modules} if targets else {}
    if mask is not None:
        extra["layer_steering_mask"] = {module: mask(module) for module in modules}
    plane = {
        **shape(b1, b2),
        "projections": dict.fromkeys(modules, (0.1, -0.1)),
        "plane_type": mode,
        "extra_info": extra,
        "metadata": {"n_projections": len(modules), "session_id": "s1"},
    }
    torch.save(plane, folder / "plane.pt")
    config = {"model": {"name": "org/tiny"}, "steering": {"mode": mode, "threshold": threshold}}
    (folder / "config.json").write_text(json.dumps(config))
    metadata = {"session_id": "s1", "n_layers": len(modules), "harmful_samples": 7}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


def selective_basis() -> Tensor:
    return torch.linalg.qr(directions(2).T)[0].T.bfloat16().double()


def _selective(folder: Path) -> Published:
    path = selective(folder / "calibration", mask=lambda module: ".2." in module)
    return Published([path], both(2, selective_basis()), space="norm")


def _first_half(folder: Path) -> Published:
    half = range(LAYERS // 2)
    path = selective(folder / "calibration", layers=half, mask=lambda module: True)
    means = both(0, selective_basis()) | both(1, selective_basis())
    return Published([path], means, space="norm")


def _standard(folder: Path) -> Published:
    path = selective(folder / "calibration", mode="standard")
    means: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        means |= both(layer, selective_basis())
    return Published([path], means, space="norm")


def _older(folder: Path) -> Published:
    path = selective(folder / "calibration", mode="standard", targets=False)
    means: dict[str, Tensor] = {}
    for layer in range(LAYERS):
        means |= both(layer, selective_basis())
    return Published([path], means, space="norm")


def _basis_as(shape: Callable[[Tensor, Tensor], dict[str, Any]]) -> Writer:
    def write(folder: Path) -> Published:
        mask = lambda module: ".1." in module  # noqa: E731
        path = selective(folder / "calibration", mask=mask, shape=shape)
        return Published([path / "plane.pt"], both(1, selective_basis()), space="norm")

    return write


def angular(file: Path, by_module: Mapping[str, Mapping[str, np.ndarray]]) -> Path:
    np.save(file, np.array(by_module, dtype=object), allow_pickle=True)
    return file


def _angular(folder: Path) -> Published:
    axes = directions(2)
    pair = {"first_direction": axes[0].numpy(), "second_direction": axes[1].numpy()}
    modules = {f"model.layers.{i}.{norm}": pair for i in range(LAYERS) for norm in NORMS}
    file = angular(folder / "steering_config-en-max_sim_1_mid-pca_0.npy", modules)
    return Published([file], both(1, axes), {"sites": "1"}, space="norm")


# One axis.


def gguf(file: Path, by_layer: Mapping[int, Tensor], **fields: str | int | bool) -> Path:
    """repeng's export_gguf, line by line; EasySteer's adds fields."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(by_layer))
    for name, value in fields.items():
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}[type(value)]
        add(f"controlvector.{name}", value)  # type: ignore[operator]
    for layer, direction in by_layer.items():
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _repeng(folder: Path) -> Published:
    by_layer = dict(zip(range(1, LAYERS), directions(LAYERS - 1), strict=True))
    file = gguf(folder / "happy.gguf", by_layer)
    return Published([file], after(by_layer), {"sites": "2-3"})


def _two_ggufs(folder: Path) -> Published:
    one, other = (dict(zip(range(1, LAYERS), directions(3, seed), strict=True)) for seed in (0, 1))
    files = [gguf(folder / "happy.gguf", one), gguf(folder / "honest.gguf", other)]
    axes = {block: torch.stack((one[block], other[block])) for block in one}
    return Published(files, after(axes), {"sites": "2,3"})


def _easysteer(folder: Path) -> Published:
    by_layer = dict(enumerate(directions(LAYERS)))
    file = gguf(folder / "diffmean.gguf", by_layer, method="diffmean", normalize=True,
                token_pos="-1", n_positive=50, n_negative=50)  # fmt: skip
    return Published([file], after(by_layer), {"sites": "1-3"})


def _easysteer_raw(folder: Path) -> Published:
    (direction,) = directions(1)
    torch.save(direction, folder / "raw.pt")
    means = both(2, direction) | both(3, direction)
    return Published([folder / "raw.pt"], means, {"sites": "2 3"})


def _persona(folder: Path) -> Published:
    stack = directions(LAYERS + 1)
    torch.save(stack, folder / "evil_response_avg_diff.pt")
    means = both(0, stack[0]) | both(1, stack[1]) | both(2, stack[2]) | both(3, stack[3])
    return Published([folder / "evil_response_avg_diff.pt"], means, {"sites": "all"})


def _assistant_axis(folder: Path) -> Published:
    stack = directions(LAYERS)
    torch.save(stack.bfloat16(), folder / "assistant_axis.pt")
    by_block = dict(enumerate(stack.bfloat16().float()))
    return Published([folder / "assistant_axis.pt"], after(by_block), {"sites": "1-3"})


def capping(file: Path, cap: float = -3.5) -> tuple[Path, Tensor]:
    stack = directions(LAYERS)
    names = [f"layer_{i}/contrast_role_pos3_default1" for i in range(LAYERS)]
    interventions = [{"vector": names[i], "cap": cap - i} for i in (1, 2)]
    loaded = {
        "vectors": {names[i]: {"vector": stack[i], "layer": i} for i in range(LAYERS)},
        "experiments": [
            {"id": "layers_1:3-p0.25", "interventions": interventions},
            {"id": "layers_1:2-p0.25", "interventions": interventions[:1]},
        ],
    }  # fmt: skip
    torch.save(loaded, file)
    return file, stack


def _capping(folder: Path) -> Published:
    file, stack = capping(folder / "capping_config.pt")
    told = {"experiment": "layers_1:3-p0.25", "residual_rms": 2.0}
    return Published([file], after({1: stack[1], 2: stack[2]}), told)


def _caa(folder: Path) -> Published:
    (direction,) = directions(1)
    file = folder / "vec_layer_1_tiny.pt"
    torch.save(direction, file)
    return Published([file], after({1: direction}))


def _caa_folder(folder: Path) -> Published:
    stack = directions(LAYERS)
    for block, direction in enumerate(stack):
        torch.save(direction.half(), folder / f"vec_layer_{block}_tiny.pt")
    by_block = dict(enumerate(stack.half().float()))
    return Published([folder], after(by_block), {"sites": "1-3"})


def _steering_vectors(folder: Path) -> Published:
    """What its users save: the dict of a SteeringVector's layer_activations."""
    by_block = dict(enumerate(directions(LAYERS)))
    torch.save(by_block, folder / "vector.pt")
    return Published([folder / "vector.pt"], after(by_block), {"sites": "1,2,3.mlp_in"})


def svec(file: Path, by_layer: Mapping[int, Tensor]) -> Path:
    loaded = {
        "model_type": "llama",
        "directions": {str(i): v.tolist() for i, v in by_layer.items()},
        "explained_variances": {str(i): 0.5 for i in by_layer},
    }
    file.write_text(json.dumps(loaded))
    return file


def _ibm(folder: Path) -> Published:
    by_block = dict(enumerate(directions(LAYERS)))
    return Published([svec(folder / "refusal.svec", by_block)], after(by_block), {"sites": "1-3"})


def _aisteer(folder: Path) -> Published:
    by_block = {i: d[None] for i, d in enumerate(directions(LAYERS))}
    return Published([svec(folder / "caa.svec", by_block)], after(by_block), {"sites": "1-3"})


def _aisteer_angular(folder: Path) -> Published:
    """A pre-hook on layer i's own norms turns the plane of layer i."""
    by_layer = {i: directions(2, seed=i) for i in range(LAYERS)}
    means: dict[str, Tensor] = {}
    for layer, axes in by_layer.items():
        means |= both(layer, axes)
    return Published([svec(folder / "angular.svec", by_layer)], means, {"sites": "all"})


def _axbench(folder: Path) -> Published:
    concepts = directions(9)
    torch.save(concepts, folder / "DiffMean_weight.pt")
    torch.save(torch.zeros(9), folder / "DiffMean_bias.pt")
    means = both(2, concepts[5]) | both(3, concepts[5])
    return Published([folder / "DiffMean_weight.pt"], means, {"sites": "2-3", "rows": (5,)})


def sae(folder: Path, hook: str) -> tuple[Path, Tensor]:
    features = directions(40)
    tensors = {"W_dec": features, "W_enc": features.T.contiguous(), "b_dec": torch.zeros(HIDDEN)}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"hook_name": hook, "hook_layer": 1, "d_sae": 40}))
    return folder, features


def _sae_post(folder: Path) -> Published:
    path, features = sae(folder, "blocks.1.hook_resid_post")
    return Published([path], after({1: features[[7, 9]]}), {"rows": (7, 9)})


def _sae_pre(folder: Path) -> Published:
    path, features = sae(folder, "blocks.2.hook_resid_pre")
    means = both(2, features[3]) | both(3, features[3])
    told = {"rows": (3,), "sites": "2-3"}
    return Published([path / "sae_weights.safetensors"], means, told)


def _hotwire(folder: Path) -> Published:
    stack = directions(LAYERS)
    torch.save(stack, folder / "calm.pt")
    return Published([folder], after(dict(enumerate(stack))), {"sites": "1-3"})


def _safetensors(folder: Path) -> Published:
    by_block = dict(enumerate(directions(LAYERS)))
    save_file({f"layer_{i}": d for i, d in by_block.items()}, folder / "vector.safetensors")
    return Published([folder / "vector.safetensors"], after(by_block), {"sites": "1-3"})


def _of_a_norm(folder: Path) -> Published:
    stack = directions(LAYERS)
    torch.save(stack, folder / "probe.pt")
    means = both(1, stack[1]) | both(2, stack[2])
    told = {"sites": "1-2.attn_in 1-2.mlp_in", "space": "norm"}
    return Published([folder / "probe.pt"], means, told, space="norm")


PUBLISHED: dict[str, Writer] = {
    "Selective Steering": _selective,
    "Selective Steering, first half": _first_half,
    "Selective Steering, standard": _standard,
    "Selective Steering, older": _older,
    "basis as a mapping": _basis_as(lambda b1, b2: {"basis": {"b1": b1, "b2": b2}}),
    "b1 and b2 at the top": _basis_as(lambda b1, b2: {"b1": b1, "b2": b2}),
    "vectors [1, d]": _basis_as(lambda b1, b2: {"basis": (b1[None], b2[None])}),
    "Angular Steering": _angular,
    "repeng": _repeng,
    "two control vectors": _two_ggufs,
    "EasySteer": _easysteer,
    "EasySteer, raw": _easysteer_raw,
    "persona vectors": _persona,
    "assistant axis": _assistant_axis,
    "assistant axis, capping": _capping,
    "CAA": _caa,
    "CAA, a folder": _caa_folder,
    "steering-vectors": _steering_vectors,
    "IBM activation-steering": _ibm,
    "AISteer360": _aisteer,
    "AISteer360, angular": _aisteer_angular,
    "AxBench": _axbench,
    "SAELens, resid_post": _sae_post,
    "SAELens, resid_pre": _sae_pre,
    "hotwire": _hotwire,
    "safetensors, a tensor a layer": _safetensors,
    "of a norm's output": _of_a_norm,
}
