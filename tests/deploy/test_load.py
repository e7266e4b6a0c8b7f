"""deploy/load.py: its parts, and a run against a live server."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from rich.console import Console

if TYPE_CHECKING:
    from servers import Server

REPOSITORY = Path(__file__).parents[2]

METRICS = """\
# HELP steering_requests_total Steered requests that ended.
# TYPE steering_requests_total counter
steering_requests_total{mode="rotate_to",outcome="ok",plane="sentiment"} %d
steering_requests_total{mode="rotate_by",outcome="ok",plane="sentiment"} 2.0
steering_requests_total{mode="rotate_to",outcome="error",plane="sentiment"} 30.0
steering_requests_total{mode="rotate_to",outcome="ok",plane="style"} 400.0
# HELP steering_tokens_total Tokens within the scope of a steering.
# TYPE steering_tokens_total counter
steering_tokens_total{plane="sentiment"} 5000.0
"""


def test_counts_the_planes_good_requests_over_all_modes(load: ModuleType) -> None:
    assert load.steered_count(METRICS % 1, "sentiment") == 3
    assert load.steered_count(METRICS % 1, "style") == 400


def test_a_counter_that_has_no_samples_yet_is_zero(load: ModuleType) -> None:
    declared = "# TYPE steering_requests_total counter\n"
    assert load.steered_count(declared, "sentiment") == 0


def test_takes_the_only_plane_or_the_one_asked_for(load: ModuleType) -> None:
    assert load.choose_plane(["a"], None) == "a"
    assert load.choose_plane(["a", "b"], "b") == "b"


@pytest.mark.parametrize(
    ("loaded", "asked", "says"),
    [
        ([], None, "start it with --steering-plane"),
        ([], "a", "start it with --steering-plane"),
        (["a", "b"], None, "choose by --plane: a, b"),
        (["a"], "c", "no plane 'c'; loaded: a"),
    ],
)
def test_says_which_planes_there_are(
    load: ModuleType, loaded: list[str], asked: str | None, says: str
) -> None:
    with pytest.raises(load.LoadError, match=says):
        load.choose_plane(loaded, asked)


def result(**changed: Any) -> dict[str, Any]:
    """What vLLM's benchmark client returns, in part."""
    measured = {
        "output_throughput": 100.0,
        "median_ttft_ms": 50.0,
        "median_itl_ms": 10.0,
        "failed": 0,
        "errors": ["", ""],
    }
    return measured | changed


def test_a_run_keeps_each_error_once(load: ModuleType) -> None:
    run = load.Run.of(result(failed=3, errors=["", "Bad Request", "Bad Request", "Gone"]))
    assert run.errors == ("Bad Request", "Gone")


def test_nothing_failed_and_all_counted_is_no_problem(load: ModuleType) -> None:
    run = load.Run.of(result())
    assert load.problems([load.Pair(run, run)], counted=41, sent=41) == []


def test_failed_requests_are_a_problem(load: ModuleType) -> None:
    good = load.Run.of(result())
    bad = load.Run.of(result(failed=2, errors=["Traceback:\n  File\nOSError: reset\n"]))
    assert load.problems([load.Pair(bad, good), load.Pair(bad, good)], counted=1, sent=1) == [
        "4 unsteered requests failed: OSError: reset"
    ]
    assert load.problems([load.Pair(good, bad)], counted=1, sent=1) == [
        "2 steered requests failed: OSError: reset"
    ]


def test_a_count_that_differs_is_a_problem(load: ModuleType) -> None:
    (fewer,) = load.problems([], counted=39, sent=40)
    assert fewer == "steering_requests_total grew by 39, 40 steered requests were sent"
    (more,) = load.problems([], counted=41, sent=40)
    assert "another client" in more


