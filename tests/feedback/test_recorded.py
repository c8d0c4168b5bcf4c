"""Feedback that is asked for: kept on disk, asked for once, replayed, and simulated."""

import json

import numpy as np
import pytest
from run_sizes import SMALL

import spear_jax as sj
from spear_jax.core.errors import UserError
from spear_jax.core.types import Attempt, Trace
from spear_jax.experiment import builder, dry_run
from spear_jax.feedback.base import NOBODY, Request, RunView
from spear_jax.feedback.recorded import (
    FILE,
    Answer,
    FeedbackLog,
    FeedbackSettings,
    Recorded,
    Replay,
)
from spear_jax.feedback.registry import get_feedback
from spear_jax.feedback.simulated import Simulated
from spear_jax.tasks import get_task

TASK = get_task("facts")
EXAMPLES = TASK.generate("train")[:400]


class People(Recorded):
    """Answers what its script holds, and notes what it was asked."""

    def __init__(self, settings, script):
        super().__init__(TASK, 3, settings)
        self.script, self.asked = script, []

    def ask(self, requests):
        for request in requests:
            self.asked.append(request.id)
            if request.id in self.script:
                yield request, self.script[request.id]


def requests(count):
    return [
        Request(EXAMPLES[i], f" {'ABCD'[i % 4]}", 1, f"id-{i}", client=i % 3) for i in range(count)
    ]


def view(folder):
    return RunView("run", folder, 3, 1, EXAMPLES, lambda asked: [], lambda text: len(text.split()))


def test_what_was_said_is_on_disk_before_it_is_used_and_is_asked_for_once(tmp_path):
    script = {"id-0": Answer(None, "think", "ann", 2.0), "id-1": Answer(None, None, "bo")}
    people = People(FeedbackSettings(), script)
    people.begin_run(view(tmp_path))
    held = []

    def ask(some):
        for found in People.ask(people, some):
            yield found
            # the generator goes on when the answer before has been kept
            held.append((tmp_path / FILE).read_text().count("\n"))

    people.ask = ask
    said = people(requests(3))
    assert held == [1, 2]
    assert said[0].endswith("think") and said[1] is None and said[2] is NOBODY
    again = People(FeedbackSettings(), {})
    again.begin_run(view(tmp_path))
    assert again(requests(3)) == said and again.asked == []


def test_a_line_that_a_kill_cut_short_is_asked_for_again(tmp_path):
    people = People(FeedbackSettings(), {f"id-{i}": Answer(None, f"h{i}", "ann") for i in range(3)})
    people.begin_run(view(tmp_path))
    people(requests(3))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[:-7])
    again = People(FeedbackSettings(), people.script)
    again.begin_run(view(tmp_path))
    again(requests(3))
    assert again.asked == ["id-2"]
    assert [json.loads(line)["id"] for line in (tmp_path / FILE).read_text().splitlines()] == [
        "id-0",
        "id-1",
        "id-2",
    ]


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "x"}', '{"id": "x", "answered": true}', "5"])
def test_a_damaged_file_is_named_with_its_line(tmp_path, line):
    (tmp_path / FILE).write_text(f'{{"id": "a", "answered": false}}\n{line}\n')
    with pytest.raises(UserError, match=f"{FILE}, line 2: .*is no feedback"):
        FeedbackLog(tmp_path / FILE)


def test_metrics_count_what_was_asked_answered_hinted_and_leaked(tmp_path):
    first = requests(1)[0].example
    gold = first.options[first.gold]
    script = {
        "id-0": Answer(None, f"it is {gold}", "ann"),
        "id-1": Answer(None, "look", "ann"),
        "id-2": Answer(None, None, "ann"),
    }
    people = People(FeedbackSettings(), script)
    people.begin_run(view(tmp_path))
    texts = people(requests(5))
    words = [len(text.split()) for text in texts[:2]]
    assert people.take_metrics() == {
        "feedback/beside": 0.0,
        "feedback/asked": 5.0,
        "feedback/answered": 3.0,
        "feedback/hints": 2.0,
        "feedback/leaks": 1.0,
        "feedback/tokens": float(sum(words)),
        "feedback/tokens_of_most": float(max(words)),
    }
    assert set(people.take_metrics().values()) == {0.0}


# --- verdicts of people in the place of the task's ---


