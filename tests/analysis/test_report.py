"""`report`: its numbers from hand-made run folders, its page as text, and the page in a browser
where there is one.
"""

import base64
import gzip
import html
import html.parser
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from spear_jax import report
from spear_jax.analysis import comparison
from spear_jax.analysis import runs as run_files
from spear_jax.analysis.report import figures, page, runs, traces
from spear_jax.core.errors import UserError
from spear_jax.experiment.config import default_config, flatten

SECTIONS = [
    "results",
    "runs",
    "feedback",
    "losses",
    "bytes",
    "time",
    "clients",
    "split",
    "traces",
    "config",
]
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
NASTY = "<script>alert('x')</script> & \"quoted\"\nsecond line <img src=http://a.b/c.png>"


def trace(client, example, correct, *revisions, role="lose", y0="A"):
    """A recorded trace; each revision is whether it was right."""
    told = [{"feedback": "That is wrong.", "text": "B", "correct": right} for right in revisions]
    asked = {
        "client": client,
        "example": example,
        "prompt": "Which?",
        "options": {"A": "one", "B": "two"},
        "gold": "B",
    }
    return asked | {
        "y0": y0,
        "correct": correct,
        "revisions": told,
        "role": role,
        "confidence": 1.0,
    }


def line(number, accuracy=None, **more):
    found = {"round": number, "time": 100.0 + 10 * number}
    if number:
        found |= {
            "round/bytes_up": 1e6,
            "round/bytes_down": 2e6,
            "rollout/tokens": 50.0,
            "budget/tokens": 50.0 * number,
        }
        found |= {
            "time/rollout": 1.0,
            "time/train": 2.0,
            "time/aggregate": 0.5,
            "train/loss": 1.0 / number,
        }
        found |= {
            "rollout/wins": 3.0,
            "rollout/loses": 2.0,
            "rollout/first_accuracy": 0.4,
            "rollout/fixed": 0.5,
        }
    if accuracy is not None:
        found |= {
            "eval/accuracy": accuracy,
            "eval/count": 40.0,
            "eval/stderr": 0.05,
            "time/eval": 0.25,
        }
    return found | more


def write_run(folder, lines, told=None, finished=True, split=None, **fields):
    """A run folder of these lines of metrics, traces by round, parts of a split, and fields that
    are not the default.
    """
    folder.mkdir(parents=True)
    config = default_config()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in fields.items()}
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    for number, entries in (told or {}).items():
        (folder / "traces").mkdir(exist_ok=True)
        with gzip.open(
            folder / "traces" / f"round_{number:05d}.jsonl.gz", "wt", encoding="utf-8"
        ) as out:
            out.writelines(json.dumps(entry) + "\n" for entry in entries)
    if finished:
        (folder / "summary.json").write_text("{}")
    if split is not None:
        (folder / "split.json").write_text(json.dumps({"clients": split}))
    return folder


TOLD = {
    1: [
        trace(3, "a", True, role="win"),
        trace(3, "b", False, False, True),
        trace(3, "c", False, False, False),
        trace(7, "d", False, role="unused"),
        trace(7, "e", True, role="win"),
    ],
    2: [
        trace(3, "a", True, role="win"),
        trace(3, "b", True, role="win"),
        trace(5, "f", False, True, y0=NASTY),
    ],
}


@pytest.fixture
def single(tmp_path):
    return write_run(
        tmp_path / "one",
        [line(0, 0.25), line(1), line(2, 0.5)],
        TOLD,
        split=[[0, 1, 2], [3], [4, 5]],
        rounds=2,
    )