def shown(table: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_table_shows_medians_and_the_median_of_the_ratios(load: ModuleType) -> None:
    # Medians 100 and 90; ratios .9, .5 and 1.5: within a pair the machine was equally busy.
    pairs = [
        load.Pair(
            load.Run.of(result(output_throughput=plain)),
            load.Run.of(result(output_throughput=steered, failed=1)),
        )
        for plain, steered in ((100, 90), (200, 100), (50, 75))
    ]
    lines = shown(load.table(pairs, "title"))
    (throughput,) = [line.split() for line in lines if "throughput" in line]
    assert throughput[-6:] == ["100.0", "│", "90.0", "│", "0.900", "│"]
    (failed,) = [line.split() for line in lines if "failed" in line]
    assert failed[4:7] == ["0", "│", "3"]


def test_table_has_no_ratio_to_nothing(load: ModuleType) -> None:
    pair = load.Pair(load.Run.of(result(median_itl_ms=0.0)), load.Run.of(result(median_itl_ms=0.0)))
    (line,) = [line for line in shown(load.table([pair], "title")) if "ITL" in line]
    assert line.split()[-2] == "-"


def test_the_steering_alone_tells_the_two_runs_apart(load: ModuleType) -> None:
    plain = load.benchmark_arguments(load.Load(), "model", "tokenizer", 7, None)
    steering = {"steering_plane": "sentiment", "steering_angle": 60.0}
    steered = load.benchmark_arguments(load.Load(), "model", "tokenizer", 7, steering)
    at = steered.index("--extra-body")
    assert json.loads(steered[at + 1]) == steering
    assert steered[:at] + steered[at + 2 :] == plain


def test_vllms_client_takes_the_arguments(load: ModuleType) -> None:
    """Every option that is passed still exists; in a process of its own, for its logging."""
    arguments = load.benchmark_arguments(load.Load(), "model", "tokenizer", 7, {"steering": 1})
    code = (
        "import sys\n"
        "from vllm.benchmarks import serve\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = FlexibleArgumentParser()\n"
        "serve.add_cli_args(parser)\n"
        "args = parser.parse_args(sys.argv[1:])\n"
        "assert args.extra_body == {'steering': 1}, args\n"
        "assert args.ready_check_timeout_sec == 0, 'it would send one request more'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_tokenizer_elsewhere_must_be_named(load: ModuleType, tmp_path: Path) -> None:
    assert load.local_tokenizer(load.Load(), str(tmp_path)) == str(tmp_path)
    assert load.local_tokenizer(load.Load(), "owner/model") == "owner/model"
    assert load.local_tokenizer(load.Load(tokenizer="here"), "/not/here") == "here"
    with pytest.raises(load.LoadError, match="--tokenizer"):
        load.local_tokenizer(load.Load(), "/not/here")


def test_sizes_must_be_positive(load: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.parse(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err


def test_url_of_an_ipv6_address(load: ModuleType) -> None:
    assert load.Load(host="::1", port=1).url == "http://[::1]:1"


class FakeServer:
    """Answers as a steering server does; `counts` is whether it counts what it steers."""

    def __init__(self, root: Path, planes: list[str], counts: bool = True) -> None:
        self.root, self.planes, self.counts = root, planes, counts
        self.steered = 0

    def take(self, requests: int) -> None:
        self.steered += requests if self.counts else 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        match request.url.path:
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "m", "root": str(self.root)}]})
            case "/v1/steering/planes":
                return httpx.Response(200, json={"data": [{"id": p} for p in self.planes]})
            case "/metrics":
                return httpx.Response(200, text=METRICS % self.steered)
            case "/v1/completions":
                self.take(1)
                return httpx.Response(200, headers={"steering": 'plane="sentiment"'})
        return httpx.Response(404)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url="http://fake", transport=httpx.MockTransport(self))


@pytest.mark.parametrize(
    ("counts", "failed", "says"),
    [
        (True, 0, []),
        (True, 1, ["2 steered requests failed: Bad Request"]),
        (False, 0, ["steering_requests_total grew by 0, 11 steered requests were sent"]),
    ],
)
def test_a_whole_run_against_a_fake_server(
    load: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counts: bool,
    failed: int,
    says: list[str],
) -> None:
    server = FakeServer(tmp_path, ["sentiment"], counts)
    sizes = load.Load(rounds=2, num_prompts=3, concurrency=2)
    order = []

    def benchmark(arguments: list[str]) -> Any:
        steered = "--extra-body" in arguments
        order.append(steered)
        if steered:
            server.take(sizes.num_prompts + sizes.concurrency)
        return load.Run.of(result(failed=failed if steered else 0, errors=["Bad Request"]))

    monkeypatch.setattr(load, "benchmark", benchmark)
    monkeypatch.setattr(load, "COUNTED_WITHIN_S", 0)
    console = Console(file=io.StringIO(), width=80)
    with server.client() as client:
        assert load.load_test(sizes, client, console) == says
    assert order == [False, True, True, False]
    assert isinstance(console.file, io.StringIO)
    assert "round 2 of 2" in console.file.getvalue()


@pytest.mark.parametrize(
    ("planes", "path", "says"),
    [
        ([], None, "no plane; start it with --steering-plane"),
        (["sentiment"], "/v1/steering/planes", "404; is it `steering serve`"),
        (["sentiment"], "/v1/completions", "does not steer: 400 angle"),
    ],
)
def test_says_why_a_server_can_not_be_tested(
    load: ModuleType, tmp_path: Path, planes: list[str], path: str | None, says: str
) -> None:
    fake = FakeServer(tmp_path, planes)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == path:
            status = 400 if request.method == "POST" else 404
            return httpx.Response(status, text="angle")
        return fake(request)

    transport = httpx.MockTransport(answer)
    with (
        httpx.Client(base_url="http://fake", transport=transport) as client,
        pytest.raises(load.LoadError, match=says),
    ):
        load.load_test(load.Load(), client, Console(file=io.StringIO()))


def main(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "deploy/load.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)


def test_without_a_server_it_says_so_and_fails() -> None:
    done = main("--port", "1")
    assert done.returncode == 1
    assert "no server at http://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


def test_load_runs_clean(server: Server) -> None:
    sizes = ["--rounds=2", "--num-prompts=4", "--concurrency=2", "--input-len=16", "--output-len=8"]
    done = main("--host", server.host, "--port", str(server.port), *sizes)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "round 2 of 2",
        "output throughput, tokens/s",
        "TTFT, median ms",
        "ITL, median ms",
        "failed requests",
        "13 steered requests sent, 13 counted by the server",
    ):
        assert line in done.stdout
