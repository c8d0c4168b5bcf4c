"""The result of a benchmark: its entries, a table, the JSON file, and the clients' figure."""

import json
import os
import pathlib
import statistics
from typing import Any

import pandas as pd

from spear_jax.analysis.comparison import to_markdown
from spear_jax.benchmark import floors
from spear_jax.benchmark.workload import Workload
from spear_jax.core.errors import UserError

GB = 1e9
Answers = list[dict[str, Any]]


def check_out(out: str) -> pathlib.Path:
    """Returns the JSON file to write; raises UserError for another ending.

    The files beside it could take that ending.
    """
    file = pathlib.Path(out)
    if file.suffix != ".json":
        raise UserError(
            f"--out is {out!r}; give a name that ends in .json, a table and a figure are written "
            f"beside it."
        )
    return file


def tell(
    phase: str, measured: dict[str, Answers], work: Workload, host: dict[str, Any]
) -> dict[str, Any]:
    """Returns one phase's entry in the result.

    Args: host: of `machine.measure`.
    """
    parts, tokens = floors.needs(work)[phase], floors.tokens(work).get(phase)
    floor = floors.seconds(parts, host["gemm"][work.preset.dtype], host["copy"])
    entry: dict[str, Any] = {
        "tokens": tokens,
        "flops": sum(part.flops for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "floor_seconds": floor,
    }
    for name, answers in measured.items():
        entry[name] = summarise(answers)
        median = entry[name]["seconds"]["median"]
        entry[name]["floor_share"] = floor / median
        if tokens:
            entry[name]["tokens_per_second"] = tokens / median
    if "rival" in measured:
        ours, rival = entry["ours"]["seconds"], entry["rival"]["seconds"]
        entry |= {
            "ratio": rival["median"] / ours["median"],
            "ratio_of_min": rival["min"] / ours["min"],
        }
    return entry


def summarise(answers: Answers) -> dict[str, Any]:
    """Summarises the answers of one side and phase.

    Returns: seconds of the repeats, memory of the first of them, and both of the first call apart.
    """
    first, *repeats = answers
    seconds = [answer["seconds"] for answer in repeats]
    return {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "all": seconds},
        "first_seconds": first["seconds"],
        **_compiled(answers),
        "first_peak_bytes": first["peak_bytes"],
        "peak_bytes": repeats[0]["peak_bytes"],
        "resting_bytes": repeats[0]["resting_bytes"],
        **{name: first[name] for name in ("loss", "padding") if name in first},
    }


def _compiled(answers: Answers) -> dict[str, float]:
    """Returns the compiled programs and seconds of the first call, and the programs of later ones.

    A side that does not compile has none.
    """
    if "compile/programs" not in answers[0]:
        return {}
    programs = [int(answer["compile/programs"]) for answer in answers]
    seconds = answers[0]["compile/seconds"]
    return {
        "compile_programs": programs[0],
        "compile_seconds": seconds,
        "compiled_later": sum(programs[1:]),
    }


def table(result: dict[str, Any]) -> pd.DataFrame:
    """Returns the result as text, one row a phase or a cohort size; "-" where there is no number."""
    if "cohorts" in result:
        return pd.DataFrame([_cohort_row(cohort) for cohort in result["cohorts"]])
    return pd.DataFrame([_phase_row(name, phase) for name, phase in result["phases"].items()])


def _phase_row(name: str, phase: dict[str, Any]) -> dict[str, str]:
    ours, rival = phase["ours"], phase.get("rival")
    row = {"phase": name, "ours s": _number(ours["seconds"]["median"])}
    if rival:
        row |= {"rival s": _number(rival["seconds"]["median"]), "ratio": f"{phase['ratio']:.2f}"}
    row |= {
        "floor s": _number(phase["floor_seconds"]),
        "of floor": f"{ours['floor_share']:.0%}",
        "tokens/s": f"{ours['tokens_per_second']:,.0f}" if "tokens_per_second" in ours else "-",
        "padding": f"{ours['padding']:.0%}" if "padding" in ours else "-",
        "first call s": _number(ours["first_seconds"]),
        "compiling s": _number(ours["compile_seconds"]),
        "peak GB": f"{ours['peak_bytes'] / GB:.2f}",
    }
    return row | ({"rival peak GB": f"{rival['peak_bytes'] / GB:.2f}"} if rival else {})


def _cohort_row(cohort: dict[str, Any]) -> dict[str, str]:
    return {
        "clients": str(cohort["clients"]),
        "seconds a client": _number(cohort["seconds_per_client"]),
        "seconds": _number(cohort["seconds"]["median"]),
        "first call s": _number(cohort["first_seconds"]),
        "peak GB": f"{cohort['peak_bytes'] / GB:.2f}",
        "padding": f"{cohort['padding']:.0%}",
    }


def _number(seconds: float) -> str:
    """Returns a number with three digits that count."""
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


def write(result: dict[str, Any], out: pathlib.Path) -> None:
    """Writes the JSON file, the table beside it, and the figure once all cohorts are measured.

    It names them in result["files"]. Each file is replaced whole, so that one from before is there
    until the new one is.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out, out.with_suffix(".md")]
    replace(files[1], to_markdown(table(result)))
    if "cohorts" in result and not result["left"]:
        files += [out.with_suffix(".png"), out.with_suffix(".svg")]
        plot_cohorts(result, files[2:])
    result["files"] = [file.name for file in files]
    replace(out, json.dumps(result, indent=1) + "\n")


def replace(file: pathlib.Path, text: str) -> None:
    """Replaces a file whole."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def plot_cohorts(result: dict[str, Any], files: list[pathlib.Path]) -> None:
    """Draws seconds a client, and peak memory, against the cohort size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cohorts = result["cohorts"]
    sizes = [cohort["clients"] for cohort in cohorts]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    shown = (
        ("seconds a client", [cohort["seconds_per_client"] for cohort in cohorts]),
        ("peak memory, GB", [cohort["peak_bytes"] / GB for cohort in cohorts]),
    )
    for axis, (label, values) in zip(axes, shown, strict=True):
        axis.plot(sizes, values, "o-", color="#2c5985")
        axis.set(
            xscale="log", xlabel="clients of the round", ylabel=label, ylim=(0, 1.15 * max(values))
        )
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    at_once = result["sizes"]["clients_at_once"] or result["sizes"]["clients"]
    figure.suptitle(
        f"local training and aggregation, {result['preset']}, clients at once: {at_once}"
    )
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
