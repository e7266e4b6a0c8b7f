"""`steering calibrate` on a tiny model: activations, the command, and generation with hooks."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from typer.testing import CliRunner

from steering_planes.artifact import Plane
from steering_planes.geometry import rotate_to
from steering_planes.sites import Site, find_sites
from steering_server.activations import collect, encode, prompt_text
from steering_server.cli.calibrate import calibrate
from steering_server.evaluation.generation import generate

PROMPTS = ["tell me about cats", "describe rain", "what is a good chair made of", "bread"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CONTRAST = {
    "positive": {"system": "be happy"},
    "negative": {"system": "be sad now"},
    "prompts": PROMPTS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a word tokenizer that would add BOS by itself."""
    path = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    words = sorted({w for p in PROMPTS for w in p.split()} | {"be", "happy", "sad", "now"})
    special = ["<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocabulary = {word: index for index, word in enumerate(special + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def contrast_set(tmp_path: Path) -> Path:
    file = tmp_path / "mood.json"
    file.write_text(json.dumps(CONTRAST))
    return file


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Activations.


def test_bos_is_there_once(tokenizer: Any) -> None:
    batch = encode(tokenizer, [user(prompt) for prompt in PROMPTS], "right")
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum(1).tolist() == [1] * len(PROMPTS)


def test_the_last_token_is_the_generation_prompt(tokenizer: Any) -> None:
    batch = encode(tokenizer, [user(PROMPTS[0])], "right")
    assert tokenizer.decode(batch["input_ids"][0, -1]) == "<assistant>"


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_batches_give_what_single_prompts_give(model: Any, tokenizer: Any, batch_size: int) -> None:
    found = collect(model, tokenizer, [user(prompt) for prompt in PROMPTS], batch_size)
    assert list(found) == [Site(i, role) for i in range(2) for role in ("attn_in", "mlp_in")]
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(
            prompt_text(tokenizer, user(prompt)), add_special_tokens=False, return_tensors="pt"
        )["input_ids"]
        seen: list[Tensor] = []
        norm = model.model.layers[1].post_attention_layernorm
        handle = norm.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(ids)
        handle.remove()
        torch.testing.assert_close(
            found[Site(1, "mlp_in")][row], seen[0][0, -1], rtol=1e-4, atol=1e-5
        )


def test_hooks_are_gone_afterwards(model: Any, tokenizer: Any) -> None:
    collect(model, tokenizer, [user("bread")])
    generate(model, tokenizer, ["bread"], max_tokens=1)
    assert not any(module._forward_hooks for module in find_sites(model, 2).values())


def test_a_tokenizer_without_a_template_is_refused(folder: Path) -> None:
    bare = transformers.AutoTokenizer.from_pretrained(folder)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompt_text(bare, user("bread"))


# The command.


def invoke(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(calibrate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run(folder: Path, contrast_set: Path, output: Path, *more: str) -> Any:
    return invoke(
        folder,
        *("--contrast-set", contrast_set, "--output", output),
        *("--planes", "per_site", "--granularity", "site", *more),
    )


def test_it_writes_an_artifact(folder: Path, contrast_set: Path, tmp_path: Path) -> None:
    result = run(folder, contrast_set, tmp_path / "mood", "--default-mode", "rotate_to")
    assert result.exit_code == 0, result.output
    plane = Plane.load(tmp_path / "mood")
    config = plane.config
    assert config.name == "mood"
    assert config.base_model_name_or_path == "Tiny-Llama"
    assert (config.model_type, config.hidden_size, config.num_layers) == ("llama", 32, 2)
    assert config.default_mode == "rotate_to"
    assert config.extraction.n == len(PROMPTS)
    assert config.extraction.data.startswith("mood.json sha256:")
    assert config.extraction.chat_template_sha256
    assert ", ".join(map(str, plane.sites)) in result.output


def test_calibrating_twice_gives_the_same_plane(
    folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        assert run(folder, contrast_set, tmp_path / name, "--name", "mood").exit_code == 0
    one, two = Plane.load(tmp_path / "one"), Plane.load(tmp_path / "two")
    assert one.sites == two.sites
    for site in one.sites:
        cosines = (one.bases[site] * two.bases[site]).sum(1)
        assert float(cosines.min()) >= 0.999


def test_the_card_says_how_and_what(
    folder: Path,
    contrast_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/steering", "calibrate", "A model", "--margin", "2"])
    (tmp_path / "table.md").write_text("| 0° | +0.9 |\n")
    result = run(folder, contrast_set, tmp_path / "mood", "--measured", str(tmp_path / "table.md"))
    assert result.exit_code == 0, result.output
    card = (tmp_path / "mood" / "README.md").read_text()
    assert f"    {shlex.join(['steering', 'calibrate', 'A model', '--margin', '2'])}\n" in card
    assert "# Steering plane `mood` for Tiny-Llama" in card
    assert "| 0° | +0.9 |" in card
    assert "{" not in card
    for site in Plane.load(tmp_path / "mood").sites:
        assert f"\n| {site} | " in card


def test_an_existing_output_is_kept_unless_forced(
    folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mood"
    output.mkdir()
    (output / "mine").write_text("precious")
    result = run(folder, contrast_set, output)
    assert isinstance(result.exception, FileExistsError)
    assert (output / "mine").exists()
    assert run(folder, contrast_set, output, "--force").exit_code == 0
    assert not (output / "mine").exists()
    Plane.load(output)


def test_a_format_confound_is_warned_of(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "lists.json"
    wrapped = [f"please be good now {prompt}" for prompt in PROMPTS]
    sides = {"positive": {"prompts": wrapped}, "negative": {"prompts": PROMPTS}}
    file.write_text(json.dumps(sides))
    result = run(folder, file, tmp_path / "mood")
    assert (
        "warning: 100% of the positive and 0% of the negative prompts begin with" in result.stderr
    )


# Generation.


@pytest.fixture
def plane(folder: Path, contrast_set: Path, tmp_path: Path) -> Plane:
    assert run(folder, contrast_set, tmp_path / "mood").exit_code == 0
    return Plane.load(tmp_path / "mood")


def test_unsteered_text_is_the_models_own(model: Any, tokenizer: Any, plane: Plane) -> None:
    plain = generate(model, tokenizer, PROMPTS, max_tokens=6, batch_size=3)
    batch = encode(tokenizer, [user(PROMPTS[2])], "left")
    ids = model.generate(**batch, max_new_tokens=6, do_sample=False)
    own = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert plain[2] == own
    assert generate(model, tokenizer, PROMPTS, max_tokens=6, plane=plane, angle=0.0) == plain


def test_every_token_is_steered(model: Any, tokenizer: Any, plane: Plane) -> None:
    """Greedy decoding without a cache, all tokens rotated at each step, gives the same text."""
    prompt, steps = PROMPTS[2], 6
    modules = find_sites(model, 2)
    handles = [
        modules[site].register_forward_hook(
            lambda m, i, out, basis=plane.bases[site]: rotate_to(out, basis, 180).float()
        )
        for site in plane.sites
    ]
    ids = encode(tokenizer, [user(prompt)], "left")["input_ids"]
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    for handle in handles:
        handle.remove()
    expected = tokenizer.decode(ids[0, length:], skip_special_tokens=True)
    got = generate(
        model, tokenizer, [prompt], max_tokens=steps, plane=plane, angle=180, mode="rotate_to"
    )
    assert got == [expected]
    assert got != generate(model, tokenizer, [prompt], max_tokens=steps)
