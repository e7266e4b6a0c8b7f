"""What steering costs a model of Qwen2.5-7B's shape, against plain vLLM, in turns.

Weights are random (``load_format=dummy``): times do not depend on their values. Every engine is a
process of its own; all hold the device's memory, and one at a time computes. Plain vLLM runs twice,
and what its two engines differ by is how much two equal engines differ: where that is more than
what a way may lose, nothing is claimed of the way.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from findings import Findings

from figures import FIGURES, Run, ratio

SHAPE = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064,
}  # fmt: skip
REHEARSED = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
}  # fmt: skip
ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 8192,
    "max_num_seqs": 256,
    "disable_log_stats": True,
    "enable_prefix_caching": False,
    # Of 80 GB; three engines are up at a time.
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": 3 << 30,
}
ROUNDS = 6
LEAST_ROUNDS = 2
START_SECONDS = 200


@dataclass(frozen=True)
class Load:
    """Requests sent at once, each of so many prompt and generated tokens."""

    batch: int
    prompt: int
    tokens: int

    def __str__(self) -> str:
        return f"prefill {self.prompt}" if self.tokens == 1 else f"decode {self.batch}"


LOADS = (
    Load(1, 32, 96), Load(8, 32, 96), Load(64, 32, 96), Load(256, 32, 96), Load(1, 4096, 1),
)  # fmt: skip
REHEARSED_LOADS = (Load(1, 8, 4), Load(4, 8, 4), Load(1, 64, 1))


@dataclass(frozen=True)
class Way:
    """An engine, and whether each request has an angle of its own; at least this much of plain
    vLLM's throughput, decoding and in a prefill."""

    name: str
    engine: str
    steered: bool
    decode: float | None
    prefill: float | None


SECOND = Way("plain vLLM, a second engine", "second", False, None, None)
WAYS = (
    SECOND,
    Way("planes loaded, unsteered", "selected", False, 0.995, 0.995),
    Way("selected sites, an angle each", "selected", True, 0.99, 0.985),
)
OTHERS = (
    Way("selected sites, an angle each, norms kept", "kept", True, None, None),
    Way("selected sites, unsteered, norms kept", "kept", False, None, None),
    Way("all sites, an angle each", "all", True, None, None),
)
PLAIN = Way("plain vLLM", "plain", False, None, None)


def run(findings: Findings, rehearse: bool, widths: Sequence[int] | None) -> None:
    """Plain vLLM beside a second one and ours; then beside ours with vLLM's norms, and ours at all
    sites."""
    shape = REHEARSED if rehearse else SHAPE
    loads = REHEARSED_LOADS if rehearse else LOADS
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as plain_stack:
        folder = Path(name)
        model = make_model(folder / "model", shape)
        planes = {
            "selected": (half := make_plane(folder / "selected", model, shape, every=2)),
            "kept": half,
            "all": make_plane(folder / "all", model, shape, every=1),
        }

        @contextlib.contextmanager
        def up(*names: str) -> Iterator[dict[str, Connection]]:
            with contextlib.ExitStack() as stack:
                yield start(stack, names, model, planes, rehearse, folder)

        began = time.monotonic()
        # At once: starting is what costs. The second plain engine takes the first one's graphs.
        engines = start(plain_stack, ("plain",), model, planes, rehearse, folder)
        with up("second", "selected") as more:
            findings.tell(start_seconds=time.monotonic() - began, engines=["plain", *more])
            _compare(findings, {**engines, **more}, WAYS, loads, rehearse, share=0.6)
        if findings.left() < START_SECONDS / 2 and not rehearse:
            findings.verdict("norms kept, and all sites", None, "no time left")
            return
        with up("kept", "all") as more:
            _compare(findings, {**engines, **more}, OTHERS, loads, rehearse, share=1.0)


def _compare(
    findings: Findings,
    engines: Mapping[str, Connection],
    ways: Sequence[Way],
    loads: Sequence[Load],
    rehearse: bool,
    share: float,
) -> None:
    """Every way's runs next to plain vLLM's, in random order, for a share of the time left."""
    end = findings.left() * (1 - share)
    rng = random.Random(0)
    seen: dict[tuple[Way, Load], list[Run]] = {}
    everyone = (PLAIN, *ways)
    for load in loads:
        for way in everyone:
            ask(engines, way, load)
    done = 0
    for number in range(LEAST_ROUNDS if rehearse else ROUNDS):
        if number >= LEAST_ROUNDS and findings.left() < end + 10:
            break
        for load in rng.sample(loads, len(loads)):
            for way in rng.sample(everyone, len(everyone)):
                seen.setdefault((way, load), []).append(ask(engines, way, load))
        done += 1
    stray = dict.fromkeys(loads, 0.0)
    for way in ways:
        for load in loads:
            against = (PLAIN,) if way == SECOND or SECOND not in ways else (PLAIN, SECOND)
            ratios = {
                figure: [
                    ratio(figure, mine, others)
                    for mine, *others in zip(
                        seen[way, load], *(seen[plain, load] for plain in against), strict=True
                    )
                ]
                for figure in FIGURES
            }
            middle = statistics.median(ratios["throughput"])
            bound = way.prefill if load.tokens == 1 else way.decode
            if way == SECOND:
                stray[load] = abs(middle - 1)
            holds = None
            if not rehearse and bound is not None and stray[load] <= 1 - bound:
                holds = middle >= bound
            findings.tell(
                way=way.name, load=str(load), rounds=done, ratios=ratios,
                runs=[asdict(run) for run in seen[way, load]],
            )  # fmt: skip
            findings.verdict(
                f"{way.name}, {load}: throughput / plain vLLM's"
                + (f" >= {bound}" if bound else ""),
                holds,
                f"{middle:.4f} ({min(ratios['throughput']):.4f} to "
                f"{max(ratios['throughput']):.4f}), TTFT {statistics.median(ratios['ttft']):.3f}, "
                f"inter-token {statistics.median(ratios['itl']):.3f}"
                + (f"; two plain engines differ by {stray[load]:.2%}" if bound else ""),
            )


