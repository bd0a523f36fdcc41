"""`clinfast info`: what this machine has, and which families and heads are served."""

from __future__ import annotations

import argparse
import importlib
import json
import re

from rich import box
from rich.markup import escape
from rich.table import Table

from clinfast import models
from clinfast.cli import console
from clinfast.engine import precision
from clinfast.report import Info

BASE = "base model"


def run(options: argparse.Namespace) -> int:
    found = console.machine()
    served = families()
    if options.json:
        facts = console.facts() | {"precisions": precision.served("cpu"), "families": served}
        print(json.dumps(facts, indent=1))
        return 0
    out = console.output()
    out.print(_machine(found))
    out.print(_families(served))
    out.print("[dim]Any other head: its encoder is optimized, the head runs stock.[/]\n")
    return 0


def families() -> dict[str, dict[str, str]]:
    """Of every family that has an adapter: head -> class name, as the adapters register them."""
    return {
        module.split(".")[2].replace("_", "-"): _heads(module.split(".")[2], adapter)
        for module, adapter in models.FAMILIES.items()
    }


def _heads(family: str, adapter: str) -> dict[str, str]:
    # An adapter that serves twins lists the classes of all of them.
    prefix = family.replace("_", "")
    classes = [name for name in importlib.import_module(adapter).CLASSES if name.lower().startswith(prefix)]
    suffixes = {name: name[len(prefix) :] for name in classes}
    # Another family's name may start with this one's: XLMRobertaXL.
    return {head_of(suffix): name for name, suffix in suffixes.items() if suffix == "Model" or suffix.startswith("For")}


def head_of(suffix: str) -> str:
    """"ForTokenClassification" -> "token classification"."""
    if suffix == "ForPreTraining":
        return "pretraining"
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", suffix.removeprefix("For"))
    return " ".join(word if word.isupper() else word.lower() for word in words) if suffix != "Model" else BASE


def _machine(found: Info) -> Table:
    table = console.facts_table()
    cores, threads = console.count(found.cores, "core"), console.count(found.threads, "thread")
    table.add_row("processor", f"{found.cpu}, {cores}, {threads}")
    others = [isa for isa in found.isas if isa != found.isa]
    table.add_row("kernels", found.isa + (f" [dim](also here: {', '.join(others)})[/]" if others else ""))
    for name, state in found.backends.items():
        words = "[green]ready[/]" if state == "ready" else f"[yellow]not there: {escape(state)}[/]"
        table.add_row(f"backend {name}", words)
    table.add_row("precisions", ", ".join(precision.served("cpu")))
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items()))
    return table


def _families(served: dict[str, dict[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("head on the fast path", no_wrap=True)
    table.add_column("families")
    heads = dict.fromkeys(head for classes in served.values() for head in classes)
    for head in heads:
        families = [family for family, classes in served.items() if head in classes]
        table.add_row(head, "all" if len(families) == len(served) else ", ".join(families))
    table.add_row("[dim]all[/]", f"[dim]{', '.join(served)}[/]")
    return table