def test_a_verdict_decides_what_is_right_and_a_hint_goes_with_it():
    script = {
        "id-0": Answer(True, None, "ann"),
        "id-1": Answer(False, "look", "ann"),
        "id-2": Answer(False, None, "ann"),
    }
    people = People(FeedbackSettings(asks="verdict"), script)
    assert people.judges and not People(FeedbackSettings(), {}).judges
    some = requests(4)
    assert people.judge(some) == [True, False, False, None]
    told = people(some[1:])
    assert told[0].endswith("look") and "wrong" in told[1] and told[2] is NOBODY
    assert people.asked == [f"id-{i}" for i in range(4)]  # once each


def config(**fields):
    made = sj.preset("spear", task="facts", model="tiny", variants=["smoke"])
    made.update_from_flattened_dict(SMALL | {"rounds": 2} | fields)
    return made


def comparable(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outside = ("time", "memory", "compile", "budget/seconds")
    return [{k: v for k, v in line.items() if not k.startswith(outside)} for line in lines]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose verdicts are those of people who err and do not always answer."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    fields = {
        "rollout.feedback": "simulated",
        "feedback.asks": "verdict",
        "feedback.reply_rate": 0.7,
        "feedback.error_rate": 0.3,
    }
    sj.Run(config(**fields), folder, quiet=True).train()
    return folder


def test_wins_are_what_people_called_right_and_unanswered_traces_are_left_out(taught):
    said = [json.loads(line) for line in (taught / FILE).read_text().splitlines()]
    lines = comparable(taught)
    for number in (1, 2):
        own = [line for line in said if line["round"] == number]
        firsts = [line for line in own if line["attempt"] == 0]
        answered = [line for line in firsts if line["answered"]]
        assert len(answered) < len(firsts)
        right = sum(line["verdict"] for line in answered)
        fixed = sum(bool(line.get("verdict")) for line in own if line["attempt"] > 0)
        metrics = lines[number]
        assert metrics["rollout/first_accuracy"] == pytest.approx(right / len(answered))
        assert metrics["rollout/wins"] == right + fixed
        assert metrics["feedback/answered"] == sum(line["answered"] for line in own)
        assert metrics["feedback/asked"] == len(own)


def test_a_replay_gives_the_same_bits_without_asking(taught, tmp_path):
    fields = {
        "rollout.feedback": "replay",
        "feedback.asks": "verdict",
        "feedback.replay": str(taught),
    }
    run = sj.Run(config(**fields), tmp_path / "run", quiet=True)
    run.train()
    assert comparable(tmp_path / "run") == comparable(taught)
    for one, other in zip(
        *(leaves(sj.load_run(folder, quiet=True)) for folder in (taught, tmp_path / "run")),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def leaves(run):
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(run.state.lora)]


def test_a_replay_of_another_run_is_refused_by_the_answer(taught, tmp_path):
    fields = {
        "rollout.feedback": "replay",
        "feedback.asks": "verdict",
        "feedback.replay": str(taught),
    }
    with pytest.raises(UserError, match="round 1: .* has nothing on the answer .*The runs differ"):
        sj.Run(config(**fields, seed=5), tmp_path / "run", quiet=True).train()
    with pytest.raises(UserError, match="is empty"):
        Replay(TASK, 3, FeedbackSettings())
    with pytest.raises(UserError, match=f"where no {FILE} is"):
        Replay(TASK, 3, FeedbackSettings(replay=str(tmp_path))).begin_run(view(tmp_path))


def test_a_dry_run_asks_nobody():
    made = config(**{"rollout.feedback": "replay", "feedback.replay": "nowhere"})
    built = builder.build(made)
    (ids,) = dry_run.revision_prompts(built, 1)
    assert ids and not built.federation.worker.feedback.log.said


def test_a_trace_beside_the_rounds_belongs_to_its_client_and_round_alone(tmp_path):
    made = {"prompt": [1], "completion": [2], "logprobs": [-0.5], "text": "A", "correct": True}
    made |= {"feedback": "", "unlikelihood_mask": None}
    known = {"example": EXAMPLES[0].id, "question": "", "attempts": [made]}
    asked = {"example": "chat", "question": "What now?", "attempts": [made, made]}
    people = People(FeedbackSettings(), {})
    people.begin_run(view(tmp_path))
    for client, held in ((0, known), (1, asked)):
        people.log.write({"beside": 2, "client": client} | held)
    again = People(FeedbackSettings(), {})
    again.begin_run(view(tmp_path))
    for round, clients, wanted in (
        (1, [0, 1], []),
        (2, [0], [0]),
        (2, [1, 0], [0, 1]),
        (2, [3], []),
    ):
        again.begin_round(round)
        assert [trace.client for trace in again.beside(clients)] == wanted
    first, second = again.beside([0, 1])
    assert first.example is EXAMPLES[0] and second.example.question == "What now?"
    assert first.beside and len(second.attempts) == 2 and second.last.logprobs == [-0.5]


