"""Rows: where they come from, and what is said when they cannot be had."""

import json

import datasets
import pytest

from spear_jax.core.errors import UserError
from spear_jax.tasks import get_task
from spear_jax.tasks.loading import load_examples, load_rows

ARC_ROW = {
    "id": "q1",
    "question": "What is light?",
    "choices": {"text": ["a wave", "a stone", "a cup", "a hat"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
HELLASWAG_ROW = {
    "activity_label": "Cooking",
    "ctx": "[header] How to boil an egg [title] Heat water. [step] Use a pot.",
    "endings": ["[substeps] Put the egg in.", "Sing aloud.", "Sell the pot.", "Go home."],
    "label": "0",
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_local_folder_file_and_suffixes_give_the_same_rows(tmp_path):
    rows = [ARC_ROW | {"id": str(i)} for i in range(7)]
    task = get_task("arc_challenge")
    for kind in ("parquet", "jsonl", "json"):
        folder = tmp_path / kind
        folder.mkdir()
        table = datasets.Dataset.from_list(rows)
        if kind == "parquet":
            table.to_parquet(folder / "train-00000-of-00001.parquet")
        else:
            table.to_json(folder / f"train.{kind}", lines=kind == "jsonl")
        assert load_rows(task, "train", str(folder)) == rows
    assert [e.id for e in load_examples(task, "train", str(tmp_path / "jsonl"), limit=3)] == [
        "0",
        "1",
        "2",
    ]


def test_csv_with_option_columns_is_read_by_mcqa(tmp_path):
    (tmp_path / "test.csv").write_text("q,one,two,right\nWhich?,oak,tin,tin\n")
    task = get_task("mcqa", columns={"question": "q", "options": "one,two", "answer": "right"})
    (example,) = load_examples(task, "test", str(tmp_path))
    assert (example.options, example.gold) == (("oak", "tin"), 1)


def test_hub_split_name_is_looked_for_before_ours(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [HELLASWAG_ROW | {"label": ""}])
    write_jsonl(tmp_path / "validation.jsonl", [HELLASWAG_ROW])
    assert load_rows(get_task("hellaswag"), "test", str(tmp_path))[0]["label"] == "0"


def test_single_file_is_shared_out_without_overlap_or_loss(tmp_path):
    path = write_jsonl(tmp_path / "all.jsonl", [ARC_ROW | {"id": str(i)} for i in range(500)])
    task = get_task("arc_challenge")
    train, test = (
        [row["id"] for row in load_rows(task, split, path)] for split in ("train", "test")
    )
    assert sorted(train + test, key=int) == [str(i) for i in range(500)]
    assert 70 <= len(test) <= 130  # 100 expected; 3 standard deviations are 27
    assert test == [row["id"] for row in load_rows(task, "test", path)]


def test_edited_file_is_read_anew(tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [ARC_ROW])
    assert len(load_rows(get_task("arc_easy"), "train", str(tmp_path))) == 1
    write_jsonl(tmp_path / "train.jsonl", [ARC_ROW, ARC_ROW])
    assert path and len(load_rows(get_task("arc_easy"), "train", str(tmp_path))) == 2


def test_empty_path_asks_the_hub_for_the_tasks_own_dataset_and_split(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([HELLASWAG_ROW])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_rows(get_task("hellaswag"), "test") == [HELLASWAG_ROW]
    assert asked == [(("Rowan/hellaswag", None), {"split": "validation"})]


def test_unreachable_hub_names_the_local_option(monkeypatch):
    def load(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # whatever the environment says
    with pytest.raises(
        UserError, match=r"(?s)Rowan/hellaswag.*no route.*config\.data\.path.*validation\.parquet"
    ):
        load_rows(get_task("hellaswag"), "test")
    with pytest.raises(UserError, match=r"'mcqa' has no Hub dataset.*config\.data\.path"):
        load_rows(get_task("mcqa"), "test")


def test_wrong_path_or_split_or_limit_is_named(tmp_path):
    task = get_task("arc_challenge")
    with pytest.raises(UserError, match="nowhere' does not exist"):
        load_rows(task, "train", str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"notes.txt' has no known ending; known: .parquet"):
        load_rows(task, "train", str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"no file for split 'train'.*There: notes.txt"):
        load_rows(task, "train", str(tmp_path))
    with pytest.raises(UserError, match=r"unknown split 'tset'. Did you mean 'test'\?"):
        load_rows(task, "tset", str(tmp_path))
    with pytest.raises(UserError, match="limit -1 is negative"):
        load_examples(task, "train", str(tmp_path), limit=-1)


def test_unreadable_or_empty_file_is_named(tmp_path):
    task = get_task("arc_challenge")
    (tmp_path / "train.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"train.parquet' cannot be read as .parquet"):
        load_rows(task, "train", str(tmp_path))
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"test.jsonl' is empty; a split needs at least one row"):
        load_rows(task, "test", str(tmp_path))
    path = write_jsonl(tmp_path / "one.jsonl", [ARC_ROW])
    empty = [split for split in ("train", "test") if _fails_as_empty(task, split, path)]
    assert len(empty) == 1  # one row goes to one split


def _fails_as_empty(task, split, path):
    try:
        return not load_rows(task, split, path)
    except UserError as error:
        assert f"split {split!r}" in str(error) and "is empty" in str(error)
        return True


def test_missing_column_is_named_with_those_there(tmp_path):
    row = {key: value for key, value in ARC_ROW.items() if key != "answerKey"}
    write_jsonl(tmp_path / "train.jsonl", [row])
    with pytest.raises(
        UserError, match=r"column 'answerKey' is missing.*Columns there: id, question, choices\."
    ):
        load_rows(get_task("arc_challenge"), "train", str(tmp_path))


def test_row_number_counts_in_the_whole_file(tmp_path):
    rows = [ARC_ROW | {"answerKey": "Z"} for _ in range(20)]
    path = write_jsonl(tmp_path / "all.jsonl", rows)
    with pytest.raises(UserError) as train:
        load_examples(get_task("arc_easy"), "train", path)
    with pytest.raises(UserError) as test:
        load_examples(get_task("arc_easy"), "test", path)
    numbers = {str(error.value).split(":")[0] for error in (train, test)}
    assert len(numbers) == 2 and "row 0" in numbers
