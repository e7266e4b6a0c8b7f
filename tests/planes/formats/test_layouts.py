"""Every published layout becomes a plane that does at a norm what its source means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import published
import tiny
from published import HIDDEN, LAYERS, PUBLISHED, Published
from steering_planes import Plane, PlaneError, Site, add, orthonormality_error
from steering_planes.formats import LAYOUTS, import_plane
from steering_planes.sites import named

REFERENCE = Path(__file__).parents[4] / "shared/reference"

TOLD = {"model_type": "llama", "num_layers": LAYERS}
"""What a config would say, where none is at hand."""


def names_llamas(layout: str) -> bool:
    """Whether a layout names Llama's norms, or its model type."""
    ours = ("Selective", "Angular", "basis", "b1", "vectors [1", "IBM", "AISteer")
    return layout.startswith(ours)


CASES = [
    *((layout, "llama") for layout in PUBLISHED),
    # Stores gains less 1, and has four norms a layer.
    *((layout, "gemma2") for layout in PUBLISHED if not names_llamas(layout)),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random models in float64, each with its `folder` and its norms' names."""
    made = {}
    for name in ("llama", "gemma2"):
        folder = tmp_path_factory.mktemp("models") / name
        made[name] = tiny.make(name, folder).double()
        made[name].folder, made[name].norms = folder, tiny.ARCHITECTURES[name].norms
    return made


@pytest.fixture(scope="module")
def llama(models: dict[str, Any]) -> Any:
    return models["llama"]


def imported(source: Published, model: Any, folder: Path) -> Plane:
    told = {"base_model": str(model.folder), **source.told}
    plane = import_plane(source.sources, name="plane", **told)
    plane.save(folder / "saved")
    return Plane.load(folder / "saved")


@pytest.mark.parametrize(("layout", "architecture"), CASES)
def test_a_layout_is_a_plane(
    layout: str, architecture: str, models: dict[str, Any], tmp_path: Path
) -> None:
    source, model = PUBLISHED[layout](tmp_path), models[architecture]
    plane = imported(source, model, tmp_path)
    sites = set(map(str, plane.sites))
    assert sites <= source.means.keys()
    if "sites" not in source.told:
        assert sites == source.means.keys()
    assert (plane.config.num_layers, plane.config.hidden_size) == (LAYERS, HIDDEN)
    assert plane.config.model_type == model.config.model_type
    assert plane.config.fingerprint is not None
    for site, basis in plane.bases.items():
        assert orthonormality_error(basis) <= 1e-6
        axes = source.means[str(site)].double()
        effects = axes if source.space == "norm" else effect(model, site, axes)
        # b1 is the first direction's own; the second lies in the plane.
        moved = add(torch.zeros(HIDDEN), basis, 0.0, 1.0)
        assert cosine(moved, effects[0]) >= 1 - 1e-6
        if len(effects) == 2:
            inside = basis.double().T @ (basis.double() @ effects[1])
            assert cosine(inside, effects[1]) >= 1 - 1e-6


def effect(model: Any, site: Site, axes: Tensor) -> Tensor:
    """[k, d]: what each direction, added to the residual stream before the site's layer, does to
    the norm's output, times the token's own rms; with attention's own answer held as it was."""
    layer = model.model.layers[site.layer]
    norm = getattr(layer, model.norms[site.role])
    ids = torch.tensor([[5, 9, 17, 33]])
    seen: dict[str, Tensor] = {}

    def run(shift: Tensor | None) -> Tensor:
        def before(module: Any, args: Any) -> Any:
            return args if shift is None else (args[0] + 0.1 * shift, *args[1:])

        def attention(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
            if shift is None:
                seen["attention"] = out[0]
                return out
            return (seen["attention"], *out[1:])

        def at_norm(module: Any, args: Any, out: Tensor) -> None:
            rms = args[0].square().mean(-1, keepdim=True).sqrt()
            seen["scaled"] = out * rms

        handles = [
            layer.register_forward_pre_hook(before),
            layer.self_attn.register_forward_hook(attention, with_kwargs=True),
            norm.register_forward_hook(at_norm),
        ]
        with torch.no_grad():
            model(ids)
        for handle in handles:
            handle.remove()
        return seen["scaled"][0, -1]

    plain = run(None)
    return torch.stack([(run(direction) - plain) / 0.1 for direction in axes])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize("layout", ["repeng", "persona vectors", "IBM activation-steering"])
def test_the_second_axis_is_the_first_component_over_the_sites(
    layout: str, tmp_path: Path, llama: Any
) -> None:
    source = PUBLISHED[layout](tmp_path)
    plane = imported(source, llama, tmp_path)
    units = np.stack([
        (v := effect(llama, Site.parse(site), axes.double())[0]).numpy() / float(v.norm())
        for site, axes in source.means.items()
    ])  # fmt: skip
    centred = units - units.mean(0)
    component = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    for basis in plane.bases.values():
        b1, b2 = basis.double().numpy()
        wanted = component - (component @ b1) * b1
        assert abs(wanted @ b2) / np.linalg.norm(wanted) >= 1 - 1e-6


def test_caps_become_the_planes_default(llama: Any, tmp_path: Path) -> None:
    """x . v / |v| <= cap, of a token whose rms is 2, at norms whose gain is even."""
    source = PUBLISHED["assistant axis, capping"](tmp_path)
    plane = imported(source, llama, tmp_path)
    config = plane.config
    assert (config.default_mode, config.default_angle, config.default_strength) == ("cap", 0.0, 1.0)
    assert plane.means is not None
    for site, means in plane.means.items():
        unit = source.means[str(site)].double()
        length = float(effect(llama, site, unit / unit.norm())[0].norm())
        cap = -3.5 - (site.layer - 1)
        assert means.positive[0] == pytest.approx(cap * length / 2.0, rel=1e-5)
        assert means.negative == (0.0, 0.0)
        assert means.rho == pytest.approx(abs(means.positive[0]), rel=1e-6)


NEEDS_MORE: dict[str, tuple[Mapping[str, Any], str]] = {
    "repeng": ({"sites": None}, r"name the sites to steer \(--sites\), of 2-3.attn_in, 2-3.mlp_in"),
    "persona vectors": ({"sites": "7"}, "sites=7: sites='7': layer 7 is not among 0-3.attn_in"),
    "AxBench": ({"rows": ()}, "9 concepts .* with --row"),
    "SAELens, resid_post": ({"rows": (40,)}, "row=40: must be 0 to 39"),
    "EasySteer, raw": ({"sites": None}, "selects none"),
    "EasySteer": ({"sites": "0"}, "layer 0 is not among 1-3.attn_in"),
    "assistant axis, capping": ({"experiment": None}, "experiment=None: must be one of layers_1:3"),
    "IBM activation-steering": ({"model_type": "qwen2"}, "model_type=llama: must be 'qwen2'"),
    "CAA": ({"model_type": "qwen2"}, "model_type=qwen2: must be 'llama', as"),
    "hotwire": ({"num_layers": 3}, "num_layers=3: must be 4, as"),
}


@pytest.mark.parametrize("layout", NEEDS_MORE)
def test_what_a_source_does_not_say_is_asked_for(layout: str, llama: Any, tmp_path: Path) -> None:
    source = PUBLISHED[layout](tmp_path)
    more, rule = NEEDS_MORE[layout]
    told = {"base_model": str(llama.folder), **source.told, **more}
    with pytest.raises(PlaneError, match=rule) as caught:
        import_plane(source.sources, name="plane", **told)
    assert "\n" not in str(caught.value)


def test_caps_without_an_rms_are_refused(llama: Any, tmp_path: Path) -> None:
    source = PUBLISHED["assistant axis, capping"](tmp_path)
    told = {**source.told, "residual_rms": None, "base_model": str(llama.folder)}
    with pytest.raises(PlaneError, match=r"--residual-rms"):
        import_plane(source.sources, name="plane", **told)
    plane = import_plane(
        source.sources, name="plane", **told | {"space": "norm", "sites": "1.mlp_in"}
    )
    assert plane.means is not None
    assert plane.means[Site(1, "mlp_in")].positive[0] == -4.5


# The model.


def test_a_models_facts_are_read_or_asked_for(llama: Any, tmp_path: Path) -> None:
    """A mask that names half the layers says nothing of how many there are, nor does a name."""
    source = PUBLISHED["Selective Steering, first half"](tmp_path)
    with pytest.raises(PlaneError, match=r"--base-model, or --model-type and --num-layers"):
        import_plane(source.sources, name="plane")
    with pytest.raises(PlaneError, match=r"model_type=None: meta-llama/Llama-9 is no folder"):
        import_plane(source.sources, name="plane", base_model="meta-llama/Llama-9", num_layers=4)
    for told in (TOLD, {"base_model": str(llama.folder)}):
        plane = import_plane(source.sources, name="plane", **told)
        assert plane.config.num_layers == LAYERS
        assert plane.config.base_model_name_or_path == "org/tiny"
        assert named(plane.sites) == "0-1.attn_in, 0-1.mlp_in"


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("mixtral", "mixtral"), ("qwen3_moe", "qwen3_moe"), ("gemma3", "gemma3_text")],
)
def test_a_model_type_is_the_configs(architecture: str, kind: str, tmp_path: Path) -> None:
    tiny.make(architecture, tmp_path / "Mistral-Qwen3-Llama")
    source = PUBLISHED["persona vectors"](tmp_path)
    plane = import_plane(
        source.sources, name="plane", base_model=str(tmp_path / "Mistral-Qwen3-Llama"), sites="2"
    )
    assert plane.config.model_type == kind
    assert plane.config.base_model_name_or_path == "Mistral-Qwen3-Llama"


