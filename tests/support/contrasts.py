"""The same examples in every form that contrast data comes in."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Conversation = list[dict[str, str]]

BOM = "\ufeff"


@dataclass(frozen=True)
class Form:
    """Files of both classes, or one of pairs; and what `read_*` must be told of them."""

    files: tuple[str | Path, ...]
    told: dict[str, Any] = field(default_factory=dict)


Write = Callable[[Path, Sequence[str], Sequence[str]], Form]


def classes(suffix: str, write: Callable[[Path, Sequence[str]], None], **told: Any) -> Write:
    """A file of each class."""

    def both(folder: Path, positive: Sequence[str], negative: Sequence[str]) -> Form:
        files = (folder / f"positive{suffix}", folder / f"negative{suffix}")
        for file, prompts in zip(files, (positive, negative), strict=True):
            write(file, prompts)
        return Form(files, told)

    return both


def pairs(rows: Callable[[str, str], Any], wrap: Callable[[list[Any]], Any] = list) -> Write:
    """One JSON file of pairs."""

    def one(folder: Path, positive: Sequence[str], negative: Sequence[str]) -> Form:
        file = folder / "pairs.json"
        made = [rows(p, q) for p, q in zip(positive, negative, strict=True)]
        file.write_text(json.dumps(wrap(made)))
        return Form((file,))

    return one


def _json(row: Callable[[str], Any], head: str = "") -> Callable[[Path, Sequence[str]], None]:
    return lambda file, prompts: write(file, head + json.dumps([row(p) for p in prompts]))


def _jsonl(row: Callable[[str], Any], head: str = "") -> Callable[[Path, Sequence[str]], None]:
    return lambda file, prompts: write(
        file, head + "".join(json.dumps(row(p)) + "\n" for p in prompts)
    )


def write(file: Path, text: str) -> None:
    file.write_text(text, "utf-8")


def _csv(columns: Callable[[str], dict[str, str]], head: str = "") -> Any:
    def to(file: Path, prompts: Sequence[str]) -> None:
        with file.open("w", encoding="utf-8", newline="") as opened:
            opened.write(head)
            rows = [columns(prompt) for prompt in prompts]
            delimiter = "\t" if file.suffix == ".tsv" else ","
            writer = csv.DictWriter(opened, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return to


def parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), file)


def labelled(folder: Path, positive: Sequence[str], negative: Sequence[str]) -> Form:
    rows = [{"text": p, "label": 1} for p in positive] + [{"text": n, "label": 0} for n in negative]
    parquet(folder / "train.parquet", rows)
    return Form((folder / "train.parquet",))


def snapshot(folder: Path, name: str) -> Path:
    """A data set's folder in the layout of the Hub's cache, at `main`."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = folder / "hub" / f"datasets--org--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    made = repository / "snapshots" / commit
    (made / "data").mkdir(parents=True)
    return made


def on_the_hub(folder: Path, positive: Sequence[str], negative: Sequence[str]) -> Form:
    """`folder / "hub"` must be the Hub's cache."""
    for name, prompts in (("harmful", positive), ("harmless", negative)):
        made = snapshot(folder, name)
        half = len(prompts) // 2
        for shard, part in enumerate((prompts[:half], prompts[half:])):
            rows = [{"instruction": prompt} for prompt in part]
            parquet(made / f"data/train-0000{shard}-of-00002.parquet", rows)
        parquet(made / "data/test-00000-of-00001.parquet", [{"instruction": "another"}] * 3)
        (made / "README.md").write_text("a data set")
    return Form(("hf://datasets/org/harmful@main:train", "hf://datasets/org/harmless:train"))


def user(prompt: str) -> Conversation:
    return [{"role": "user", "content": prompt}]


def _in_parts(prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": prompt}]}]}


def _ibm(rows: list[Any]) -> dict[str, Any]:
    return {"train": rows, "test": []}


def _sharegpt(prompt: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": prompt}]}


FORMS: dict[str, Write] = {
    "JSONL": classes(".jsonl", _jsonl(lambda p: {"prompt": p})),
    "JSONL with a BOM": classes(".jsonl", _jsonl(lambda p: {"prompt": p}, BOM)),
    "JSONL named .json": classes(".json", _jsonl(lambda p: {"prompt": p})),
    "JSON array": classes(".json", _json(lambda p: {"id": 7, "instruction": p, "output": "x"})),
    "JSON array with a BOM": classes(".json", _json(lambda p: {"text": p}, BOM)),
    "JSON array of strings": classes(".json", _json(str)),
    "AdvBench": classes(".csv", _csv(lambda p: {"goal": p, "target": "Sure, here is"})),
    "CSV with a BOM": classes(".csv", _csv(lambda p: {"question": p, "n": "1"}, BOM)),
    "TSV": classes(".tsv", _csv(lambda p: {"input": p})),
    "another column": classes(".csv", _csv(lambda p: {"prompt": "no", "ask": p}), column="ask"),
    "Parquet": classes(".parquet", lambda file, ps: parquet(file, [{"goal": p} for p in ps])),
    "text": classes(".txt", lambda file, prompts: write(file, "\n".join(prompts) + "\n")),
    "text with a BOM": classes(".txt", lambda file, ps: write(file, BOM + "\r\n".join(ps))),
    "messages": classes(".jsonl", _jsonl(lambda p: {"messages": user(p)})),
    "ShareGPT": classes(".json", _json(_sharegpt)),
    "content parts": classes(".jsonl", _jsonl(_in_parts)),
    "text and label": labelled,
    "positive, negative": pairs(lambda p, n: {"positive": p, "negative": n, "topic": "x"}),
    "IBM": pairs(lambda p, n: {"harmful": p, "harmless": n}, _ibm),
    "pos, neg": pairs(lambda p, n: {"pos": p, "neg": n}),
    "pairs of strings": pairs(lambda p, n: [p, n]),
    "pairs of messages": pairs(lambda p, n: {"chosen": user(p), "rejected": user(n)}),
    "on the Hub": on_the_hub,
}  # fmt: skip


def read(form: Form) -> Any:
    from steering_planes.contrast import read_classes, read_contrast

    if len(form.files) == 2:
        return read_classes(*form.files, **form.told)
    return read_contrast(form.files[0], **form.told)


# Contrasts in the answer.


def answer(question: str, said: str) -> Conversation:
    return [*user(question), {"role": "assistant", "content": said}]


ANSWERS: dict[str, Callable[[str, str, str], Any]] = {
    "CAA": lambda q, a, b: {
        "question": q,
        "answer_matching_behavior": a,
        "answer_not_matching_behavior": b,
    },
    "DPO": lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b, "score": 1.5},
    "DPO of messages": lambda q, a, b: {"chosen": answer(q, a), "rejected": answer(q, b)},
    "DPO, the prompt in common": lambda q, a, b: {
        "prompt": user(q),
        "chosen": [{"role": "assistant", "content": a}],
        "rejected": [{"role": "assistant", "content": b}],
    },
    "question, positive, negative": lambda q, a, b: {"question": q, "positive": a, "negative": b},
    "ShareGPT": lambda q, a, b: {
        side: [{"from": "human", "value": q}, {"from": "gpt", "value": said}]
        for side, said in (("chosen", a), ("rejected", b))
    },
}