def ask(engines: Mapping[str, Connection], way: Way, load: Load) -> Run:
    """One run."""
    engine = engines[way.engine]
    engine.send((load, way.steered))
    answer = engine.recv()
    if isinstance(answer, BaseException):
        raise answer
    assert isinstance(answer, Run)
    return answer


def start(
    stack: contextlib.ExitStack,
    names: Sequence[str],
    model: Path,
    planes: Mapping[str, Path],
    rehearse: bool,
    folder: Path,
) -> dict[str, Connection]:
    """Engines by name, ready; started at once, ended with the stack."""
    spawn = multiprocessing.get_context("spawn")
    engines = {}
    for name in names:
        options = {**ENGINE, "model": str(model), "dtype": "bfloat16"}
        if name in planes:
            steering = {"planes": {name: str(planes[name])}}
            norms = {"norms": "kept"} if name == "kept" else {}
            options["additional_config"] = {"steering": {**steering, **norms}}
        if rehearse:
            options |= {"enforce_eager": True, "dtype": "float32", "max_model_len": 256,
                        "kv_cache_memory_bytes": 1 << 26}  # fmt: skip
        here, there = spawn.Pipe()
        process = spawn.Process(
            target=engine, args=(there, options, name in planes, folder / f"{name}.log")
        )
        process.start()
        there.close()
        stack.callback(process.join, 30)
        stack.callback(here.close)
        engines[name] = here
    for name, connection in engines.items():
        ready = connection.recv()
        if isinstance(ready, ModuleNotFoundError):
            raise ready
        if isinstance(ready, BaseException):
            log = (folder / f"{name}.log").read_text()[-2000:]
            raise RuntimeError(f"the engine {name!r} did not start: {ready!r}\n{log}")
    return engines


def engine(connection: Connection, options: dict[str, Any], steers: bool, log: Path) -> None:
    """A process's whole life: vLLM's offline engine, asked through a pipe until it closes."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
    if not steers:
        os.environ["VLLM_PLUGINS"] = ""
    try:
        from vllm import LLM

        llm = LLM(**options)
        connection.send("ready")
        while True:
            connection.send(measured(llm, *connection.recv()))
    except EOFError:
        return
    except ModuleNotFoundError as error:
        connection.send(error)
    # The other end raises it.
    except Exception as error:  # noqa: BLE001
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def measured(llm: Any, load: Load, steered: bool) -> Run:
    """Send a load, all at once, and step until it is answered."""
    from vllm import SamplingParams

    core = llm.llm_engine
    vocabulary = core.model_config.get_vocab_size()
    rng = random.Random(load.batch)
    began = time.perf_counter()
    for index in range(load.batch):
        fields = {"steering_angle": 1 + 358.0 * index / load.batch, "steering_mode": "rotate_to"}
        params = SamplingParams(
            temperature=0,
            max_tokens=load.tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=fields if steered else None,
        )
        ids = [rng.randrange(3, vocabulary) for _ in range(load.prompt)]
        core.add_request(str(index), {"prompt_token_ids": ids}, params)
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    while core.has_unfinished_requests():
        outputs = core.step()
        now = time.perf_counter() - began
        for output in outputs:
            first.setdefault(output.request_id, now)
            last[output.request_id] = now
    elapsed = time.perf_counter() - began
    gaps = [(last[i] - first[i]) / max(load.tokens - 1, 1) for i in first]
    counted = load.prompt if load.tokens == 1 else load.tokens
    return Run(
        throughput=load.batch * counted / elapsed,
        ttft=statistics.median(first.values()),
        # Of a single token there is none; equal numbers have a ratio of one.
        itl=statistics.median(gaps) or 1.0,
    )


def make_model(folder: Path, shape: Mapping[str, int]) -> Path:
    """A config of Llama's architecture; no weights, no tokenizer."""
    from transformers import LlamaConfig

    LlamaConfig(
        **shape, max_position_embeddings=32768, rms_norm_eps=1e-6, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_plane(folder: Path, model: Path, shape: Mapping[str, int], every: int) -> Path:
    """A random plane at both norms of every so-manieth layer."""
    from planes import random_plane

    layers = shape["num_hidden_layers"]
    sites = [f"{i}.{role}" for i in range(0, layers, every) for role in ("attn_in", "mlp_in")]
    return random_plane(
        folder, sites, base_model_name_or_path=str(model), model_type="llama",
        hidden_size=shape["hidden_size"], num_layers=layers,
    )  # fmt: skip