def test_a_multimodal_models_type_is_its_texts(tmp_path: Path) -> None:
    from transformers import Gemma3Config

    config = Gemma3Config(text_config={"num_hidden_layers": 4, "hidden_size": HIDDEN})
    config.save_pretrained(tmp_path / "vision")
    source = PUBLISHED["Selective Steering, first half"](tmp_path)
    plane = import_plane(source.sources, name="plane", base_model=str(tmp_path / "vision"))
    assert (plane.config.model_type, plane.config.num_layers) == ("gemma3_text", 4)
    assert plane.config.fingerprint is None


def test_a_model_in_the_hubs_cache_is_read(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repository = tmp_path / "hub/models--org--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(llama.folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = PUBLISHED["Selective Steering, first half"](tmp_path)
    plane = import_plane(source.sources, name="plane")
    assert (plane.config.model_type, plane.config.num_layers) == ("llama", LAYERS)
    assert plane.config.fingerprint is not None


def test_another_width_is_refused(llama: Any, tmp_path: Path) -> None:
    torch.save(torch.randn(64), tmp_path / "raw.pt")
    for told in ({"sites": "2"}, {"sites": "2.attn_in", "space": "norm"}):
        with pytest.raises(PlaneError, match=r"hidden_size=64: must be 128"):
            import_plane([tmp_path / "raw.pt"], name="plane", base_model=str(llama.folder), **told)


def test_directions_need_no_model_at_a_norms_output(tmp_path: Path) -> None:
    torch.save(published.directions(LAYERS), tmp_path / "probe.pt")
    told: dict[str, Any] = {"base_model": "org/unheard-of", "space": "norm", **TOLD}
    plane = import_plane([tmp_path / "probe.pt"], name="plane", sites="1-2.attn_in", **told)
    assert named(plane.sites) == "1-2.attn_in"
    with pytest.raises(PlaneError, match=r"say which norms with --sites"):
        import_plane([tmp_path / "probe.pt"], name="plane", sites="1-2", **told)
    with pytest.raises(PlaneError, match=r"give its folder with --base-model, or --space norm"):
        import_plane([tmp_path / "probe.pt"], name="plane", sites="1", **told | {"space": None})


# What is no layout.


def test_an_unknown_layout_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "vec_layer_3.bin"
    file.write_bytes(b"x")
    with pytest.raises(PlaneError, match=r"the nearest is vec_layer_13\.pt \(CAA") as caught:
        import_plane([file], name="plane")
    for layout in LAYOUTS:
        assert str(layout) in str(caught.value)


def test_a_folder_of_several_is_asked_about(tmp_path: Path) -> None:
    for trait in ("evil", "kind"):
        torch.save(published.directions(5), tmp_path / f"{trait}.pt")
    with pytest.raises(PlaneError, match=r"holds several: name one of evil\.pt, kind\.pt"):
        import_plane([tmp_path], name="plane")
    with pytest.raises(PlaneError, match=r"no such file"):
        import_plane([tmp_path / "none"], name="plane")


def test_another_projects_steering_config_is_one_line(tmp_path: Path) -> None:
    """Soup's folder has a file of our name, and nothing else of ours."""
    from safetensors.torch import save_file

    save_file({"steering": torch.randn(3, 3, 8)}, tmp_path / "steering_vector.safetensors")
    (tmp_path / "steering_config.json").write_text('{"layer": 12, "scale": 2.0}')
    for attempt in (lambda: import_plane([tmp_path], name="p"), lambda: Plane.load(tmp_path)):
        with pytest.raises(PlaneError) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_our_own_plane_is_served_as_it_is(llama: Any, tmp_path: Path) -> None:
    plane = imported(PUBLISHED["CAA"](tmp_path), llama, tmp_path)
    assert plane.config.fingerprint is not None
    with pytest.raises(PlaneError, match=r"is a steering plane already"):
        import_plane([tmp_path / "saved"], name="plane")


@pytest.mark.parametrize("name", ["plane.pt", "a.npy", "a.gguf", "a.svec", "a.safetensors", "v.pt"])
def test_an_lfs_pointer_is_named_as_such(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 8405\n"
    )
    with pytest.raises(
        PlaneError, match=r"is a Git LFS pointer, not the file itself: .*git lfs pull"
    ):
        import_plane([file], name="plane")


@pytest.mark.parametrize(
    "name", ["plane.pt", "a.npy", "a.gguf", "a.svec", "a.safetensors", "v.pt", "a.bin"]
)
def test_rubbish_is_one_line(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"rubbish")
    for each in (file, tmp_path / f"no-{name}"):
        with pytest.raises(PlaneError) as caught:
            import_plane([each], name="plane", sites="0", **TOLD)
        assert "\n" not in str(caught.value)


# The artifacts of Selective Steering's authors.

ARTIFACTS = [
    ("Llama-3.2-1B-Instruct", "llama", 16, 18, 2),
    ("Qwen2.5-7B-Instruct", "qwen2", 28, 26, 2),
    ("gemma-2-2b-it", "gemma2", 26, 40, 4),
]


@pytest.mark.skipif(not REFERENCE.exists(), reason="the published artifacts are not in a clone")
@pytest.mark.parametrize(("name", "kind", "layers", "selected", "roles"), ARTIFACTS)
def test_the_published_planes_have_the_published_sites(
    name: str, kind: str, layers: int, selected: int, roles: int
) -> None:
    source = REFERENCE / f"calibration_{name}"
    plane = import_plane([source], name="refusal", model_type=kind, num_layers=layers)
    assert len(plane.sites) == selected
    assert len({site.role for site in plane.sites}) == roles
    assert plane.config.base_model_name_or_path.endswith(f"/{name}")
    assert (plane.config.default_mode, plane.config.gate) == ("rotate_by", None)
    assert all(orthonormality_error(basis) <= 1e-6 for basis in plane.bases.values())


@pytest.mark.skipif(not REFERENCE.exists(), reason="the published artifacts are not in a clone")
def test_variants_of_a_published_plane(tmp_path: Path) -> None:
    source = REFERENCE / "calibration_Llama-3.2-1B-Instruct"
    loaded = torch.load(source / "plane.pt", weights_only=True, map_location="cpu")
    told: dict[str, Any] = {"model_type": "llama", "num_layers": 16}
    whole = import_plane([source], name="refusal", **told)

    def variant(**changes: Any) -> Path:
        folder = tmp_path / f"variant{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in ("config.json", "metadata.json"):
            (folder / file).write_bytes((source / file).read_bytes())
        torch.save({**loaded, **changes}, folder / "plane.pt")
        return folder

    def with_extra(**changes: Any) -> Path:
        return variant(extra_info={**loaded["extra_info"], **changes})

    mask = loaded["extra_info"]["layer_steering_mask"]
    half = {module: on for module, on in mask.items() if int(module.split(".")[2]) < 8}
    halved = import_plane([with_extra(layer_steering_mask=half)], name="refusal", **told)
    assert halved.config.num_layers == 16
    assert set(halved.sites) == {site for site in whole.sites if site.layer < 8}
    with pytest.raises(PlaneError, match=r"layer_steering_mask is missing .*--sites"):
        import_plane([with_extra(layer_steering_mask=None)], name="refusal", **told)
    by_hand = import_plane([with_extra(layer_steering_mask=None)], name="r", sites="8-15", **told)
    assert named(by_hand.sites) == "8-15.attn_in, 8-15.mlp_in"
    b1, b2 = loaded["basis"]
    for basis in ({"b1": b1, "b2": b2}, (b1[None], b2[None])):
        again = import_plane([variant(basis=basis)], name="refusal", **told)
        assert all(torch.equal(again.bases[site], whole.bases[site]) for site in whole.sites)


# What a file's own words mean.


def test_a_part_of_a_block_is_no_block(llama: Any, tmp_path: Path) -> None:
    """Outputs of norms, of sublayers, and hooks before a block are not what a block puts out."""
    one, other = published.directions(2)
    for key in (
        "model.layers.1.input_layernorm",
        "blocks.1.hook_resid_pre",
        "model.layers.1.self_attn",
        "layers.1.mlp.down_proj",
        "hidden_states.1",
    ):
        torch.save({key: one}, tmp_path / "v.pt")
        with pytest.raises(PlaneError, match=r"layer=.*: must be a layer's number"):
            import_plane([tmp_path / "v.pt"], name="p", base_model=str(llama.folder), sites="2")
    for keys in ((1, "1"), ("layers.1", "model.layers.1")):
        torch.save(dict(zip(keys, (one, other), strict=True)), tmp_path / "v.pt")
        with pytest.raises(PlaneError, match="is a second one of that layer"):
            import_plane([tmp_path / "v.pt"], name="p", base_model=str(llama.folder), sites="2")


def test_directions_of_another_place_are_refused_by_name(llama: Any, tmp_path: Path) -> None:
    by_block = dict(enumerate(published.directions(3)))
    for kind, refused in (("decoder_block", False), ("input_layernorm", True)):
        torch.save({"layer_activations": by_block, "layer_type": kind}, tmp_path / "v.pt")
        told = {"name": "p", "base_model": str(llama.folder), "sites": "2"}
        if not refused:
            assert import_plane([tmp_path / "v.pt"], **told)
            continue
        with pytest.raises(PlaneError, match="layer_type=input_layernorm: must be decoder_block"):
            import_plane([tmp_path / "v.pt"], **told)


def test_numpy_arrays_in_an_archive_are_read(llama: Any, tmp_path: Path) -> None:
    by_block = {i: d.numpy() for i, d in enumerate(published.directions(3))}
    torch.save(by_block, tmp_path / "v.pt")
    plane = import_plane([tmp_path / "v.pt"], name="p", base_model=str(llama.folder), sites="2")
    wanted = effect(llama, Site(2, "attn_in"), torch.from_numpy(by_block[1])[None].double())[0]
    assert cosine(plane.bases[Site(2, "attn_in")][0], wanted) >= 1 - 1e-6


def test_one_direction_is_read_at_its_own_layer(llama: Any, tmp_path: Path) -> None:
    (direction,) = published.directions(1)
    torch.save({"vector": direction, "layer": 1}, tmp_path / "v.pt")
    published.gguf(tmp_path / "v.gguf", {1: direction})
    torch.save(direction[None], tmp_path / "vec_layer_1_x.pt")
    for name in ("v.pt", "v.gguf", "vec_layer_1_x.pt"):
        plane = import_plane([tmp_path / name], name="p", base_model=str(llama.folder))
        assert named(plane.sites) == "2.attn_in, 2.mlp_in"


def test_layers_beyond_the_model_are_refused(llama: Any, tmp_path: Path) -> None:
    published.gguf(tmp_path / "v.gguf", dict(enumerate(published.directions(9), 1)))
    with pytest.raises(PlaneError, match="layer=4: must be at most 3, of a model of 4 layers"):
        import_plane([tmp_path / "v.gguf"], name="p", base_model=str(llama.folder), sites="2")


@pytest.mark.parametrize(
    ("hook", "rule"),
    [
        ("blocks.1.hook_resid_mid", "is not the residual stream between blocks"),
        ("blocks.1.ln1.hook_normalized", "is not the residual stream between blocks"),
        ("unheard of", "must be blocks.<layer>.<hook>"),
        (None, "names the hook, and is missing"),
    ],
)
def test_a_hook_that_is_no_blocks_end_must_be_explained(
    hook: str | None, rule: str, llama: Any, tmp_path: Path
) -> None:
    published.sae(tmp_path, hook or "")
    if hook is None:
        (tmp_path / "cfg.json").unlink()
    told = {"name": "p", "base_model": str(llama.folder), "rows": (1,), "sites": "1.mlp_in"}
    with pytest.raises(PlaneError, match=rule):
        import_plane([tmp_path], **told)
    if hook != "unheard of":
        more = {"space": "residual", "index": "hidden-states"}
        assert named(import_plane([tmp_path], **told, **more).sites) == "1.mlp_in"


def test_an_option_that_says_nothing_of_a_source_is_refused(llama: Any, tmp_path: Path) -> None:
    for number, (layout, useless) in enumerate(
        {
            "Angular Steering": {"space": "residual"},
            "Selective Steering": {"rows": (1,)},
            "repeng": {"experiment": "x"},
            "CAA": {"residual_rms": 3.0},
            "of a norm's output": {"index": "block-output"},
            "EasySteer, raw": {"rows": (1,)},
            "assistant axis, capping": {"rows": (1,)},
        }.items()
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        source = PUBLISHED[layout](folder)
        told = {"base_model": str(llama.folder), **source.told, **useless}
        (field,) = useless
        field = "row" if field == "rows" else field
        with pytest.raises(PlaneError, match=f"{field}="):
            import_plane(source.sources, name="p", **told)


def test_caps_that_no_site_can_hold_are_named(llama: Any, tmp_path: Path) -> None:
    file, _ = published.capping(tmp_path / "capping_config.pt")
    loaded = torch.load(file, weights_only=True)
    name = list(loaded["vectors"])[LAYERS - 1]
    loaded["experiments"][0]["interventions"].append({"vector": name, "cap": -1.0})
    torch.save(loaded, file)
    told: dict[str, Any] = {"experiment": "layers_1:3-p0.25", "residual_rms": 2.0}
    told |= {"name": "p", "base_model": str(llama.folder)}
    with pytest.raises(PlaneError, match=r"no site reads block 3's output: name the sites to cap"):
        import_plane([file], **told)
    assert named(import_plane([file], **told, sites="2").sites) == "2.attn_in, 2.mlp_in"
    torch.save(published.directions(LAYERS), tmp_path / "v.pt")
    with pytest.raises(PlaneError, match=r"name capping_config\.pt alone"):
        import_plane([file, tmp_path / "v.pt"], **told, sites="2")


def test_a_cap_is_along_one_direction_of_the_models_width(tmp_path: Path) -> None:
    file, stack = published.capping(tmp_path / "capping_config.pt")
    loaded = torch.load(file, weights_only=True)
    entry = loaded["vectors"][list(loaded["vectors"])[1]]
    told: dict[str, Any] = {"base_model": "org/m", "model_type": "llama", "num_layers": LAYERS}
    told |= {"space": "norm", "sites": "all.attn_in", "experiment": "layers_1:3-p0.25"}
    for wrong, rule in (
        (stack[1][:-1], r"layer 2=\[1, 128\]: must be \[1, 127\], as in the other layers"),
        (stack[:2], r"interventions\.0\.vector\.shape=\[2, 128\]: must be \[d\]"),
        (stack[1] * 0, r"interventions\.0\.vector=0\.0: must not be zero"),
    ):
        entry["vector"] = wrong
        torch.save(loaded, file)
        with pytest.raises(PlaneError, match=rule):
            import_plane([file], name="p", **told)


@pytest.mark.parametrize("told_by", ["base_model", "model_type"])
def test_roles_are_the_models_own(told_by: str, models: dict[str, Any], tmp_path: Path) -> None:
    """Angular Steering names the norms that feed sublayers: of Gemma-2, these two of four."""
    pair = {
        f"{axis}_direction": v.numpy()
        for axis, v in zip(("first", "second"), published.directions(2), strict=True)
    }
    norms = ("input_layernorm", "pre_feedforward_layernorm")
    modules = {f"model.layers.{i}.{norm}": pair for i in range(LAYERS) for norm in norms}
    file = published.angular(tmp_path / "steering_config.npy", modules)
    told: dict[str, Any] = {"base_model": str(models["gemma2"].folder)}
    if told_by == "model_type":
        told = {"base_model": "org/g", "model_type": "gemma2", "num_layers": LAYERS}
    plane = import_plane([file], name="p", sites="1", **told)
    assert named(plane.sites) == "1.attn_in, 1.mlp_in"
    assert plane.config.default_mode == "rotate_to"
    only = published.angular(
        tmp_path / "only.npy", {"model.layers.1.post_attention_layernorm": pair}
    )
    plane = import_plane([only], name="p", sites="all", **told)
    assert named(plane.sites) == "1.attn_out"
    other = published.angular(tmp_path / "other.npy", {"model.layers.1.ln_1": pair})
    with pytest.raises(PlaneError, match=r"is no norm of gemma2, which has input_layernorm, post"):
        import_plane([other], name="p", sites="all", **told)
