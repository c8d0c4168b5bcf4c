"""Tasks: rows become examples, questions are asked, answers are graded."""

import dataclasses
import json

import pytest

from spear_jax.core.errors import UserError
from spear_jax.tasks import TASKS, get_task
from spear_jax.tasks.hellaswag import strip_markers
from spear_jax.tasks.letters import MARKERS
from spear_jax.tasks.loading import load_examples

ABCD = ("A", "B", "C", "D")

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
MATH_ROW = {
    "problem": "What is 2 + 3?",
    "choices": ["5", "6", "7", "8"],
    "answer": 0,
    "solution": "We add two numbers.\nSo the sum is 5.",
}
STRATEGY_ROW = {
    "qid": "s1",
    "question": "Can a fish climb?",
    "answer": False,
    "facts": "Fish live in water. Climbing needs limbs. Trees grow on land. Fins are weak.",
}
ROWS = {
    "arc_challenge": ARC_ROW,
    "arc_easy": ARC_ROW,
    "hellaswag": HELLASWAG_ROW,
    "agnews": {"text": "Boats race home. Ten crews were back by noon.", "label": 1},
    "math_mcqa": MATH_ROW,
    "strategy_qa": STRATEGY_ROW,
    "gsm8k": {"question": "What is 2 + 3 in dollars?", "answer": "We add <<2+3=5>>5.\n#### 5"},
    "mcqa": {"question": "What is light?", "options": ["wave", "stone"], "answer": 0},
    "ultrachat": {
        "messages": [
            {"role": "user", "content": "What is light?"},
            {"role": "assistant", "content": "A wave."},
        ]
    },
    "pairs": {"prompt": "What is light?", "response": "A wave."},
    "preferences": {"prompt": "What is light?", "chosen": "A wave.", "rejected": "A stone."},
}


# --- rows to examples ---


@pytest.mark.parametrize("count", [3, 5])
def test_arc_row_with_three_or_five_options_is_labelled_by_position(count):
    names = list("ABCDE"[:count])
    row = ARC_ROW | {
        "choices": {"text": [f"thing {n}" for n in names], "label": names},
        "answerKey": names[-1],
    }
    example = get_task("arc_challenge").example(row, 0)
    assert example.labels == tuple(names)
    assert example.gold == count - 1