@pytest.fixture
def grid(tmp_path):
    """Two labels of three and two seeds, the last of each not finished, and a cell that has not
    been evaluated.
    """
    folder = tmp_path / "grid"
    for label, fields, ends in (
        ("spear", {}, (0.6, 0.7, 0.8)),
        ("slow", {"train__learning_rate": 0.25, "lora__rank": 4}, (0.5, 0.7, 0.9)),
    ):
        for seed, end in enumerate(ends):
            done = label == "spear" or seed < 2
            lines = [line(0, 0.2), line(1, 0.4 + 0.1 * seed), line(2, end)]
            write_run(
                folder / label / f"seed{seed}",
                lines,
                finished=done,
                split=[[seed], [1, 2]],
                seed=seed,
                **fields,
            )
    write_run(folder / "late" / "seed0", [], finished=False)
    golds = {"spear": {"gold": ""}, "slow": {"gold": "responses"}, "late": {"gold": ""}}
    versions = {"python": "3.99.1", "jax": "9.8.7"}
    comparison.write_request(
        folder, {"budget": {"kind": "rounds", "amount": 2}, "labels": golds, "versions": versions}
    )
    return folder


def write_report(out, *workdirs):
    found = report.main(["--workdir", *map(str, workdirs), f"--out={out}", "--quiet"])
    assert all((out / name).stat().st_size > 0 for name in found["files"])
    return found, (out / "report.html").read_text(encoding="utf-8")


