"""`steering calibrate` on a tiny model, and generation with hooks."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import engines
from planes import random_plane
from steering_planes.artifact import Plane
from steering_planes.geometry import rotate_to
from steering_planes.sites import Site, find_sites
from steering_planes.tables import ContrastError
from steering_server.calibrate.chat import Chat
from steering_server.cli.main import main
from steering_server.evaluation.generation import generate
from steering_server.evaluation.hooks import encode

PROMPTS = [
    "tell me about cats",
    "describe rain",
    "what is a good chair made of",
    "bread",
    "tell me about rain",
    "describe bread",
    "what is a cats chair",
    "rain made of bread",
    "describe cats",
    "a good chair",
]
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
        hidden_size=128,
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


# Prompts.


def test_bos_is_there_once(tokenizer: Any) -> None:
    batch = encode(tokenizer, [user(prompt) for prompt in PROMPTS], "right")
    assert (batch["input_ids"] == tokenizer.bos_token_id).sum(1).tolist() == [1] * len(PROMPTS)


def test_the_last_token_is_the_generation_prompt(tokenizer: Any) -> None:
    batch = encode(tokenizer, [user(PROMPTS[0])], "right")
    assert tokenizer.decode(batch["input_ids"][0, -1]) == "<assistant>"


def test_hooks_are_gone_afterwards(model: Any, tokenizer: Any) -> None:
    generate(model, tokenizer, ["bread"], max_tokens=1)
    assert not any(module._forward_hooks for module in find_sites(model, 2).values())


def test_a_tokenizer_without_a_template_is_refused(folder: Path) -> None:
    bare = transformers.AutoTokenizer.from_pretrained(folder)
    bare.chat_template = None
    with pytest.raises(ContrastError, match=r"no chat template .*--chat-template FILE"):
        Chat().text(bare, user("bread"))
    assert Chat("").text(bare, user("bread")) == "bread"


# The command.


@pytest.fixture
def steering(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `steering calibrate …`, its engine in this process; gives exit status and output."""
    for name, value in engines.IN_PROCESS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    # vLLM's log keeps the stream that some test before this one captured.
    monkeypatch.setattr("logging.raiseExceptions", False)

    def run(*words: object) -> tuple[int, str]:
        argv = ["/bin/steering", "calibrate", *map(str, words)]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code or 0
        engines.forget_groups()
        # A text is Python's to print, and its status 1.
        said = [*capfd.readouterr(), code if isinstance(code, str) else ""]
        return code if isinstance(code, int) else 1, "".join(said)

    return run


BY_SITE = ("--planes", "per_site", "--granularity", "site", "--dtype", "float32", "--max-model-len",
           "64", "--kv-cache-memory-bytes", "64M", "--force")  # fmt: skip


