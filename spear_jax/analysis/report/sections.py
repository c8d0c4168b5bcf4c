"""The sections of a report, each from the runs alone.

A sentence names what a run did not record.
"""

import json
import math
import pathlib
from typing import Any

import pandas as pd

from spear_jax.analysis.report import figures, runs, traces
from spear_jax.analysis.report.page import (
    Picture,
    Section,
    Table,
    file_name,
    number,
    seconds,
    texts,
    words,
)
from spear_jax.analysis.report.runs import Run

MOST_CLIENTS = 60  # rows of a heat map
MOST_HEAT_MAPS = 16
MOST_SPLITS = 6
BAND_MANY = "Mean over seeds, as far as all reach; band: 95 % Student t interval, cut where it leaves the axes."
METER = "round/aggregation_error"
EPSILON = "privacy/epsilon"
# metric -> (title, y axis, what the figure shows, what one run's band is)
PANELS = {
    "eval/accuracy": ("Held-out accuracy", "accuracy", "Accuracy on the test questions", "95 % score interval"),
    "rollout/wins": ("Wins", "wins a round", "Completions that the clients of a round train on "
                                             "as right ones", ""),
    "rollout/loses": (
        "Loses", "loses a round", "Completions that the clients of a round train against", "",
    ),
    "rollout/first_accuracy": (
        "First answers right", "fraction", "Of the first answers to training questions, the "
                                           "fraction that is right",
        "95 % score interval, from the recorded answers",
    ),
    "rollout/fixed": (
        "Fixed", "fraction", "Of the wrong first answers, the fraction whose last revision is "
                             "right",
        "95 % score interval, from the recorded answers",
    ),
    "train/loss": ("Loss", "loss (the method's own)", "The local objective, the mean over a "
                                                      "round's optimiser steps", ""),
    "train/win_nll": ("Likelihood of wins", "nats per token", "Negative log-likelihood of win "
                                                              "tokens", ""),
    "train/unlikelihood": ("Unlikelihood of loses", "nats per token", "Unlikelihood of lose tokens", ""),
    "total/mb_up": ("Bytes up", "MB, from the start", "Adapters that clients sent to the server, "
                                                      "in all so far", ""),
    "total/mb_down": ("Bytes down", "MB, from the start", "Adapters that the server sent to "
                                                          "clients, in all so far", ""),
    METER: ("Lost by averaging factors", "fraction of the update", "The part of the clients' mean "
            "update that the mean of their factors is not", ""),
    EPSILON: ("Epsilon", "epsilon", "What the adapters so far reveal of one client, at the run's "
                                    "delta", ""),
}  # fmt: skip
FEEDBACK = ("rollout/wins", "rollout/loses", "rollout/first_accuracy", "rollout/fixed")
LOSSES = ("train/loss", "train/win_nll", "train/unlikelihood")
BYTES = ("total/mb_up", "total/mb_down")