class Reader(html.parser.HTMLParser):
    """The page's tags with attributes, and its text by section."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.section = [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs)["id"]

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data


def test_heat_map_numbers_are_those_counted_by_hand(single, tmp_path):
    (run,), _ = runs.find_runs([single])
    clients, rounds, values, left = traces.client_grid(traces.client_counts(run), 60)
    assert list(clients) == [3, 5, 7] and list(rounds) == [1, 2] and left == 0
    # client 3: one of three right, then two of two; client 5: nothing, then none of one; client 7:
    # one of two, then nothing
    assert np.array_equal(values, [[1 / 3, 1.0], [np.nan, 0.0], [0.5, np.nan]], equal_nan=True)
    write_report(tmp_path / "out", single)
    table = pd.read_csv(tmp_path / "out" / "clients.csv").set_index(["round", "client"])
    # answers, right at once, wrong and then right, trained on as a lose
    assert table.loc[(1, 3), ["answers", "first_right", "fixed", "loses"]].tolist() == [3, 1, 1, 2]
    assert table.loc[(1, 7), ["answers", "first_right", "fixed", "loses"]].tolist() == [2, 1, 0, 0]
    assert table.loc[(2, 5), ["answers", "first_right", "fixed", "loses"]].tolist() == [1, 0, 1, 1]
    assert len(table) == 4 and set(table["run"]) == {"one"}


def test_a_heat_map_shows_the_clients_with_most_answers_and_counts_the_rest(single):
    (run,), _ = runs.find_runs([single])
    clients, _, values, left = traces.client_grid(traces.client_counts(run), 2)
    assert list(clients) == [3, 7] and values.shape == (2, 2) and left == 1  # 5, 2 and 1 answers


def test_traces_of_a_round_that_is_not_finished_are_not_counted(single):
    shutil.copy(
        single / "traces" / "round_00001.jsonl.gz", single / "traces" / "round_00003.jsonl.gz"
    )
    (run,), _ = runs.find_runs([single])
    assert traces.rounds_with_traces(run) == [1, 2]


def test_samples_are_of_every_kind_from_both_ends_and_of_different_clients(single):
    (run,), _ = runs.find_runs([single])
    told = [(x["kind"], x["round"], x["client"], x["example"]) for x in traces.sample(run, 2)]
    assert told == [
        ("fixed", 2, 5, "f"),
        ("fixed", 1, 3, "b"),
        ("not fixed", 1, 3, "c"),
        ("right at once", 2, 3, "a"),
        ("right at once", 1, 7, "e"),
        ("wrong, not revised", 1, 7, "d"),
    ]
    assert [x["kind"] for x in traces.sample(run, 1)] == list(traces.KINDS)


def test_config_differences_are_the_fields_that_differ(grid):
    found, begun = runs.find_runs([grid])
    assert begun == ["late/seed0"]
    between, common = runs.differences(found, flatten(default_config()))
    assert list(between.columns) == ["field", "default", "slow", "spear"]
    assert sorted(between.to_numpy().tolist()) == [
        ["lora.rank", "16", "4", "16"],
        ["train.learning_rate", "5e-05", "0.25", "5e-05"],
    ]
    assert common.to_numpy().tolist() == [["seed", "0", "0, 1, 2"]]


def test_a_field_that_a_run_or_the_default_lacks_is_a_dash(tmp_path):
    folders = [write_run(tmp_path / name, [line(0, 0.5)]) for name in "ab"]
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"gone": 3}))
    between, common = runs.differences(runs.find_runs(folders)[0], flatten(default_config()))
    assert between.to_numpy().tolist() == [["gone", "-", "3", "-"]] and common.empty


def test_results_of_seeds_are_those_of_compare(grid):
    table = runs.results(runs.find_runs([grid])[0]).set_index("label")
    write_budgets(grid)
    theirs = comparison.grid_table(grid).set_index("method")
    assert list(table.index) == ["spear", "slow"]
    for label, row in table.iterrows():
        half = theirs.loc[label, "half_width"]
        assert row["after"] == pytest.approx(theirs.loc[label, "accuracy"])
        assert (row["low"], row["high"]) == pytest.approx(
            (max(0, row["after"] - half), min(1, row["after"] + half))
        )
        assert 1e6 * (row["mb_up"] + row["mb_down"]) == pytest.approx(theirs.loc[label, "bytes"])
    # 0.6, 0.7, 0.8: s = 0.1, t(2) = 4.3027; the unfinished run of "slow" does not count
    assert table.loc["spear", "high"] == pytest.approx(0.7 + 4.3027 * 0.1 / math.sqrt(3), abs=1e-5)
    assert tuple(table.loc["slow", ["finished", "runs", "gold", "after"]]) == (
        2,
        3,
        "responses",
        pytest.approx(0.6),
    )
    # two rounds of 50 tokens, 3 wins, 2 loses and 3.5 s; 20 s from the first line to the last
    assert table.loc["spear", ["tokens", "wins", "loses", "seconds", "wall"]].tolist() == [
        100,
        6,
        4,
        7,
        20,
    ]


def write_budgets(grid):
    """Adds what `analysis.cell_result` reads beyond this file's lines."""
    for file in grid.glob("*/seed*/metrics.jsonl"):
        lines = [
            json.loads(text) | {"budget/flops": 1.0, "budget/seconds": 1.0}
            for text in file.read_text().splitlines()
        ]
        file.write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_a_single_run_has_the_score_interval(single):
    row = runs.results(runs.find_runs([single])[0]).iloc[0]
    # 20 of 40: centre 0.5, half width 1.96 sqrt(0.25/40 + 1.96^2/(4 * 40^2)) / (1 + 1.96^2/40) =
    # 0.14801
    assert (row["low"], row["high"]) == pytest.approx((0.35199, 0.64801), abs=2e-5)


def test_curves_are_means_over_seeds_with_t_intervals_and_score_intervals_of_answers(grid, single):
    found = runs.by_label(runs.find_runs([grid])[0])
    curve = figures.curve("spear", found["spear"], "eval/accuracy")
    assert list(curve.x) == [0, 1, 2] and curve.y == pytest.approx(
        [0.2, 0.5, 0.7]
    )  # 0.4, 0.5, 0.6 in round 1
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert curve.high - curve.y == pytest.approx([0, half, half], abs=1e-5)
    curve = figures.curve("one", runs.find_runs([single])[0], "rollout/first_accuracy")
    # 0.4 of 5 answers in round 1: z^2 = 3.84146, centre (0.4 + z^2/10) / (1 + z^2/5) = 0.44345,
    # half width 1.95996 sqrt(0.24/5 + z^2/100) / (1 + z^2/5) = 0.32580
    assert (curve.low[0], curve.high[0]) == pytest.approx((0.11764, 0.76927), abs=2e-5)
    assert figures.curve("one", runs.find_runs([single])[0], "train/unlikelihood") is None