def test_arc_row_with_numeric_labels_is_relabelled_with_letters():
    row = ARC_ROW | {
        "choices": {"text": ["p", "q", "r", "s"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    }
    example = get_task("arc_challenge").example(row, 0)
    assert example.labels == ABCD
    assert example.options[example.gold] == "r"
    assert get_task("arc_challenge").grade(" C", example)
    assert not get_task("arc_challenge").grade(" 3", example)


def test_hellaswag_label_is_a_string_and_layout_marks_are_removed():
    example = get_task("hellaswag").example(HELLASWAG_ROW | {"label": "2"}, 7)
    assert example.gold == 2
    assert example.question == "Cooking: How to boil an egg. Heat water. Use a pot."
    assert example.options[0] == "Put the egg in."


def test_title_mark_after_punctuation_adds_no_full_stop():
    assert strip_markers("Ready? [title] Go on [title] now") == "Ready? Go on. now"


def test_news_item_is_cleaned_and_cut_behind_its_last_whole_word():
    text = "Boats\\race  home. " + "abcdefghi " * 40
    example = get_task("agnews").example(ROWS["agnews"] | {"text": text}, 5)
    item = "Boats race home. " + "abcdefghi " * 30 + "..."  # 17 + 30 x 10 of 320 characters
    assert example.question == f"What is this news item about?\n{item}"
    assert (example.id, example.options[example.gold], example.labels) == ("5", "Sports", ABCD)
    task = get_task("agnews")
    assert task.hint(example, 3) == "Think of teams, athletes and matches."


@pytest.mark.parametrize("columns", [{}, {"question": "q", "options": "o", "answer": "a"}])
def test_news_is_read_from_rows_of_the_hub_and_of_mcqa(tmp_path, columns):
    names = [columns.get(name, name) for name in ("question", "options", "answer")]
    own = dict(zip(names, ["Who won?", ["us", "them"], 1], strict=True)) | {"hint": "Not us."}
    for name, row in (("hub", ROWS["agnews"]), ("own", own), ("neither", {"text": "Ten boats."})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text(json.dumps(row))
    task = get_task("agnews", columns=columns)
    (hub,) = load_examples(task, "test", str(tmp_path / "hub"))
    assert (hub.gold, len(hub.options)) == (1, 4)
    (example,) = load_examples(task, "test", str(tmp_path / "own"))
    assert (example.question, example.gold, example.support) == ("Who won?", 1, ("Not us.",))
    with pytest.raises(UserError, match=f"column '{names[0]}' is missing"):
        load_examples(task, "test", str(tmp_path / "neither"))


def test_strategy_facts_as_one_string_or_as_list_give_the_same_example():
    task = get_task("strategy_qa")
    facts = [
        "Fish live in water.",
        "Climbing needs limbs.",
        "Trees grow on land.",
        "Fins are weak.",
    ]
    assert task.example(STRATEGY_ROW, 0) == task.example(STRATEGY_ROW | {"facts": facts}, 0)
    assert task.example(STRATEGY_ROW, 0).support == tuple(facts)
    assert task.example(STRATEGY_ROW | {"facts": ""}, 0).support == ()


@pytest.mark.parametrize(
    "options, answer, gold",
    [
        (["p", "q", "r"], 2, 2),
        (["p", "q", "r"], "B", 1),
        (["p", "q", "r"], " q ", 1),
        (["p", "q", "r"], "2", 2),
        (["4", "2", "1"], "4", 0),  # the text of an option: there is no index 4
        (["4", "1", "2"], "1", 1),  # the text and the index are one option
        ([4, 2, 1], 0, 0),
    ],
)
def test_mcqa_answer_is_index_letter_or_text(options, answer, gold):
    example = get_task("mcqa").example(
        {"question": "Which?", "options": options, "answer": answer}, 0
    )
    assert example.gold == gold
    assert example.options == tuple(str(option) for option in options)


def test_mcqa_reads_options_from_several_columns_and_hints_from_its_own():
    columns = {"question": "q", "options": "w, x,y", "answer": "right", "hint": "clue"}
    task = get_task("mcqa", columns=columns)
    row = {
        "q": "Which?",
        "w": "tin",
        "x": "oak",
        "y": "wool",
        "right": "B",
        "clue": "It grows. It is oak. It burns.",
    }
    example = task.example(row, 0)
    assert task.columns == ("q", "w", "x", "y", "right", "clue")
    assert (example.options, example.gold) == (("tin", "oak", "wool"), 1)
    assert task.hint(example, 3) == "It grows. It burns."


# --- prompts ---


@pytest.mark.parametrize("name", sorted(ROWS))
def test_prompts_show_question_and_options_and_stay_short(name):
    task = get_task(name)
    example = task.example(ROWS[name], 0)
    asked = task.question(example)
    assert example.question in asked
    if "{options}" in task.templates.question:
        for label, option in zip(example.labels, example.options, strict=True):
            assert f"\n{label}. {option}\n" in asked
    revised = task.revision(example, " {old} answer\n", "Feedback {here}.")
    blocks = [
        revised.index(block)
        for block in (asked, "{old} answer", "Feedback {here}.", task.templates.format)
    ]
    assert blocks == sorted(blocks)
    fixed = task.templates.revision.replace("{", " ").replace("}", " ").split()
    assert len(fixed) < 60
    assert (
        task.templates.header == task.templates.header.strip() and "\n" not in task.templates.header
    )


@pytest.mark.parametrize("name", sorted(ROWS))
def test_answer_format_names_no_label(name):
    task = get_task(name)
    example = task.example(ROWS[name], 0)
    for gold in range(len(example.labels)):
        assert not task.leaks(task.templates.format, dataclasses.replace(example, gold=gold))


def test_reasoned_tasks_generate_and_protect_ten_answer_markers():
    for name, answer_only in (("math_mcqa", True), ("strategy_qa", False)):
        task = get_task(name)
        assert (task.scoring, task.answer_only, task.protected) == (
            "generate",
            answer_only,
            MARKERS,
        )
    for name in ("arc_challenge", "arc_easy", "hellaswag", "mcqa"):
        task = get_task(name)
        assert (task.scoring, task.answer_only, task.protected) == ("choice", True, ())


def test_math_ops_are_127_distinct_strings_without_letters_or_digits_alone():
    ops = get_task("math_mcqa").math_ops
    assert len(ops) == len(set(ops)) == 127
    assert not any(op.isascii() and op.isalnum() for op in ops)


def test_template_override_changes_one_task_and_only_there():
    task = get_task("arc_easy", templates={"question": "Q: {question} {options}", "revision": ""})
    assert task.question(task.example(ARC_ROW, 0)).startswith("Q: What is light? A. a wave")
    assert get_task("arc_easy").templates.question != task.templates.question
    assert task.templates.revision == get_task("arc_easy").templates.revision


# --- mistakes ---


@pytest.mark.parametrize(
    "name, change, problem",
    [
        (
            "arc_challenge",
            {"answerKey": "E"},
            "answerKey 'E' is none of the option labels A, B, C, D",
        ),
        ("arc_challenge", {"question": " "}, "column 'question' is empty"),
        (
            "arc_challenge",
            {"choices": {"text": ["p", ""], "label": ["A", "B"]}},
            "option 2 .* is empty",
        ),
        (
            "arc_challenge",
            {"choices": {"text": ["p", "q"], "label": ["A"]}},
            "2 option texts but 1 option labels",
        ),
        ("arc_challenge", {"choices": ["p", "q"]}, "'text' and 'label' are needed"),
        ("hellaswag", {"label": "4"}, "label '4' is no index of the 4 endings"),
        ("hellaswag", {"label": ""}, "label '' is no index"),
        ("hellaswag", {"endings": ["p", "[step]", "q", "r"]}, "option 2 .* is empty"),
        ("agnews", {"label": 4}, "label 4 is no index of the 4 topics"),
        ("agnews", {"text": " "}, "column 'text' is empty"),
        ("math_mcqa", {"answer": 4}, "answer 4 is no index of the 4 choices"),
        ("math_mcqa", {"answer": True}, "answer True is no index"),
        ("math_mcqa", {"choices": ["5"]}, "1 options in column 'choices', but 2 to 26"),
        ("math_mcqa", {"choices": "5, 6"}, "a list of options is needed"),
        ("strategy_qa", {"answer": "maybe"}, "answer 'maybe' is neither true nor false"),
        ("mcqa", {"answer": 2}, r"answer 2 is no index of the 2 options \(0 to 1\)"),
        ("mcqa", {"answer": "D"}, "neither an index, nor a letter, nor the text"),
        ("mcqa", {"options": ["B", "A"], "answer": "A"}, "fits more than one option"),
    ],
)
def test_row_that_breaks_a_rule_is_named(name, change, problem):
    with pytest.raises(UserError, match=f"row 31: .*{problem}.*never skipped"):
        get_task(name).example(ROWS[name] | change, 31)


def test_unknown_task_template_or_column_key_is_named():
    with pytest.raises(
        UserError, match=r"unknown task 'arc_challange'. Did you mean 'arc_challenge'\?"
    ):
        get_task("arc_challange")
    with pytest.raises(UserError, match=r"unknown template 'questions'. Did you mean 'question'\?"):
        get_task("arc_easy", templates={"questions": "x"})
    with pytest.raises(
        UserError, match=r"unknown mcqa column key 'anwser'. Did you mean 'answer'\?"
    ):
        get_task("mcqa", columns={"anwser": "x"})
    with pytest.raises(UserError, match="hold an empty name"):
        get_task("mcqa", columns={"options": "a,,b"})


@pytest.mark.parametrize(
    "key, text, problem",
    [
        ("question", "What? {options}", "lacks {question}"),
        ("revision", "{task}", "lacks {feedback}"),
        ("question", "{question} {choices}", "has the field '{choices}'"),
        ("question", "{question:>999999999999}", "has the field '{question:>9+}'"),
        ("question", "{question!r}", "has the field '{question!r}'"),
        ("question", "{question.__class__}", "has the field '{question.__class__}'"),
        ("question", "{question} {", "is '{question} {' .Single"),
        ("header", "Answer: ", "ends in white space"),
    ],
)
def test_template_that_cannot_work_is_named(key, text, problem):
    with pytest.raises(UserError, match=f"template '{key}'.*{problem}"):
        get_task("arc_easy", templates={key: text})


# --- real data ---


@pytest.mark.parametrize(
    "name, folder, split, count",
    [
        ("arc_challenge", "arc_challenge", "train", 1119),
        ("arc_challenge", "arc_challenge", "test", 1172),
        ("arc_easy", "arc_easy", "test", 2376),
        ("hellaswag", "hellaswag", "test", 10042),
        ("agnews", "agnews", "test", 1600),
        ("math_mcqa", "gsm8k_mcqa", "test", 1319),
        ("strategy_qa", "strategyqa", "test", 687),
        ("strategy_qa", "strategyqa_rich", "train", 1603),
    ],
)
def test_real_rows_all_become_examples_with_their_own_id(data_dir, name, folder, split, count):
    if not (data_dir / folder).is_dir():
        pytest.skip(f"no dataset {folder} in {data_dir}")
    task = get_task(name)
    examples = load_examples(task, split, str(data_dir / folder))
    assert len(examples) == len({example.id for example in examples}) == count
    for example in examples[:: max(1, count // 200)]:
        assert task.grade(f"Answer: {example.labels[example.gold]}", example)
        wrong = example.labels[example.gold - 1]
        assert not task.grade(f"Answer: {wrong}", example)


def test_real_arc_rows_include_three_and_five_options_all_with_letters(data_dir):
    examples = load_examples(get_task("arc_challenge"), "test", str(data_dir / "arc_challenge"))
    counts = [len(example.options) for example in examples]
    assert (counts.count(3), counts.count(4), counts.count(5)) == (
        4,
        1165,
        3,
    )  # counted with pandas
    assert {label for example in examples for label in example.labels} == set("ABCDE")


def test_the_hubs_news_become_the_questions_of_the_file(data_dir):
    if not (data_dir / "agnews").is_dir():
        pytest.skip(f"no dataset agnews in {data_dir}")
    task = get_task("agnews")
    whole = [
        example
        for example in load_examples(task, "train", str(data_dir / "agnews"))
        if not example.question.endswith(" ...")  # what was cut would be cut once more
    ]
    assert len(whole) > 5000
    for ours in whole:
        text = ours.question.partition("\n")[2]
        hub = task.example({"text": text, "label": ours.gold}, int(ours.id))
        assert hub.question.split() == ours.question.split()  # some hold runs of spaces
        assert dataclasses.replace(hub, question=ours.question) == ours


def test_every_hub_task_has_a_row_in_these_tests():
    assert {name for name, cls in TASKS.items() if cls.hub} <= set(ROWS)
