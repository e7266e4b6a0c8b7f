"""steering_planes.tables: rows of files, and of splits on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import contrasts
from steering_planes.contrast import read_classes
from steering_planes.examples import load_prompts
from steering_planes.tables import ContrastError

POSITIVE = ["one", "two"]
NEGATIVE = ["three", "four"]


@pytest.fixture(autouse=True)
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_quote_that_does_not_close_swallows_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tn\n"twas night\t1\nthree\t0\nfour\t1\n"five"\t1\n')
    assert load_prompts(tmp_path / "a.tsv") == ['"twas night', "three", "four", '"five"']
    for text in ('prompt\none\n"two\nthree\n', 'prompt\n"one" he said\nb\n'):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ContrastError, match=r"a\.csv:\d: must be CSV"):
            load_prompts(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("location", "rule"),
    [
        ("hf://datasets/org/harmful", "name a split, or one file: there are data/test-00000-of-0"),
        ("hf://datasets/org/harmful:dev", "no file is of the split 'dev': there are data/test"),
        ("hf://datasets/org/partial:train", "2 of 4 files are there"),
        ("hf://datasets/org/none:train", "can't be had"),
        ("hf://datasets/org", "must be hf://organisation/repository or hf://datasets/"),
        ("hf://datasets/org/harmful@v9:train", "can't be had"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(location: str, rule: str, tmp_path: Path) -> None:
    contrasts.on_the_hub(tmp_path, POSITIVE, NEGATIVE)
    made = contrasts.snapshot(tmp_path, "partial")
    for shard in (0, 2):
        contrasts.parquet(made / f"data/train-0000{shard}-of-00004.parquet", [{"text": "a"}])
    with pytest.raises(ContrastError, match=rule) as caught:
        read_classes(location, location)
    assert "\n" not in str(caught.value)


SPLITS = {
    "data/train-00000-of-00002-0ab1.parquet data/train-00001-of-00002-9cd2.parquet": True,
    "default/train/0000.parquet default/train/0001.parquet default/test/0000.parquet": True,
    "harmful_behaviors.csv": True,
    "mood-train.jsonl mood-test.jsonl requirements.txt": True,
    "train.json": True,
    "data/train_sft-00000-of-00001.parquet data/test_sft-00000-of-00001.parquet": False,
    "train-v1/test.jsonl train-v1/dev.jsonl": False,
}


@pytest.mark.parametrize("files", SPLITS)
def test_a_split_is_its_own_files(files: str, tmp_path: Path) -> None:
    made = contrasts.snapshot(tmp_path, "set")
    for name in files.split():
        file = made / name
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "of train" if "test" not in name else "of another"
        match file.suffix:
            case ".parquet":
                contrasts.parquet(file, [{"text": text}])
            case ".csv":
                file.write_text(f"text\n{text}\n")
            case ".json":
                file.write_text(json.dumps({"test": ["x"], "train": [text]}))
            case _:
                file.write_text(json.dumps({"text": text}))
    if SPLITS[files]:
        assert set(load_prompts("hf://datasets/org/set:train")) == {"of train"}
    else:
        with pytest.raises(ContrastError, match="no file is of the split 'train'"):
            load_prompts("hf://datasets/org/set:train")


def test_a_split_within_a_json_file(tmp_path: Path) -> None:
    made = contrasts.snapshot(tmp_path, "set")
    (made / "c.json").write_text(json.dumps({"train": ["a"], "test": ["b", "c"]}))
    assert load_prompts("hf://datasets/org/set/c.json:test") == ["b", "c"]
    with pytest.raises(ContrastError, match="it has train, test, and no 'dev'"):
        load_prompts("hf://datasets/org/set/c.json:dev")


def test_a_file_of_a_data_set_may_be_named(tmp_path: Path) -> None:
    contrasts.on_the_hub(tmp_path, POSITIVE, NEGATIVE)
    file = "hf://datasets/org/harmful/data/test-00000-of-00001.parquet"
    assert load_prompts(file) == ["another"] * 3