def test_a_method_that_generates_nothing_is_one_point_against_tokens(tmp_path):
    free = {"budget/tokens": 0.0}
    for seed in (0, 1):
        lines = [line(0, 0.2), line(1, 0.4 + 0.2 * seed, **free)]
        write_run(tmp_path / "g" / "sft" / f"seed{seed}", lines, seed=seed)
    curve = figures.curve(
        "sft", runs.find_runs([tmp_path / "g"])[0], "eval/accuracy", "budget/tokens"
    )
    assert list(curve.x) == [0] and curve.y == pytest.approx([0.5])


def test_all_sections_are_present_and_linked(single, grid, tmp_path):
    for name, workdirs in {"a": [single], "b": [grid], "c": [single, grid]}.items():
        read = Reader(write_report(tmp_path / name, *workdirs)[1])
        assert [x["id"] for tag, x in read.tags if tag == "section"] == SECTIONS
        links = [x["href"] for tag, x in read.tags if tag == "a"]
        assert links == [f"#{name}" for name in SECTIONS]
        assert all(read.text[section].strip() for section in SECTIONS)
        assert all(len(x["alt"]) > 30 for tag, x in read.tags if tag == "img")


def test_what_averaging_loses_has_a_panel_where_it_was_measured(single, tmp_path):
    meter = {"round/aggregation_error": 0.25, "round/aggregation_error_q": 0.125}
    lines = [line(0, 0.4), line(1, **meter), line(2, 0.5, **meter)]
    write_run(tmp_path / "metered", lines, federation__lora_rule="fedex")
    result, page = write_report(tmp_path / "out", tmp_path / "metered", single)
    read = Reader(page)
    assert "aggregation" in [x["id"] for tag, x in read.tags if tag == "section"]
    assert "2.50e-01" in read.text["aggregation"] and "1.25e-01" in read.text["aggregation"]
    assert (tmp_path / "out" / "aggregation_error.svg").is_file()


def test_what_a_private_run_reveals_has_a_panel_and_says_what_it_does_not_cover(single, tmp_path):
    private = lambda epsilon: {"privacy/epsilon": epsilon, "privacy/delta": 1e-3}
    lines = [line(0, 0.4), line(1, **private(0.5)), line(2, 0.5, **private(0.75))]
    write_run(tmp_path / "private", lines, privacy__noise_multiplier=1.0)
    read = Reader(write_report(tmp_path / "out", tmp_path / "private", single)[1])
    assert "7.50e-01" in read.text["privacy"] and "does not cover" in read.text["privacy"]
    assert (tmp_path / "out" / "epsilon.svg").is_file()
    assert (tmp_path / "out" / "accuracy_epsilon.svg").is_file()


def test_accuracy_is_drawn_against_the_simulated_clock_where_there_is_one(single, tmp_path):
    lines = [
        {**x, "sim/clock": 20.0 * x["round"]} if x["round"] else x
        for x in (line(0, 0.4), line(1, 0.45), line(2, 0.5))
    ]
    write_run(tmp_path / "timed", lines, participation__clock=True)
    write_report(tmp_path / "out", tmp_path / "timed", single)
    assert (tmp_path / "out" / "accuracy_clock.svg").is_file()
    write_report(tmp_path / "plain", single)
    assert not (tmp_path / "plain" / "accuracy_clock.svg").exists()


def test_what_a_model_wrote_is_text_and_no_markup(single, tmp_path):
    _, text = write_report(tmp_path / "out", single)
    read = Reader(text)
    assert NASTY in read.text["traces"]
    assert not [tag for tag, _ in read.tags if tag == "script"]
    assert all(x["src"].startswith("data:image/") for tag, x in read.tags if tag == "img")