class SectionWriter:
    """Writer of a report's sections, and of their figures into a folder.

    Args:
        evaluated: all runs of the report.
        begun: names of those without an evaluated round.
        out: the folder of the figures.
    """

    def __init__(self, evaluated: list[Run], begun: list[str], out: pathlib.Path):
        self.runs, self.begun, self.out = evaluated, begun, out
        self.groups = runs.by_label(evaluated)
        self.look = figures.styles(self.groups)
        self.results = runs.results(evaluated)
        self.files: list[str] = []

    def all(self, default: dict[str, Any]) -> list[Section]:
        """Returns every section, in the page's order.

        Args: default: the flat default config.
        """
        return [
            self.outcome(),
            self.overview(),
            self.lines("feedback", "Answers and feedback", FEEDBACK),
            self.lines("losses", "Losses", LOSSES),
            self.lines("bytes", "Communication", BYTES),
            *self.aggregation(),
            *self.privacy(),
            self.time(),
            self.clients(),
            self.split(),
            self.examples(),
            self.differing(default),
        ]

    def draw(self, figure: Any, name: str) -> bytes:
        """Saves a figure as NAME.png and NAME.svg; returns the SVG."""
        self.files += [f"{name}.png", f"{name}.svg"]
        return figures.save(figure, self.out / name)

    def overview(self) -> Section:
        """Returns the section of the runs: versions and wall time."""
        rows = []
        for label in dict.fromkeys(run.label for run in self.runs):
            group = [run for run in self.runs if run.label == label]
            config = runs.label_configs(group).get(label, {})
            get = lambda name, config=config: config.get(name, "-")
            cohort = f"{get('federation.clients_per_round')} of {get('federation.num_clients')}"
            state = f"{sum(run.finished for run in group)} of {len(group)} finished"
            went = " to ".join(
                map(
                    str,
                    sorted({min(run.rounds for run in group), max(run.rounds for run in group)}),
                )
            )
            named = [get("algorithm.name"), get("task"), get("model"), get("seed")]
            wall = seconds(sum(run.table["time"].max() - run.table["time"].min() for run in group))
            rounds = f"{went} of at most {get('rounds')}"
            rows.append([label, *named, cohort, get("federation.aggregation"), rounds, wall, state])
        headings = (
            "label|method|task|model|seed|clients a round|aggregation|rounds|wall time|runs".split(
                "|"
            )
        )
        versions = sorted(
            {
                ", ".join(f"{name} {version}" for name, version in run.versions.items())
                for run in self.runs
            }
        )
        notes = [f"Versions: {text}." for text in versions if text] or [
            "Versions were not recorded by these runs."
        ]
        notes.append(
            "Wall time: from the first to the last line of metrics.jsonl, interruptions "
            "included; of all runs of a row together."
        )
        if self.begun:
            notes.append(
                f"Left out, because nothing has been evaluated yet: {', '.join(self.begun)}."
            )
        return Section("runs", "What was run", notes, [Table("Runs", headings, rows, words=True)])

    def outcome(self) -> Section:
        """Returns the section of results: a table and the accuracies.

        Accuracy is drawn against the round, against generated tokens, and at the end.
        """
        shown = self.shown_results()
        notes = [
            "Training: seconds of rollout, local training and aggregation, without evaluation "
            "and checkpoints."
        ]
        if self.seeds():
            notes.append(
                "Means over the finished runs of a label (over all where none has finished); "
                "intervals of the mean are "
                "Student's over seeds, of a single run the score interval over the test questions."
            )
        else:
            notes.append("Intervals are score intervals over the test questions.")
        caption = "Accuracy on the held-out questions, and what it took; totals of a run"
        pictures, missing = self.panels(["eval/accuracy"])
        if len(self.groups) > 1:
            caption = "Against the tokens that clients have generated; dotted: generates nothing."
            pictures += self.against(
                "budget/tokens", "generated tokens", caption, "accuracy_tokens"
            )
            pictures.append(self.final())
        caption = "Against the seconds of the simulated clock."
        pictures += self.against("sim/clock", "simulated seconds", caption, "accuracy_clock")
        caption = "Against what the adapters reveal of one client."
        pictures += self.against(EPSILON, "epsilon", caption, "accuracy_epsilon")
        return Section("results", "Results", notes + missing, [texts(caption, shown)], pictures)

    def shown_results(self) -> pd.DataFrame:
        """Returns the table of results as text for readers."""
        table = self.results
        shown = {
            "run" if not self.seeds() else "label": table["label"],
            "finished": [f"{row.finished} of {row.runs}" for row in table.itertuples()],
            "gold text": ["-" if pd.isna(gold) else gold or "none" for gold in table["gold"]],
            "accuracy before": number(table["before"], "{:.3f}"),
            "after": number(table["after"], "{:.3f}"),
            "95 % interval": [
                "-" if math.isnan(row.low) else f"{row.low:.3f} to {row.high:.3f}"
                for row in table.itertuples()
            ],
            "best": number(table["best"], "{:.3f}"),
            "rounds": number(table["rounds"], "{:.4g}"),
            "generated tokens": number(table["tokens"], "{:,.0f}"),
            "wins": number(table["wins"], "{:,.0f}"),
            "loses": number(table["loses"], "{:,.0f}"),
            "training,\u00a0s": number(table["seconds"], "{:.1f}"),
            "MB\u00a0up": number(table["mb_up"], "{:.1f}"),
            "MB\u00a0down": number(table["mb_down"], "{:.1f}"),
        }
        if table["gold"].isna().all():
            del shown["gold text"]
        return pd.DataFrame(shown)

    def final(self) -> Picture:
        """Returns the figure of the last accuracies, one a label."""
        alt = "Last accuracy and its 95 % interval: " + "; ".join(
            f"{row.label} {row.after:.3f} ({row.low:.3f} to {row.high:.3f})"
            for row in self.results.itertuples()
        )
        image = self.draw(figures.draw_final(self.results, self.look), "final")
        return Picture("Accuracy after training", "Fraction of the held-out questions.", alt, image)

    def seeds(self) -> bool:
        """Returns whether some label has several runs."""
        return any(len(group) > 1 for group in self.groups.values())

    def panels(self, metrics: list[str]) -> tuple[list[Picture], list[str]]:
        """Returns a figure against the round for each metric that some label has.

        Sentences name the labels that lack a metric.
        """
        pictures, missing = [], []
        for metric in metrics:
            title, unit, meaning, band = PANELS[metric]
            lines = [
                line
                for label, group in self.groups.items()
                if (line := figures.curve(label, group, metric)) is not None
            ]
            absent = [label for label in self.groups if label not in {line.label for line in lines}]
            if absent:
                missing.append(
                    f"{title}: nothing was recorded, or only zeros, by {', '.join(absent)}."
                )
            if not lines:
                continue
            alone = [line for line in lines if len(self.groups[line.label]) == 1]
            single = (
                f"band: {band}" if any(line.low is not None for line in alone) else "no interval"
            )
            bands = ([BAND_MANY] if len(alone) < len(lines) else []) + (
                [f"One run: {single}."] if alone else []
            )
            alt = f"{meaning} against the round. Last values: " + "; ".join(
                f"{line.label} {line.y[-1]:.4g} in round {line.x[-1]:g}" for line in lines
            )
            fraction = unit in ("accuracy", "fraction")
            image = self.draw(
                figures.draw_lines(lines, self.look, "round", unit, fraction), metric.split("/")[1]
            )
            pictures.append(
                Picture(title, " ".join([f"{meaning}, against the round.", *bands]), alt, image)
            )
        return pictures, missing

    def against(self, column: str, unit: str, caption: str, name: str) -> list[Picture]:
        """Returns held-out accuracy against what a round has used, where the runs have counted it.

        Args: column: of the running total; unit: what it counts; name: of the figure's files.
        """
        curves = [
            figures.curve(label, group, "eval/accuracy", column)
            for label, group in self.groups.items()
            if any(column in run.table for run in group)
        ]
        lines = [line for line in curves if line is not None]
        if not any(line.x.any() for line in lines):
            return []
        figure = figures.draw_lines(lines, self.look, unit, "accuracy", fraction=True)
        alt = f"Held-out accuracy against {unit}. Last values: " + "; ".join(
            f"{line.label} {line.y[-1]:.4g} at {line.x[-1]:,.0f}" for line in lines
        )
        return [
            Picture(f"Accuracy and {unit}", f"{caption} Bands as against the round.", alt,
                    self.draw(figure, name))
        ]  # fmt: skip

    def lines(self, name: str, title: str, metrics: tuple[str, ...]) -> Section:
        """Returns a section of one figure a metric."""
        pictures, missing = self.panels(list(metrics))
        return Section(name, title, missing, pictures=pictures)

    def aggregation(self) -> list[Section]:
        """Returns the section of the exactness meter: by round, and of each projection; none where
        no run has measured it.
        """
        measured = [run for run in self.runs if METER in run.table]
        if not measured:
            return []
        names = sorted({name for run in measured for name in run.table if METER in name})
        rows = [[run.name, *(_last(run.table, name) for name in names)] for run in measured]
        shown = ["all" if name == METER else name.removeprefix(f"{METER}_") for name in names]
        notes = [
            "0: the mean of the factors is the mean of the products. What a base change or a "
            "correction takes up is not subtracted."
        ]
        table = Table("Lost in the last round, by projection", ["run", *shown], rows)
        pictures, missing = self.panels([METER])
        return [Section("aggregation", "Aggregation", notes + missing, [table], pictures)]

    def privacy(self) -> list[Section]:
        """Returns the section of differential privacy; none where no run has noise."""
        noisy = [run for run in self.runs if EPSILON in run.table]
        if not noisy:
            return []
        names = ("epsilon", "delta", "clip", "snr")
        rows = [[run.name, *(_last(run.table, f"privacy/{x}") for x in names)] for run in noisy]
        headings = ["run", "epsilon", "delta", "clip norm", "signal to noise"]
        notes = [
            "Epsilon covers the adapters. It does not cover recorded traces, counts of wins and "
            "other metrics, and what stays with single clients."
        ]
        table = Table("After the last round", headings, rows)
        pictures, missing = self.panels([EPSILON])
        return [Section("privacy", "Privacy", notes + missing, [table], pictures)]

    def time(self) -> Section:
        """Returns the section of seconds by phase: of each round for a single run, else of runs."""
        table = figures.phase_seconds(self.groups)
        if not table["total"].any():
            return Section("time", "Time by phase", ["No run recorded its times."])
        shown = pd.DataFrame(
            {"label": table["label"]}
            | {f"{phase}, s": number(table[phase], "{:.1f}") for phase in runs.PHASES}
            | {
                "all, s": number(table["total"], "{:.1f}"),
                "± 95 %": number(table["half_width"], "{:.1f}"),
            }
        )
        if not self.seeds():
            del shown["± 95 %"]
        seconds_table = texts("Seconds of a run by phase, the mean over its label's runs", shown)
        parts = "; ".join(f"{row.label} {row.total:.1f} s" for row in table.itertuples())
        alone = len(self.runs) == 1
        figure = figures.draw_round_time(self.runs[0]) if alone else figures.draw_run_time(table)
        caption = (
            "Seconds of each round, by phase." if alone else "Seconds of a whole run, by phase."
        )
        caption += (
            " Black: 95 % t interval of the sum, cut at 0 and at the axis." if self.seeds() else ""
        )
        picture = Picture(
            "Time by phase, stacked",
            caption,
            f"{caption} In all: {parts}",
            self.draw(figure, "time"),
        )
        notes = ["The first rounds contain the compilation of their programs."]
        return Section("time", "Time by phase", notes, [seconds_table], [picture])

    def clients(self) -> Section:
        """Returns a heat map of rounds and clients for each label."""
        traced = self.traced()
        graded = {label: run for label, run in traced.items() if run.graded}
        pictures = [self.heat(label, run) for label, run in list(graded.items())[:MOST_HEAT_MAPS]]
        notes = self.untraced()
        if len(graded) < len(traced):
            notes.append(
                f"Nothing grades the answers of {', '.join(sorted(traced.keys() - graded.keys()))}."
            )
        if len(graded) > MOST_HEAT_MAPS:
            notes.append(
                f"The first {MOST_HEAT_MAPS} of {len(graded)} labels; clients.csv has all."
            )
        return Section("clients", "Clients", notes, pictures=pictures)

    def traced(self) -> dict[str, Run]:
        """Returns of each label the first run with recorded traces."""
        first: dict[str, Run] = {}
        for label, group in self.groups.items():
            for run in group:
                if len(traces.client_counts(run)):
                    first.setdefault(label, run)
        return first

    def untraced(self) -> list[str]:
        """Returns a sentence about the labels without traces, if there are any."""
        names = ", ".join(label for label in self.groups if label not in self.traced())
        why = "config.record_traces is False, or the method asks its model nothing"
        return [f"No traces were recorded by {names} ({why})."] if names else []

    def heat(self, label: str, run: Run) -> Picture:
        """Returns the heat map of a run, under its label."""
        counts = traces.client_counts(run)
        clients, rounds, values, left = traces.client_grid(counts, MOST_CLIENTS)
        image = self.draw(figures.draw_heat(clients, rounds, values), f"clients_{file_name(label)}")
        caption = "Fraction of a client's first answers that were right, by round, from the traces"
        caption += f" of {run.name}." if run.name != label else "."
        if pd.isna(values).any():
            caption += " White: the client had no recorded answers."
        if left:
            caption += f" The {len(clients)} clients with the most answers; {left:,} more are in clients.csv."
        means = counts.groupby("round")[["first_right", "answers"]].sum()
        first, last = (means["first_right"] / means["answers"]).iloc[[0, -1]]
        alt = (
            f"Heat map of {len(clients)} clients and {len(rounds)} rounds of {run.name}: over "
            f"all clients {first:.3f} of the "
            f"first answers were right in round {means.index[0]} and {last:.3f} in round "
            f"{means.index[-1]}"
        )
        return Picture(f"First answers right by client: {label}", caption, alt, image)

    def split(self) -> Section:
        """Returns the sizes of clients, once for each different split."""
        splits: dict[str, list[Run]] = {}
        for run in self.runs:
            file = run.folder / "split.json"
            if file.is_file():
                splits.setdefault(file.read_text(encoding="utf-8"), []).append(run)
        if not splits:
            return Section("split", "Data split", ["No run folder holds a split.json."])
        named, rows, pictures = {}, [], []
        for text, group in splits.items():
            sizes = [len(part) for part in json.loads(text)["clients"]]
            name = (
                f"seed {group[0].config['seed']}"
                if self.seeds() and group[0].config
                else group[0].name
            )
            name = name if name not in named else group[0].name
            named[name] = sizes
            middle = f"{pd.Series(sizes).median():g}"
            shape = [len(sizes), sum(sizes), min(sizes), middle, max(sizes)]
            rows.append([name, *map(str, shape), ", ".join(run.name for run in group)])
            source = group[0].folder / "split.png"
            if source.is_file() and len(sizes) <= MOST_CLIENTS and len(pictures) < MOST_SPLITS:
                pictures.append(self.by_label(name, group[0], source))
        headings = ["split", "clients", "examples", "fewest", "median", "most", "runs"]
        shown = dict(list(named.items())[:MOST_SPLITS])
        alt = "Examples of each client by size. " + "; ".join(
            f"{name}: {len(sizes)} clients with {min(sizes)} to {max(sizes)}"
            for name, sizes in shown.items()
        )
        image = self.draw(figures.draw_split(shown), "split")
        pictures.insert(
            0, Picture("Sizes", "Training examples of each client, the largest first.", alt, image)
        )
        notes = (
            [f"Figures of the first {MOST_SPLITS} of {len(named)} splits."]
            if len(named) > MOST_SPLITS
            else []
        )
        table = Table(
            "Training examples a client; runs with the same split share a row",
            headings,
            rows,
            words=True,
        )
        return Section("split", "Data split", notes, [table], pictures)

    def by_label(self, name: str, run: Run, source: pathlib.Path) -> Picture:
        """Copies the run folder's own figure of its split."""
        target = f"{file_name(run.name)}_split.png"
        (self.out / target).write_bytes(source.read_bytes())
        self.files.append(target)
        alt = (
            f"Bars of the training examples of each client, stacked by gold answer, of split {name}"
        )
        caption = "Training examples of each client, by gold answer."
        return Picture(f"By gold answer: {name}", caption, alt, source.read_bytes(), "png")

    def examples(self) -> Section:
        """Returns a few traces of each label."""
        each = 2 if len(self.groups) == 1 else 1
        chosen = {label: traces.sample(run, each) for label, run in self.traced().items()}
        note = f"Up to {each} of each kind, from the last round and the first; chosen by order, not by content."
        return Section(
            "traces", "Sample traces", [note] * bool(chosen) + self.untraced(), samples=chosen
        )

    def differing(self, default: dict[str, Any]) -> Section:
        """Returns the fields in which the labels' configs differ, and those that all of them set."""
        between, common = runs.differences(self.runs, default)
        notes, tables = [], []
        if len(runs.label_configs(self.runs)) < 2:
            notes.append("Only one config is here: there is nothing to compare.")
        elif not len(between):
            notes.append("All runs have the same config.")
        else:
            caption = "The fields that differ; several values of a label are those of its seeds"
            tables.append(words(caption, between))
        if len(common):
            tables.append(words("Settings of all runs that are not the defaults", common))
        return Section("config", "Configs", notes, tables)


def _last(table: pd.DataFrame, name: str) -> str:
    """The last number of a column as text; "-" where it has none."""
    values = table[name].dropna() if name in table else []
    return f"{values.iloc[-1]:.2e}" if len(values) else "-"
