"""Bars of speed relative to stock transformers, measured in the same alternating rounds."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from clinfast.bench.contenders import LABELS
from clinfast.bench.race import BASE, OURS

COLOURS = {
    "stock": "#d5dae1",
    "torch_compile": "#bcc5d1",
    "onnxruntime": "#a0aebf",
    "onnxruntime_int8": "#93a3b6",
    "openvino": "#8496ac",
    "ctranslate2": "#687e98",
    "ctranslate2_int8": "#566b85",
    "clinfast": "#e4572e",
}
INK, SOFT, GRID = "#1f2933", "#616e7c", "#e7ebf0"
GROUP_WIDTH = 0.86
TIMES = "\N{MULTIPLICATION SIGN}"


def draw(cells: list[dict[str, Any]], environment: dict[str, Any], model: str, precision: str) -> Figure:
    """One group of bars a cell.

    Args:
        cells: entries of a result file, of one model and precision.
        environment: where they were measured.
        model: its name in the title.
    """
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})
    figure, axes = plt.subplots(figsize=(9.0, 5.1))
    figure.subplots_adjust(left=0.058, right=0.988, top=0.79, bottom=0.275)
    names = [name for name in COLOURS if any(speed(cell, name) is not None for cell in cells)]
    top = max(value for cell in cells for name in names if (value := speed(cell, name)) is not None)
    for place, name in enumerate(names):
        bars(axes, cells, name, place, len(names), top)
    axes.set_xticks(range(len(cells)), [])
    for place, cell in enumerate(cells):
        for line, (text, style) in enumerate(label(cell)):
            axes.annotate(
                text, (place, 0), (0, -9 - 14 * line), "data", "offset points", ha="center", va="top", **style
            )
    axes.set_xlim(-0.5, len(cells) - 0.5)
    axes.set_ylim(0, top * 1.1)
    axes.yaxis.set_major_locator(MultipleLocator(1 if top <= 8 else 2) if top <= 16 else MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.tick_params(length=0, pad=6, colors=SOFT)
    axes.grid(axis="y", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#9aa5b1")
    title = f"{model} on a CPU, {precision}: speed relative to stock transformers"
    figure.text(0.018, 0.945, title, fontsize=min(14.5, 14.5 * 76 / len(title)), fontweight="bold", va="center")
    subtitle = "Higher is better. Under each group: time of a batch, stock → clinfast."
    figure.text(0.018, 0.898, subtitle, fontsize=10, color=SOFT, va="center")
    legend = figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.010, 0.878),
        ncols=len(names),
        frameon=False,
        fontsize=9.2,
        handlelength=0.95,
        handleheight=0.95,
        handletextpad=0.45,
        columnspacing=1.4,
    )
    for entry in legend.get_texts():
        if entry.get_text() == LABELS[OURS]:
            entry.set_fontweight("bold")
    figure.text(0.018, 0.025, small_print(cells, environment), fontsize=7.6, color=SOFT, linespacing=1.5)
    return figure


def bars(axes: Axes, cells: list[dict[str, Any]], name: str, place: int, count: int, top: float) -> None:
    """One contender's bar in every group, with its figure above."""
    width = GROUP_WIDTH / count
    ours = name == OURS
    legend: str | None = LABELS[name]
    for group, cell in enumerate(cells):
        value = speed(cell, name)
        x = group - GROUP_WIDTH / 2 + (place + 0.5) * width
        if value is None:
            axes.text(x, top * 0.012, "n/a", ha="center", va="bottom", fontsize=6.5, color=SOFT, rotation=90)
            continue
        axes.bar(x, value, width * 0.9, color=COLOURS[name], label=legend, zorder=3)
        legend = None
        figure = f"{value:.1f}{TIMES}" if ours else f"{value:.1f}"
        axes.text(
            x + (0.12 * width if ours else 0),
            value + top * (0.02 if ours else 0.012),
            figure,
            ha="center",
            va="bottom",
            fontsize=10.5 if ours else 8,
            fontweight="bold" if ours else "normal",
            color=COLOURS[OURS] if ours else SOFT,
            zorder=4,
        )


def speed(cell: dict[str, Any], name: str) -> float | None:
    """Stock's time over the contender's: the inverse of the recorded median ratio."""
    ratio = cell["contenders"].get(name, {}).get("over_stock")
    return 1 / ratio["median"] if ratio else None


def label(cell: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The lines under a group with their styles: the batch, its lengths, the times."""
    size, longest = cell["batch_size"], cell["padded_length"]
    notes = "1 note" if size == 1 else f"{size} notes"
    if cell["tokens_real"] == cell["tokens_padded"]:
        lengths = f"{longest} tokens" if size == 1 else f"{longest} tokens each"
    else:
        padding = 1 - cell["tokens_real"] / cell["tokens_padded"]
        lengths = f"up to {longest}, {padding:.0%} padding"
    lines = [
        (notes, {"color": INK, "fontsize": 10.5, "fontweight": "bold"}),
        (lengths, {"color": INK, "fontsize": 9.5}),
    ]
    stock, ours = (cell["contenders"].get(name, {}).get("median_ms") for name in (BASE, OURS))
    if stock and ours:
        lines.append((f"{milliseconds(stock)} → {milliseconds(ours)} ms", {"color": SOFT, "fontsize": 9}))
    return lines


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def small_print(cells: list[dict[str, Any]], environment: dict[str, Any]) -> str:
    processor = environment["processor"]
    generation = f" ({processor['microarchitecture']})" if processor["microarchitecture"] else ""
    isa = ", ".join(flag for flag in processor["isa"] if flag.startswith(("avx512", "amx", "sve", "avx2")))
    versions = environment["versions"]
    last = cells[-1]["contenders"]
    ours = last.get(OURS, {}).get("version")
    commit = f" ({environment['commit'][:7]})" if environment["commit"] else ""
    peers = ", ".join(
        f"{title} {versions[name].removesuffix('+cpu')}"
        for name, title in (
            ("torch", "torch"),
            ("transformers", "transformers"),
            ("onnxruntime", "ONNX Runtime"),
            ("openvino", "OpenVINO"),
            ("ctranslate2", "CTranslate2"),
        )
        if versions.get(name, "absent") != "absent"
    )
    threads = f"{environment['threads']} thread{'' if environment['threads'] == 1 else 's'}"
    first = f"{processor['name']}{generation}, {threads} for everybody, {isa}"
    second = f"clinfast {ours}{commit}, {peers}" if ours else peers
    return (
        f"{first}\n{second}\nEach in its own process, alternating rounds, the others stopped; "
        "median of the ratios round by round. Output checked against fp64 before timing."
    )