def test_the_page_names_no_address_and_holds_its_figures(single, grid, tmp_path):
    found, text = write_report(tmp_path / "out", grid)
    read = Reader(text)
    for _, attributes in read.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            assert re.match(r"data:image/|#\w+$", attributes.get(name) or "#x")
    assert not re.search(r"@import|url\(", text)
    sources = [base64.b64decode(x["src"].partition(",")[2]) for tag, x in read.tags if tag == "img"]
    drawn = {name for name in found["files"] if name.endswith(".svg")}
    assert drawn and {name.replace(".svg", ".png") for name in drawn} <= set(found["files"])
    assert sorted(sources) == sorted((tmp_path / "out" / name).read_bytes() for name in drawn)
    assert not any(re.search(rb"(href|src)=.http", source) for source in sources)


def test_the_same_runs_give_the_same_page(single, tmp_path):
    assert write_report(tmp_path / "a", single)[1] == write_report(tmp_path / "b", single)[1]


def test_a_run_that_goes_on_without_traces_split_and_wins_is_reported_in_sentences(tmp_path):
    lines = [line(0, 0.25), line(1, 0.3, **{"rollout/wins": 0.0, "rollout/loses": 0.0})]
    for metric in ("rollout/first_accuracy", "rollout/fixed"):
        lines[1].pop(metric)
    folder = write_run(tmp_path / "going", lines, finished=False)
    with (folder / "metrics.jsonl").open("a") as out:
        out.write('{"round": 2, "time": 12')  # a line that is being written
    found, text = write_report(tmp_path / "out", folder)
    read = Reader(text)
    assert "One run, not finished so far; 1 round." in read.text[""]
    assert "Versions were not recorded" in read.text["runs"]
    for name in ("Wins", "Loses", "First answers right", "Fixed"):
        assert f"{name}: nothing was recorded, or only zeros, by going." in read.text["feedback"]
    assert (
        "No traces were recorded by going" in read.text["clients"]
        and "going" in read.text["traces"]
    )
    assert "No run folder holds a split.json." in read.text["split"]
    assert "nothing to compare" in read.text["config"]
    assert not [
        name
        for name in found["files"]
        if name.startswith(("wins", "loses", "fixed", "split", "clients_"))
    ]


def test_a_run_after_its_first_evaluation_has_a_report(tmp_path):
    folder = write_run(tmp_path / "young", [line(0, 0.25)], finished=False)
    _, text = write_report(tmp_path / "out", folder)
    assert "One run, not finished so far; 0 rounds." in text


def test_answers_that_nothing_grades_have_no_heat_map_and_no_verdict(tmp_path):
    told = {1: [trace(0, "a", False, role="unused")]}
    folder = write_run(tmp_path / "chat", [line(0, 0.2), line(1, 0.3, **{"eval/nll": 2.0})], told)
    found, text = write_report(tmp_path / "out", folder)
    read = Reader(text)
    assert (
        "Nothing grades the answers of chat." in read.text["clients"]
        and "clients_chat.svg" not in found["files"]
    )
    assert "not graded" in read.text["traces"] and "wrong" not in read.text["traces"]


def test_a_compare_folder_is_told_by_label_with_what_it_recorded(grid, tmp_path):
    found, text = write_report(tmp_path / "out", grid)
    read = Reader(text)
    assert found["runs"] == 6 and "python 3.99.1, jax 9.8.7" in read.text["runs"]
    assert "Left out, because nothing has been evaluated yet: late/seed0." in read.text["runs"]
    assert "2 of 3" in read.text["results"] and "0.452 to 0.948" in read.text["results"]
    assert "train.learning_rate" in read.text["config"] and "train.steps" not in read.text["config"]
    # one split a seed, shared by both labels
    assert (
        read.text["split"].count("slow/seed0, spear/seed0") == 1
        and read.text["split"].count("seed 1") == 1
    )


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name / "run", [line(0, 0.5)]) for name in "ab"]
    found, _ = runs.find_runs([*folders, folders[0]])
    assert [run.name for run in found] == ["a/run", "b/run"]
    files, _ = write_report(tmp_path / "out", *folders)
    tidy = pd.read_csv(tmp_path / "out" / "metrics.csv")
    assert set(tidy["run"]) == {"a/run", "b/run"} and list(tidy.columns) == [
        "run",
        "round",
        "metric",
        "value",
    ]
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["eval.last.accuracy"].tolist() == [
        0.5,
        0.5,
    ]
    assert "accuracy.png" in files["files"]


