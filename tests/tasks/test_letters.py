"""Letters: which option a completion names, and where."""

import time

import pytest

from spear_jax.tasks.letters import MARKERS, extract_letter, extract_word

ABCD = ("A", "B", "C", "D")


@pytest.mark.parametrize(
    "text, label",
    [
        ("Answer: C", "C"),
        (" B", "B"),
        ("B.", "B"),
        ("(D) the moon", "D"),
        ("**C**", "C"),
        ("A\n\nBecause light is fast.", "A"),
        ("A: a wave", "A"),
        ("The answer is (B), not A.", "B"),
        ("the answer is: **D**", "D"),
        ("**Answer:** C", "C"),
        ("Answer: option B", "B"),
        (r"Answer: $\boxed{\text{C}}$", "C"),
        ("Answer:\nD", "D"),
        ("Answer: A. First.\nOn reflection, the answer is C because it floats.", "C"),
        ("A total of 12 is left over.\nAnswer: C", "C"),  # A4: a first-match reader says A
        ("ANSWER: B", "B"),
    ],
)
def test_letter_that_is_named_is_found_with_its_span(text, label):
    found = extract_letter(text, ABCD)
    assert found is not None
    assert ABCD[found.option] == label
    assert text[found.start : found.end] == label
    # the span is the label that the last marker names, not an earlier occurrence
    assert label not in text[found.end :].split("Answer")[-1].split()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer can be found below.",  # A5: read as C by a reader without word boundaries
        "answer: can",
        "a wave is light",  # A5: the article
        "answer: a wave",
        "A total of 12",
        "A wave",
        "Answer: Certainly",
        "Answer: A4 paper",
        "Answer: B-flat",
        "Answer: C's cup",
        "Answer: E",  # no such option
        "E",
        "D.C. is in the east",
        "I would say C",
        "BANSWER: C",
        "b",
    ],
)
def test_text_that_names_no_letter_gives_nothing(text):
    assert extract_letter(text, ABCD) is None


def test_only_labels_of_the_example_count():
    assert extract_letter("Answer: D", ("A", "B", "C")) is None
    assert extract_letter("Answer: E", ("A", "B", "C", "D", "E")).option == 4


@pytest.mark.parametrize(
    "text, label",
    [
        ("Fins are weak. Answer: no", "no"),
        ("Yes, it can.\nAnswer: No.", "no"),
        ("The answer is **Yes**.", "yes"),
        ("No", "no"),
        ("Yes, because water is wet", "yes"),
        ("Answer: NO", "no"),
    ],
)
def test_yes_or_no_is_read_in_any_case(text, label):
    found = extract_word(text, ("yes", "no"))
    assert ("yes", "no")[found.option] == label
    assert text[found.start : found.end].lower() == label


@pytest.mark.parametrize(
    "text", ["Nobody knows.", "Answer: none", "Answer: yesterday", "No one knows", "Fins."]
)
def test_part_of_a_word_is_not_yes_or_no(text):
    assert extract_word(text, ("yes", "no")) is None


def test_long_runs_of_marks_are_read_in_linear_time():
    start = time.perf_counter()
    assert extract_letter("Answer:" + " *" * 50_000 + "x", ABCD) is None
    assert time.perf_counter() - start < 2.0  # quadratic time would take minutes


def test_markers_are_ten_variants_of_one_marker():
    assert len(set(MARKERS)) == 10
    assert {"".join(marker.lower().split()) for marker in MARKERS} == {"answer:"}
