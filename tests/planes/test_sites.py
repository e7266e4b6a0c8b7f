"""steering_planes.sites: norms are found by role, whatever the family calls them."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from steering_planes.sites import ROLES, Site, SitesNotFoundError, find_sites

LAYERS = 3
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}
TWO = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm"}
GEMMA = {
    "attn_in": "input_layernorm",
    "attn_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
FAMILIES: list[tuple[str, Callable[[], transformers.PreTrainedConfig], str, dict[str, str]]] = [
    ("llama", lambda: transformers.LlamaConfig(**SMALL), "model.layers", TWO),
    ("qwen2", lambda: transformers.Qwen2Config(**SMALL), "model.layers", TWO),
    ("qwen3", lambda: transformers.Qwen3Config(**SMALL), "model.layers", TWO),
    ("mistral", lambda: transformers.MistralConfig(**SMALL), "model.layers", TWO),
    ("gemma2", lambda: transformers.Gemma2Config(**SMALL), "model.layers", GEMMA),
    ("gemma3", lambda: transformers.Gemma3TextConfig(**SMALL), "model.layers", GEMMA),
    (
        "olmo2",
        lambda: transformers.Olmo2Config(**SMALL),
        "model.layers",
        {"attn_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    ),
    (
        "glm4",
        lambda: transformers.Glm4Config(**SMALL),
        "model.layers",
        {
            "attn_in": "input_layernorm",
            "attn_out": "post_self_attn_layernorm",
            "mlp_in": "post_attention_layernorm",
            "mlp_out": "post_mlp_layernorm",
        },
    ),
    (
        "gpt2",
        lambda: transformers.GPT2Config(n_layer=LAYERS, n_embd=32, n_head=4, vocab_size=64),
        "transformer.h",
        {"attn_in": "ln_1", "mlp_in": "ln_2"},
    ),
    (
        "gpt_neox",
        lambda: transformers.GPTNeoXConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=64,
        ),
        "gpt_neox.layers",
        TWO,
    ),
    (
        "cohere",
        lambda: transformers.CohereConfig(**SMALL),
        "model.layers",
        {"attn_in": TWO["attn_in"]},
    ),
]


@pytest.mark.parametrize(
    ("config", "stack", "layout"), [f[1:] for f in FAMILIES], ids=[f[0] for f in FAMILIES]
)
def test_families(
    config: Callable[[], transformers.PreTrainedConfig], stack: str, layout: dict[str, str]
) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    sites = find_sites(model, LAYERS)
    assert list(sites) == sorted(Site(i, role) for i in range(LAYERS) for role in layout)
    for site, module in sites.items():
        assert module is model.get_submodule(f"{stack}.{site.layer}.{layout[site.role]}")


def test_a_multimodal_wrapper_gives_its_language_model() -> None:
    text = transformers.Gemma3TextConfig(**SMALL)
    # As many layers as the decoder, so that the length alone can't tell them apart.
    vision = transformers.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict())
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(config)
    sites = find_sites(model, LAYERS)
    assert len(sites) == 4 * LAYERS
    layers = model.model.language_model.layers
    assert sites[Site(1, "mlp_in")] is layers[1].pre_feedforward_layernorm


class PPMissingLayer(nn.Identity):
    """vLLM's placeholder for a layer of another pipeline stage."""


def block(*names: str) -> nn.Module:
    module = nn.Module()
    for name in names:
        module.add_module(name, nn.LayerNorm(4))
    return module


def stacked(*layers: nn.Module, at: str = "layers") -> nn.Module:
    model = nn.Module()
    model.add_module("model", nn.Module())
    model.model.add_module(at, nn.ModuleList(layers))
    return model


def test_other_pipeline_stages_are_skipped_and_indices_stay() -> None:
    here = block("input_layernorm", "post_attention_layernorm")
    sites = find_sites(stacked(PPMissingLayer(), here, PPMissingLayer()), 3)
    assert sites == {
        Site(1, "attn_in"): here.input_layernorm,
        Site(1, "mlp_in"): here.post_attention_layernorm,
    }


def test_a_removed_norm_is_no_site() -> None:
    layer = block("input_layernorm", "post_attention_layernorm")
    layer.post_attention_layernorm = nn.Identity()
    assert list(find_sites(stacked(layer), 1)) == [Site(0, "attn_in")]


def test_the_sandwich_of_afmoe_is_not_read_as_llama() -> None:
    names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_mlp_layernorm",
        "post_mlp_layernorm",
    )
    layer = block(*names)
    sites = find_sites(stacked(layer), 1)
    assert sites[Site(0, "attn_out")] is layer.post_attention_layernorm
    assert sites[Site(0, "mlp_in")] is layer.pre_mlp_layernorm


def test_final_and_qk_norms_are_no_sites() -> None:
    layer = block("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")
    model = stacked(layer)
    model.model.norm = nn.LayerNorm(4)
    assert len(find_sites(model, 1)) == 2


def test_never_an_empty_result() -> None:
    with pytest.raises(SitesNotFoundError, match=r"no ModuleList of num_layers=5.*Linear"):
        find_sites(nn.Sequential(nn.Linear(2, 2)), 5)
    with pytest.raises(SitesNotFoundError, match=r"Linear.*"):
        find_sites(stacked(nn.Linear(2, 2)), 1)
    with pytest.raises(SitesNotFoundError, match="strange_norm"):
        find_sites(stacked(block("strange_norm")), 1)


def test_two_possible_decoders_are_refused() -> None:
    model = stacked(block("ln_1", "ln_2"))
    model.model.add_module("others", nn.ModuleList([block("ln_1", "ln_2")]))
    with pytest.raises(SitesNotFoundError, match=r"model\.layers, model\.others"):
        find_sites(model, 1)


def test_a_site_is_written_and_read() -> None:
    assert str(Site(18, "attn_in")) == "18.attn_in"
    for role in ROLES:
        assert Site.parse(str(Site(0, role))) == Site(0, role)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "18",
        "18.",
        ".attn_in",
        "-1.attn_in",
        "018.attn_in",
        "18.q_norm",
        "x.mlp_in",
        "1.5.mlp_in",
    ],
)
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="="):
        Site.parse(text)