def test_it_writes_an_artifact_a_card_and_a_report(
    steering: Callable[..., tuple[int, str]],
    folder: Path,
    contrast_set: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "mood"
    output.mkdir()
    (output / "mine").write_text("replaced, since forced")
    (tmp_path / "table.md").write_text("| 0° | +0.9 |\n")
    words = (folder, "--contrast-set", contrast_set, "-o", output, *BY_SITE)
    status, said = steering(*words, "--default-mode", "rotate_to", "--measured",
                            tmp_path / "table.md")  # fmt: skip
    assert status == 0, said
    assert {f.name for f in output.iterdir()} == {
        "steering_config.json", "steering_plane.safetensors", "README.md", "report.md", "report.png"
    }  # fmt: skip
    plane = Plane.load(output)
    config = plane.config
    assert config.name == "mood"
    assert config.base_model_name_or_path == "Tiny-Llama"
    assert (config.model_type, config.hidden_size, config.num_layers) == ("llama", 128, 2)
    assert config.default_mode == "rotate_to"
    assert config.extraction.n == len(PROMPTS)
    assert config.extraction.data.startswith("mood.json sha256:")
    assert config.extraction.chat_template_sha256
    assert all(0 <= of["auroc"] <= 1 for of in config.statistics.values())
    assert config.format_version == 2
    assert plane.means is not None
    for site, of in plane.means.items():
        # b1 is the site's own direction, on which the classes lie at their full distance.
        assert of.positive[0] - of.negative[0] == pytest.approx(of.rho, rel=1e-4)
        assert of.rho == pytest.approx(config.statistics[str(site)]["difference_norm"], rel=1e-6)
    assert ", ".join(map(str, plane.sites)) in said
    card = (output / "README.md").read_text()
    # As it was typed, but for the file that nobody else has.
    typed = shlex.join(["steering", "calibrate", *map(str, words)])
    assert f"    {typed} --default-mode rotate_to\n" in card
    assert "# Steering plane `mood` for Tiny-Llama" in card
    assert "| 0° | +0.9 |" in card
    assert "{" not in card
    report = (output / "report.md").read_text()
    assert "{" not in report
    for site in plane.sites:
        assert f"\n| {site} | " in card
        assert f"\n| {site} | yes | discriminates | " in report
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")


def test_two_files_are_two_classes(
    steering: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    """Prompts or messages a line; and a wrapper around one class only is warned of."""
    positive, negative = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    positive.write_text(
        "".join(json.dumps({"prompt": f"please be good now {p}"}) + "\n" for p in PROMPTS)
    )
    negative.write_text(
        "\n".join(json.dumps({"messages": user(p)}, indent=None) + "\n" for p in PROMPTS)
    )
    words = ("--positive", positive, "--negative", negative, "-o", tmp_path / "mood", *BY_SITE)
    status, said = steering(folder, *words)
    assert status == 0, said
    assert "warning: 100% of the positive and 0% of the negative prompts begin with" in said
    assert Plane.load(tmp_path / "mood").config.extraction.n == len(PROMPTS)


def test_classes_that_do_not_separate_exit_2_unless_forced(
    steering: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    # Held out is every fifth: those two say the opposite of the others.
    for file, mine, others in zip(files, PROMPTS[:2], PROMPTS[1::-1], strict=True):
        lines = [others if i % 5 == 4 else mine for i in range(10)]
        file.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    words = ("--positive", files[0], "--negative", files[1], "-o", tmp_path / "mood", *BY_SITE)
    status, said = steering(folder, *words[:-1])
    assert status == 2
    assert "the classes do not separate: the best selected site's held-out AUROC is 0.00" in said
    assert not (tmp_path / "mood").exists()
    status, said = steering(folder, *words)
    assert status == 0
    assert "warning: the classes do not separate" in said
    Plane.load(tmp_path / "mood")


def test_classes_without_any_difference_exit_2(
    steering: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    status, said = steering(folder, "--positive", file, "--negative", file, "-o",
                            tmp_path / "mood", *BY_SITE)  # fmt: skip
    assert status == 2
    assert "steering: error: the two classes have the same mean activation at every site" in said
    assert not (tmp_path / "mood").exists()


BAD_LINES = {
    "": "holds no prompts",
    '{"prompt": "a"}\n{"prompt": ': ":2: must be JSON",
    '{"prompt": "a"}\n{"txt": "b"}\n': ":2: has none of prompt, instruction",
    '{"prompt": "a"}\n{"messages": [{"role": "system", "content": "b"}]}': "the last message must",
    '{"prompt": ["b"]}': ":1: prompt.0.: must be a message",
    '{"prompt": "only one"}': "a class needs at least 2",
}


@pytest.mark.parametrize("lines", BAD_LINES, ids=BAD_LINES.values())
def test_bad_input_names_file_line_and_rule(
    steering: Callable[..., tuple[int, str]], tmp_path: Path, lines: str
) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    bad.write_text(lines)
    words = ("--positive", good, "--negative", bad, "-o", tmp_path / "mood")
    status, said = steering("no model is loaded", *words)
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("steering: error: ")]
    assert str(bad) in line
    assert BAD_LINES[lines] in line


def written(folder: Path, name: str, prompts: list[str]) -> Path:
    file = folder / name
    file.write_text("\n".join(prompts))
    return file


def test_options_of_the_data_are_in_the_plane(
    steering: Callable[..., tuple[int, str]], folder: Path, tmp_path: Path
) -> None:
    """Samples, a system prompt, a token, sites by hand, activations: all in one run."""
    positive = written(tmp_path, "a.txt", [f"please be good now {p}" for p in PROMPTS])
    negative = written(tmp_path, "b.txt", PROMPTS)
    words = ("--positive", positive, "--negative", negative, "-o", tmp_path / "mood", *BY_SITE)
    status, said = steering(folder, *words, "--samples", 6, "--seed", 4, "--system-prompt",
                            "be sad", "--token", "-2", "--sites", "0.mlp_in 1",
                            "--save-activations")  # fmt: skip
    assert status == 0, said
    plane = Plane.load(tmp_path / "mood")
    assert list(map(str, plane.sites)) == ["0.mlp_in", "1.attn_in", "1.mlp_in"]
    extraction = plane.config.extraction
    assert (extraction.n, extraction.seed) == (6, 4)
    assert extraction.data.endswith("6 of 10 and 10, system prompt 'be sad'")
    assert extraction.method.endswith("sites 0.mlp_in 1 chosen by hand, token -2")
    assert plane.config.fingerprint is not None
    assert set(plane.config.fingerprint) == {"0.attn_in", "0.mlp_in", "1.attn_in", "1.mlp_in"}
    kept = load_file(tmp_path / "mood" / "activations.safetensors")
    assert kept["positive.1.mlp_in"].shape == (6, 128)
    difference = (kept["positive.1.mlp_in"] - kept["negative.1.mlp_in"]).double().mean(0)
    assert plane.means is not None
    rho = plane.means[Site(1, "mlp_in")].rho
    assert float(difference.norm()) == pytest.approx(rho, rel=1e-5)
    report = (tmp_path / "mood" / "report.md").read_text()
    assert "| 1.mlp_in | yes | chosen by hand |" in report
    assert "Here sites were chosen by hand: `0.mlp_in 1`." in report


def test_a_random_plane_is_kept_and_called_the_null(
    steering: Callable[..., tuple[int, str]], folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    words = ("--contrast-set", contrast_set, *BY_SITE[:-1], "--force")
    for name, more in (("real", ()), ("null", ("--direction", "random", "--seed", 3))):
        status, said = steering(folder, *words, "-o", tmp_path / name, *more)
        assert status == 0, said
    real, null = Plane.load(tmp_path / "real"), Plane.load(tmp_path / "null")
    assert null.sites == real.sites
    assert null.config.extraction.seed == 3
    assert "random per_site planes (seed 3)" in null.config.extraction.method
    assert "a study's null" in (tmp_path / "null" / "report.md").read_text()
    assert "| max_sim selects it |" in (tmp_path / "null" / "report.md").read_text()
    assert "it is the null that a study compares with" in (tmp_path / "null/README.md").read_text()
    assert null.config.angle_convention.startswith("degrees; 0 points along a random b1")


def test_a_report_opens_with_what_a_reader_needs(
    steering: Callable[..., tuple[int, str]], folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    words = ("--contrast-set", contrast_set, "-o", tmp_path / "mood", *BY_SITE)
    status, said = steering(folder, *words)
    assert status == 0, said
    lines = (tmp_path / "mood" / "report.md").read_text().splitlines()[2:5]
    assert [line.split("**")[1] for line in lines] == [
        "Do the classes separate?", "How many sites?", "Next:"
    ]  # fmt: skip
    assert "held-out AUROC of" in lines[0]
    assert f"{len(Plane.load(tmp_path / 'mood').sites)} of 4 are selected: " in lines[1]


def test_where_nothing_discriminates_a_report_says_why_and_the_error_what_would(
    steering: Callable[..., tuple[int, str]], folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mood"
    words = ("--contrast-set", contrast_set, "-o", output, *BY_SITE[4:-1])
    status, said = steering(folder, *words, "--margin", 1000)
    assert status == 2
    (line,) = [line for line in said.splitlines() if line.startswith("steering: error: ")]
    assert "no layer discriminates with margin 1000" in line
    assert "--margin 0 finds" in line
    assert {file.name for file in output.iterdir()} == {"report.md", "report.png"}
    report = (output / "report.md").read_text()
    assert "- **How many sites?** 0 of 4 are selected.\n" in report
    assert "--margin 0 finds" in report
    # A report is no plane: the next run needs no --force to write one in its place, and no more is
    # forgiven it.
    status, said = steering(folder, *words, "--sites", "1.attn_in")
    assert status == 0, said
    made = Plane.load(output)
    # Nor does a run without a plane leave its report beside another's plane.
    status, said = steering(folder, *words, "--margin", 1000, "--force")
    assert status == 2
    assert f"{output}-report: no plane, but a report of why" in said
    assert Plane.load(output).digest == made.digest
    assert "0 of 4 are selected" in (tmp_path / "mood-report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        (("--token", "first"), "must be last, mean or -K"),
        (("--token", "-0"), "must be last, mean or -K"),
        (("--sites", "x"), "sites are written all, 7, 12-20"),
        (("--name", "my plane"), "'my plane': a plane's name"),
        (("--gate", "nan"), "must be a finite number"),
        (("--margin", "inf"), "must be a finite number"),
        (("--samples", "11"), "samples=11: must be 2 to 10"),
        (("--system-prompt", "be kind"), "has a system prompt already"),
        (("--chat-template", "none-such"), "must be a file with a chat template, or none"),
    ],
)
def test_bad_options_are_one_line_before_any_model(
    steering: Callable[..., tuple[int, str]],
    contrast_set: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    rule: str,
) -> None:
    words = ("no model is loaded", "--contrast-set", contrast_set, "-o", tmp_path / "mood")
    status, said = steering(*words, *more)
    assert status in (1, 2)
    assert rule in said
    assert not (tmp_path / "mood").exists()


def test_a_folder_of_the_users_own_is_no_report(
    steering: Callable[..., tuple[int, str]], contrast_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mood"
    output.mkdir()
    for name in ("report.md", "report.png"):
        (output / name).write_text("mine")
    status, said = steering("m", "--contrast-set", contrast_set, "-o", output)
    assert status == 1
    assert "exists; --force replaces it" in said
    assert (output / "report.md").read_text() == "mine"


def test_a_model_that_is_not_there_is_one_line(
    steering: Callable[..., tuple[int, str]], contrast_set: Path, tmp_path: Path
) -> None:
    status, said = steering("/no/such/model", "--contrast-set", contrast_set, "-o", tmp_path / "a")
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("steering: error: ")]
    assert line.startswith("steering: error: /no/such/model: can't be had: ")


def test_more_than_two_classes_are_refused(
    steering: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"text": p, "label": i % 3} for i, p in enumerate(PROMPTS)]))
    status, said = steering("no model", "--contrast-set", file, "-o", tmp_path / "mood")
    assert status == 1
    assert "label: has 3 classes (0, 1, 2): must be two" in said


def test_one_class_is_none(steering: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    status, said = steering("m", "--positive", tmp_path / "a.jsonl", "-o", tmp_path / "mood")
    assert status == 2
    assert "give --contrast-set, or --positive and --negative" in said


def test_an_existing_output_is_kept_unless_forced(
    steering: Callable[..., tuple[int, str]], contrast_set: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mood"
    output.mkdir()
    (output / "mine").write_text("precious")
    status, said = steering("m", "--contrast-set", contrast_set, "-o", output)
    assert status == 1
    assert f"{output}: exists; --force replaces it" in said
    assert (output / "mine").exists()


def test_activations_that_are_not_finite_are_refused(
    steering: Callable[..., tuple[int, str]], folder: Path, contrast_set: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].input_layernorm.weight.data[3] = torch.nan
    shutil.copytree(folder, tmp_path / "broken")
    model.save_pretrained(tmp_path / "broken")
    words = ("--contrast-set", contrast_set, "-o", tmp_path / "mood", *BY_SITE)
    status, said = steering(tmp_path / "broken", *words)
    assert status == 2
    assert "are not all finite" in said
    assert not (tmp_path / "mood").exists()


def test_an_unknown_flag_is_vllms_to_refuse(
    steering: Callable[..., tuple[int, str]], contrast_set: Path, tmp_path: Path
) -> None:
    status, said = steering("m", "--contrast-set", contrast_set, "-o", tmp_path / "x", "--no-such")
    assert status == 2
    assert "--no-such" in said


# Generation.


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    shape = {"model_type": "llama", "hidden_size": 128, "num_layers": 2}
    return Plane.load(random_plane(tmp_path / "mood", ["0.mlp_in", "1.attn_in"], **shape))


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