@pytest.mark.parametrize(
    "text, words", [(None, "no metrics.jsonl"), ("", "wait for the first evaluation")]
)
def test_a_folder_without_an_evaluated_run_is_a_user_error(tmp_path, text, words):
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=words):
        report.main([f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_a_user_error(single):
    with pytest.raises(UserError, match="which is a file"):
        report.main([f"--workdir={single}", f"--out={single / 'metrics.jsonl'}"])


def test_long_texts_are_cut_and_say_so():
    assert page.shorten("x" * (page.LONGEST + 1234)).endswith("x… (1,234 more characters)")
    assert (
        page.shorten("x" * page.LONGEST) == "x" * page.LONGEST and page.shorten(" \n") == "(empty)"
    )


@pytest.fixture
def wide(tmp_path):
    """What stretches a page: many labels, long names, long words, many rounds and clients, figures
    of splits.
    """
    word = "unbreakable" * 40
    for index in range(7):
        told = {1: [trace(c, f"example-{c}", c % 2 == 0, False, y0=word) for c in range(9)]}
        lines = [line(0, 0.2), *(line(n, 0.3 + 0.001 * n) for n in range(1, 31))]
        name = f"a_label_of_some_length_{index}"
        fields = {"train__learning_rate": 0.1 + index, "data__path": f"/{'folder' * 20}/{index}"}
        write_run(tmp_path / "wide" / name / "seed0", lines, told, split=[[0, 1]] * 9, **fields)
    return tmp_path / "wide"


@pytest.mark.skipif(BROWSER is None, reason="no chromium on PATH")
def test_a_browser_shows_the_page_without_sideways_scrolling(single, wide, tmp_path):
    for name, workdir in {"single": single, "wide": wide}.items():
        _, text = write_report(tmp_path / name, workdir)
        for width in (1280, 390):
            seen = measure(text, tmp_path / f"{name}.html", tmp_path / "profile", width)
            assert seen["innerWidth"] == width and seen["scrollWidth"] <= width, seen
            assert seen["images"] > 0 and seen["broken"] == 0 and seen["requests"] == 0, seen
    assert seen["boxes"] > 0, "no table is wider than its box: the page was not tried"


def measure(text, file, profile, width):
    """What a browser finds out about the page in a frame of this width: a window of its own is
    never so narrow.
    """
    script = """addEventListener("load", () => {
      const view = document.querySelector("iframe").contentWindow, page = view.document;
      const images = [...page.images], boxes = [...page.querySelectorAll(".scroll")];
      document.getElementById("seen").textContent = JSON.stringify({
        innerWidth: view.innerWidth, scrollWidth: page.scrollingElement.scrollWidth, images: images.length,
        broken: images.filter(x => !x.complete || !x.naturalWidth).length,
        boxes: boxes.filter(x => x.scrollWidth > x.clientWidth).length,
        requests: view.performance.getEntriesByType("resource").filter(x => !x.name.startsWith("data:")).length });
    })"""
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(text)}"></iframe>'
    file.write_text(
        f'<meta charset="utf-8">{frame}<pre id="seen"></pre><script>{script}</script>',
        encoding="utf-8",
    )
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run(
        [*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120
    )
    found = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1])


def test_an_interval_holds_its_fraction_to_the_last_bit():
    for count in range(1, 400):
        for right in (0, 1, count // 2, count):
            low, high = run_files.wilson(right / count, count)
            assert 0.0 <= low <= right / count <= high <= 1.0
