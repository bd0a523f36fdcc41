"""GPU figures in one JSON, table and plot; and a run against the committed baseline of the same card.

    python -m benchmarks.compare merge OUT.json PART.json...     also OUT.md and OUT.png
    python -m benchmarks.compare check OUT.json [--baselines benchmarks/results/gpu]
    python -m benchmarks.compare keep OUT.json [--baselines benchmarks/results/gpu]

`check` compares our times, cell by cell. A cell is slower only beyond the noise band: 5% and the spread of both runs'
rounds, whichever is more, and beyond 3 us. Exit status: 0 nothing slower; 1 slower; 2 unreadable; 3 nothing was
compared, since there is no baseline of this card. `keep` makes a run the baseline of its card, to be committed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent
BASELINES = ROOT / "results" / "gpu"
OURS = "clinfast"
NOISE, LEAST_MILLISECONDS = 0.05, 0.003
KINDS = ("synchronous", "throughput")
SLOWER, UNREADABLE, NO_BASELINE = 1, 2, 3


def card_folder(card: str) -> str:
    return card.replace(" ", "-").lower()


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The cells of pytest-benchmark's files, under model/cell.

    Raises:
        ValueError: nothing in them, or the parts are of different cards.
    """
    found: dict[str, Any] = {"cells": {}, "machine": {}}
    for part in parts:
        for entry in part["benchmarks"]:
            facts = dict(entry["extra_info"])
            if "cell" not in facts:
                continue
            found["cells"][f"{facts.pop('model')}/{facts.pop('cell')}"] = facts
        found["machine"] = {key: part.get(key) for key in ("machine_info", "commit_info", "datetime")}
    cards = {facts["card"] for facts in found["cells"].values()}
    if len(cards) != 1:
        raise ValueError(f"the parts hold figures of {len(cards)} cards ({', '.join(sorted(cards))}); one is needed")
    return {"card": cards.pop(), **found}


def best_peer(times: dict[str, dict[str, float]], kind: str) -> tuple[str, float]:
    peers = {label: t[kind] for label, t in times.items() if not label.startswith(OURS)}
    label = min(peers, key=peers.__getitem__)
    return label, peers[label]


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['card']}. Milliseconds of one call and a wait, and of a call among many; the best peer's over ours.",
        "",
        "| | one call | ratio | among many | ratio | notes/s | of matmul peak | fp8 among many |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, facts in results["cells"].items():
        times = facts["milliseconds"]
        row = [name]
        for kind in KINDS:
            peer, best = best_peer(times, kind)
            row += [f"{times[OURS][kind]:.3f}", f"{best / times[OURS][kind]:.2f} ({peer})"]
        row += [f"{len(facts['lengths']) / times[OURS]['throughput'] * 1e3:,.0f}", f"{facts['utilisation']:.0%}"]
        fp8 = times.get(f"{OURS} fp8")
        lines.append("| " + " | ".join([*row, f"{fp8['throughput']:.3f}" if fp8 else "-"]) + " |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(results["cells"])
    figure, axes = pyplot.subplots(figsize=(10, 0.35 * len(names) + 1.5))
    for offset, kind in ((-0.2, KINDS[0]), (0.2, KINDS[1])):
        ratios = [
            best_peer(facts["milliseconds"], kind)[1] / facts["milliseconds"][OURS][kind]
            for facts in results["cells"].values()
        ]
        axes.barh([i + offset for i in range(len(names))], ratios, 0.38, label=kind)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"times as fast as the best peer, {results['card']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def slower(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """One sentence for each cell that is slower than the baseline beyond the noise band, or is gone."""
    found = []
    for name, then in before["cells"].items():
        facts = now["cells"].get(name)
        if facts is None:
            found.append(f"{name}: in the baseline, and not measured")
            continue
        for label, old in then["milliseconds"].items():
            if not label.startswith(OURS):
                continue
            new = facts["milliseconds"].get(label)
            if new is None:
                why = facts.get("missing", {}).get(label, "not measured")
                found.append(f"{name}, {label}: in the baseline, and now {why}")
                continue
            band = max(NOISE, *(run.get("spread", {}).get(label, 0.0) for run in (facts, then)))
            for kind in KINDS:
                beyond = new[kind] - old[kind]
                if beyond > band * old[kind] and beyond > LEAST_MILLISECONDS:
                    found.append(
                        f"{name}, {label}, {kind}: {new[kind]:.3f} ms against {old[kind]:.3f}, "
                        f"{beyond / old[kind]:+.1%}; the noise band is {band:.1%}"
                    )
    return found


def baseline_of(results: dict[str, Any], baselines: Path) -> Path:
    return baselines / card_folder(results["card"]) / "baseline.json"


def check(path: Path, baselines: Path) -> int:
    now = json.loads(path.read_text())
    baseline = baseline_of(now, baselines)
    if not baseline.exists():
        others = sorted(file.parent.name for file in baselines.glob("*/baseline.json"))
        print(
            f"NOT COMPARED: there is no baseline of {now['card']} ({baseline}); there are those of "
            f"{', '.join(others) or 'no card'}. To make this run the baseline: python -m benchmarks.compare keep {path}"
        )
        return NO_BASELINE
    found = slower(now, json.loads(baseline.read_text()))
    print("\n".join(found) or f"nothing is slower than the baseline of {now['card']}")
    return SLOWER if found else 0


def keep(path: Path, baselines: Path) -> int:
    now = json.loads(path.read_text())
    baseline = baseline_of(now, baselines)
    if not now["cells"]:
        raise ValueError("it has no cell")
    baseline.parent.mkdir(parents=True, exist_ok=True)
    baseline.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{baseline}: {len(now['cells'])} cells of {now['card']}; commit it")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    merging = actions.add_parser("merge")
    merging.add_argument("out", type=Path)
    merging.add_argument("parts", type=Path, nargs="+")
    for action in ("check", "keep"):
        one = actions.add_parser(action)
        one.add_argument("out", type=Path)
        one.add_argument("--baselines", type=Path, default=BASELINES)
    options = parser.parse_args(arguments)
    try:
        if options.action == "check":
            return check(options.out, options.baselines)
        if options.action == "keep":
            return keep(options.out, options.baselines)
        results = merge([json.loads(part.read_text()) for part in options.parts])
        options.out.write_text(json.dumps(results, indent=1) + "\n")
        text = table(results)
        options.out.with_suffix(".md").write_text(text)
        plot(results, options.out.with_suffix(".png"))
        print(text)
    except (OSError, ValueError, KeyError) as error:
        print(f"{options.out}: {type(error).__name__}: {error}", file=sys.stderr)
        return UNREADABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