def test_methods_that_grade_by_gold_refuse_verdicts(tmp_path):
    made = sj.preset("grpo", task="facts", model="tiny", variants=["smoke"])
    made.rollout.feedback, made.feedback.asks = "simulated", "verdict"
    strict = config(**{"rollout.feedback": "simulated", "feedback.asks": "verdict"})
    strict.spear.strict_format = True
    with pytest.raises(UserError, match="set --config.spear.strict_format=False"):
        sj.Run(strict, tmp_path / "strict", quiet=True)
    with pytest.raises(UserError, match="'grpo' grades by the gold answer.*spear, feedback_sft"):
        sj.Run(made, tmp_path / "run", quiet=True)


# --- simulated people ---


def simulated(**rates):
    return get_feedback("simulated", TASK, 3, FeedbackSettings(**rates))


def many(answer):
    """Right or wrong answers to 400 questions."""
    return [
        Request(x, f" {x.labels[x.gold if answer else x.gold - 1]}", 1, f"{i}")
        for i, x in enumerate(EXAMPLES)
    ]


def test_people_who_always_answer_and_never_err_say_what_the_oracle_says():
    wrong = many(False)
    assert simulated()(wrong) == get_feedback("oracle", TASK, 3)(wrong)
    judge = simulated(asks="verdict")
    assert not any(judge.judge(wrong))
    assert all(simulated(asks="verdict").judge(many(True)))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_rates_of_replies_errors_and_hints_are_met(rate):
    """Within 4 standard errors of a binomial of 400."""
    margin = 4 * (rate * (1 - rate) / len(EXAMPLES)) ** 0.5
    replied = [x is not None for x in simulated(asks="verdict", reply_rate=rate).judge(many(True))]
    assert abs(np.mean(replied) - rate) < margin
    for answer in (True, False):
        verdicts = simulated(asks="verdict", error_rate=rate).judge(many(answer))
        assert abs(np.mean([x != answer for x in verdicts]) - rate) < margin
    hinted = [text is not None for text in simulated(hint_rate=rate)(many(False))]
    assert abs(np.mean(hinted) - rate) < margin
    # an exponential time of mean 1 ends before d with probability 1 - exp(-d)
    late = simulated(delay=1.0, deadline=float(-np.log(1 - rate)))(many(False))
    assert abs(np.mean([x is not NOBODY for x in late]) - rate) < margin


def test_draws_depend_on_the_request_and_not_on_its_company():
    some = many(False)
    whole = dict(zip([x.id for x in some], simulated(reply_rate=0.5)(some), strict=True))
    for request in some[::-40]:
        assert simulated(reply_rate=0.5)([request]) == [whole[request.id]]


class OneByOne(Simulated):
    """Hands the last request over alone, as people do who answer one after another."""

    def next_of(self, requests):
        return requests[-1:]


@pytest.mark.parametrize("asks", ["hint", "verdict"])
def test_a_trace_does_not_depend_on_who_is_revised_with_it(asks, tmp_path):
    held = {}
    for kind in (Simulated, OneByOne):
        rates = {"reply_rate": 0.8, "error_rate": 0.2}
        voice = kind(TASK, 3, FeedbackSettings(asks=asks, **rates))
        made = config(rounds=1, **{"feedback.asks": asks, "rollout.num_revisions": 2})
        run = sj.Run(made, tmp_path / kind.__name__, quiet=True, feedback=voice)
        (round,) = run
        held[kind] = [
            (
                x.client,
                x.example.id,
                x.answered,
                [(y.text, y.correct, y.feedback) for y in x.attempts],
            )
            for x in (record.trace for record in round.traces)
        ]
    assert held[Simulated] == held[OneByOne]
    most = max(len(attempts) for *_, attempts in held[Simulated])
    assert most == {"hint": 2, "verdict": 3}[asks]


def test_traces_that_nobody_answered_are_no_clients_rows():
    from spear_jax.algorithms.feedback_rollout import FeedbackRollout

    attempt = Attempt([1], [2], [0.0], "A", False, "")
    traces = [Trace(0, EXAMPLES[0], [attempt]), Trace(0, EXAMPLES[1], [attempt], answered=False)]
    assert FeedbackRollout(traces, [(0, 0, 0), (0, 1, 0)], {}).of(0) == [0]
