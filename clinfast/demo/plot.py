"""What the demo draws."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from clinfast.cli.console import count
from clinfast.demo.measure import FAST, STOCK
from clinfast.demo.work import MAX_TOKENS


def draw(result: dict[str, Any], lengths: list[int], path: Path) -> None:
    """Bars before and after, and the lengths that make padding costly; sized for a README's column."""
    ink, quiet, strong = "#24292f", "#b6bec8", "#0a7d6c"
    style: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 10.5, "axes.titlelocation": "left", "axes.titlepad": 10}
    style |= dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    style |= dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            1, 3, figsize=(10.6, 4.0), width_ratios=(1, 1, 1.8), facecolor="white", layout="constrained"
        )
        for ax, key, title in (
            (axes[0], "notes_per_second", "Notes per second\n(more is better)"),
            (axes[1], "cpu_hours_per_million_notes", "CPU-hours per million notes\n(less is better)"),
        ):
            values = [result["sides"][side][key] for side in (STOCK, FAST)]
            bars = ax.bar(("before:\nstock", "after:\nclinfast"), values, color=(quiet, strong), width=0.62)
            ax.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, weight="bold")
            ax.set_title(title)
            ax.set_ylim(0, 1.14 * max(values))
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.tick_params(axis="x", length=0)
        ax = axes[2]
        longest = max(*lengths, MAX_TOKENS)
        ax.hist(lengths, bins=range(0, longest + 32, 32), color=strong, alpha=0.75, edgecolor="white")
        ax.axvline(MAX_TOKENS, color=ink, linewidth=1, linestyle="--")
        top = ax.get_ylim()[1]
        ax.annotate(f"cut at {MAX_TOKENS}", (MAX_TOKENS, top), (6, -4), textcoords="offset points", va="top")
        padding = 1 - result["real_share_of_padded_area"]
        words = (
            f"median {statistics.median(lengths):.0f} tokens, but a\n"
            f"batch of {result['batch_size']} is padded to\n"
            f"its longest note: {padding:.0%} of\nwhat stock computes\nis padding"
        )
        ax.text(0.98, 0.78, words, transform=ax.transAxes, ha="right", ma="left", va="top", linespacing=1.5)
        ax.set_title(f"Lengths of the {result['notes']} notes\n(tokens)")
        ax.set_ylabel("notes")
        ax.set_xlim(0, longest + 16)
        figure.suptitle(
            f"{result['model']}, fp32, {result['processor']}, {count(result['threads'], 'thread')}: "
            f"{result['speedup']:.1f} times the notes per second",
            x=0.01,
            ha="left",
            weight="bold",
            size=12,
        )
        engine: Any = figure.get_layout_engine()
        engine.set(w_pad=0.14, h_pad=0.08)
        figure.savefig(path, dpi=160)
        plt.close(figure)
