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


# --- answers of mcqa: one reading for a whole file ---

OPTIONS = ["w", "x", "y", "z"]


def golds(folder, files, split="train", limit=0, **columns):
    """The gold options of a split, of {file name: rows as (options, answer)}."""
    folder.mkdir(exist_ok=True)
    for name, rows in files.items():
        rows = [{"question": "q", "options": o, "answer": a} for o, a in rows]
        write_jsonl(folder / name, rows)
    path = folder if len(files) > 1 or "train" in next(iter(files)) else folder / next(iter(files))
    task = get_task("mcqa", columns=columns)
    return [e.options[e.gold] for e in load_examples(task, split, str(path), limit)]


@pytest.mark.parametrize("kind", [int, str, float])
def test_indices_count_from_what_the_whole_file_says(tmp_path, capsys, kind):
    def rows(answers):
        return [(OPTIONS, str(a) if kind is str else kind(a)) for a in answers]

    assert golds(tmp_path, {"train.jsonl": rows([1, 0, 3])}) == ["x", "w", "z"]
    assert capsys.readouterr().err == ""
    assert golds(tmp_path, {"train.jsonl": rows([1, 2, 4])}) == ["w", "x", "z"]
    assert "counted from 1, as none is 0" in capsys.readouterr().err
    assert golds(tmp_path, {"train.jsonl": rows([1, 2, 3])}) == ["x", "y", "z"]
    note = capsys.readouterr().err
    assert "counted from 0, though none is 0" in note and "data.columns.answer_base=1" in note
    for base, gold in (("0", "x"), ("1", "w")):
        (found, *_) = golds(tmp_path, {"train.jsonl": rows([1, 2, 3])}, answer_base=base)
        assert (found, capsys.readouterr().err) == (gold, "")
    of_letters = [(OPTIONS, "A")]  # a lone index among letters says nothing
    for others in (rows([0]), of_letters):
        with pytest.raises(UserError, match=r"row 1: .* \(0 to 3\); if .*answer_base=1"):
            golds(tmp_path, {"train.jsonl": others + rows([4])})


def test_the_row_that_tells_may_be_behind_the_limit_or_in_the_other_split(tmp_path, capsys):
    one = {"train.jsonl": [(OPTIONS, 1), (OPTIONS, 4)], "test.jsonl": [(OPTIONS, 2)]}
    assert golds(tmp_path / "a", one, limit=1) == ["w"]
    assert golds(tmp_path / "a", one, split="test") == ["x"]
    alone = {"all.jsonl": [(OPTIONS, 1)] * 8 + [(OPTIONS, 4)]}
    for split in ("train", "test"):
        assert golds(tmp_path / "b", alone, split=split, limit=1) == ["w"]
    zero = {"train.jsonl": [(OPTIONS, 0)], "test.jsonl": [(OPTIONS, 2)]}
    capsys.readouterr()
    assert golds(tmp_path / "c", zero, split="test") == ["y"] and not capsys.readouterr().err


def test_rows_that_cannot_be_read_tell_nothing_until_they_are_asked_for(tmp_path):
    files = {"train.jsonl": [(OPTIONS, 0)], "test.jsonl": [(["only"], 1), (None, 2), (OPTIONS, 3)]}
    assert golds(tmp_path, files) == ["w"]
    with pytest.raises(UserError, match="row 0: 1 options"):
        golds(tmp_path, files, split="test")


@pytest.mark.parametrize(
    "options, answer, reading, gold",
    [
        (["1", "2", "3", "4"], "2", "text", "2"),
        (["1", "2", "3", "4"], "2", "0", "3"),
        (["1", "2", "3", "4"], 2, "1", "2"),
        (["B", "A"], "A", "letter", "B"),
        (["B", "A"], "A", "text", "A"),
        (["x", "y"], "y", "0", "y"),
        (["x", "y"], "B", "1", "y"),
    ],
)
def test_answer_base_settles_what_an_answer_is(tmp_path, options, answer, reading, gold):
    files = {"train.jsonl": [(options, answer)]}
    assert golds(tmp_path, files, answer_base=reading) == [gold]


@pytest.mark.parametrize(
    "options, answer, reading, said",
    [
        (
            ["1", "2", "3"],
            "2",
            "",
            r"as a text it is option 2 \('2'\), as an index from 0 it is op",
        ),
        (["1", "2", "3"], 2, "", r"as an index from 0 it is option 3 \('3'\).*answer_base"),
        (["B", "A"], "A", "", r"as a text it is option 2 \('A'\), as a letter it is option 1"),
        ('["x", "y"]', "x", "", "a list of options is needed there, or a column for each"),
        (["x", "x"], "x", "", "fits more than one option"),
        (["x", "y"], "x", "letter", "'x' is no option's letter"),
        (["x", "y"], 1, "text", "1 is no option's text"),
        (["x", "y"], 2, "0", r"2 is no index of the 2 options \(0 to 1\)"),
        (["x", "y"], "0", "1", r"'0' is no index of the 2 options \(1 to 2\)"),
        (["x", "y"], -1, "", "-1 is no index"),
        (["x", "y"], 0.5, "", "0.5 is neither an index"),
        (["x", "y"], "01", "", "'01' is neither an index"),
        (["x", "y"], "9" * 5000, "", r"answer '9+\.\.\. \(5000 characters\) is neither"),
        (["x", "y"], True, "", "True is neither"),
        (["x", "y"], None, "", "column 'answer' is empty"),
    ],
)
def test_an_answer_without_one_reading_is_refused(tmp_path, options, answer, reading, said):
    with pytest.raises(UserError, match=said) as error:
        golds(tmp_path, {"train.jsonl": [(options, answer)]}, answer_base=reading)
    assert len(str(error.value)) < 500


def test_an_unknown_reading_is_refused_and_a_number_is_its_text():
    with pytest.raises(UserError, match="answer_base is '2'; it must be one of 0, 1, letter, text"):
        get_task("mcqa", columns={"answer_base": "2"})
    assert get_task("mcqa", columns={"answer_base": 0}).answer_base == "0"
    with pytest.raises(UserError, match="unknown pairs column key 'answer_base'"):
        get_task("pairs", columns={"answer_base": "1"})


def test_rows_of_a_csv_file_may_have_options_of_different_numbers(tmp_path):
    columns = {"options": "a,b,c,d"}
    (tmp_path / "train.csv").write_text(
        "question,a,b,c,d,answer\nq,1.0,NA,,,B\nq,w,x,y,z,D\nq,w,x,None,,C\n"
    )
    examples = load_examples(get_task("mcqa", columns=columns), "train", str(tmp_path))
    assert [e.options for e in examples] == [("1.0", "NA"), tuple(OPTIONS), ("w", "x", "None")]
    assert [e.options[e.gold] for e in examples] == ["NA", "z", "None"]
    for cells, said in (("w,,y,", "option 2 .*is empty"), ("w,,,", "1 options"), (",,,", "0 opt")):
        (tmp_path / "train.csv").write_text(f"question,a,b,c,d,answer\nq,{cells},A\n")
        with pytest.raises(UserError, match=f"row 0: {said}"):
            load_examples(get_task("mcqa", columns=columns), "train", str(tmp_path))
