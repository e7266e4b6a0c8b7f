"""What calibration costs: seconds after the model is loaded, and memory against serving it."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

import report
import sides
from steering_planes.contrast import Contrast, read_contrast
from steering_server.bundled_model import ensure

CONTRAST = Path(__file__).parents[1] / "steering_vectors/contrast_sets/sentiment.json"
ENGINE = {"max_model_len": 512, "max_num_seqs": 64, "kv_cache_memory_bytes": 1 << 30}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items()]


class Peak(threading.Thread):
    """Watches a process and all it starts; ``bytes`` is the sum of each one's greatest memory."""

    def __init__(self, root: psutil.Process) -> None:
        super().__init__(daemon=True)
        self._root = root
        self._peaks: dict[int, int] = {}
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.2):
            try:
                processes = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in processes:
                # The kernel's own high-water mark: nothing between two looks is missed.
                try:
                    status = Path(f"/proc/{process.pid}/status").read_text()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                for line in status.splitlines():
                    if line.startswith("VmHWM"):
                        self._peaks[process.pid] = 1024 * int(line.split()[1])

    def bytes(self) -> int:
        """Stop watching."""
        self._done.set()
        self.join()
        return sum(self._peaks.values())


def contrast(prompts: int) -> Contrast:
    """The bundled set, as many prompts of it in all."""
    whole = read_contrast(CONTRAST)
    half = prompts // 2
    return Contrast(whole.positive[:half], whole.negative[:half], whole.files)


def calibrate_here(prompts: int) -> None:
    """Calibrate, and print the seconds since the model was loaded."""
    import vllm

    from steering_server.calibrate.run import calibrate

    loaded = []
    load = vllm.LLM.__init__

    def timed(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        loaded.append(time.perf_counter())

    vllm.LLM.__init__ = timed
    calibrate(str(ensure()), contrast(prompts), name="mood", engine=ENGINE)
    print(json.dumps({"seconds": time.perf_counter() - loaded[0]}))


def calibrated(prompts: int) -> tuple[float, int]:
    """Seconds and bytes of a calibration in a process of its own."""
    words = [sys.executable, __file__, "--prompts", str(prompts), "--here"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        peak = Peak(psutil.Process(process.pid))
        output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"calibration ended with {process.returncode}")
    seconds: float = json.loads(output.splitlines()[-1])["seconds"]
    return seconds, peak.bytes()


def served(prompts: int) -> int:
    """Bytes of a server that answers the same prompts, steered, with a token each."""
    side = sides.Side(
        sides.SIDES["selected"].command,
        lambda folder: [*sides.SIDES["selected"].flags(folder), "--enforce-eager", *FLAGS],
    )
    whole = contrast(prompts)
    with tempfile.TemporaryDirectory() as folder, sides.serve(side, Path(folder)) as server:
        peak = Peak(psutil.Process(server.group))

        def ask(conversation: Any) -> None:
            body = {"model": sides.MODEL, "messages": conversation, "max_tokens": 1}
            httpx.post(
                f"http://127.0.0.1:{server.port}/v1/chat/completions",
                json={**body, "steering_angle": 30},
                timeout=600,
            ).raise_for_status()

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            examples = (*whole.positive, *whole.negative)
            list(pool.map(ask, [example.conversation for example in examples]))
        return peak.bytes()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=160)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=report.FOLDER / "calibration.json")
    options = parser.parse_args(arguments)
    if options.here:
        calibrate_here(options.prompts)
        return 0
    sides.end_with_this_process()
    seconds, calibrating = calibrated(options.prompts)
    serving = served(options.prompts)
    row: dict[str, object] = {
        "prompts": options.prompts,
        "seconds": seconds,
        "calibrating_bytes": calibrating,
        "serving_bytes": serving,
    }
    report.save(options.output, "calibration", [row])
    report.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
