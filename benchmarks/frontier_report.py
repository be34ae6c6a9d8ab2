"""What `frontier.py` measured: a table and a plot of step time against peak for each model, and the bars that remat is held to.

python benchmarks/frontier_report.py      reads and writes benchmarks/results/frontier/
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

matplotlib.rcParams["svg.hashsalt"] = "remat"  # the same picture each time
RESULTS = Path(__file__).parent / "results" / "frontier"
MIB = 2**20
FAMILIES = {
    "ratio": "ratio budget, whole model",
    "regional": "ratio budget, block by block",
    "compile+checkpoint": "checkpoint, compiled",
    "checkpoint": "checkpoint, eager",
    "selective": "selective, eager",
}

Data = dict[str, Any]


def main() -> None:
    races = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    console = Console()
    console.width = max(console.width, 130)
    for race in races:
        console.print(table_of(race))
        draw(race, RESULTS / f"{race['model']}.svg")
    console.print(bars_of(races))


def median(point: Data) -> float:
    return statistics.median(point["times"] or [point["trial_s"]])


def ratio(duel: Data) -> float:
    """remat's step against the peer's: the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(duel["ours"]["times"], duel["peer"]["times"], strict=True))


def family(name: str) -> str:
    return name.split("/")[0]


def is_larger(duel: Data) -> bool:
    """True where remat had 1.5 times the peer's peak."""
    return bool(duel["ours"]["budget_bytes"] > duel["peer"]["peak_bytes"])


def frontier(duels: Iterable[Data]) -> list[Data]:
    """The duels with peers that no other of these peers beats in peak and time."""
    found = [duel for duel in duels if not is_larger(duel)]
    points = [(duel["peer"]["peak_bytes"], median(duel["peer"])) for duel in found]
    return [
        duel
        for duel, (peak, time) in zip(found, points, strict=True)
        if not any((p <= peak and t <= time) and (p, t) != (peak, time) for p, t in points)
    ]


def table_of(race: Data) -> Table:
    table = Table(
        "peer",
        "peak MiB",
        "step s",
        "remat's budget",
        "its peak MiB",
        "step s",
        "ratio",
        "lowest to highest",
        title=race["model"],
    )
    for point in race["plain"]:
        table.add_row(point["name"], f"{point['peak_bytes'] / MIB:.1f}", f"{median(point):.3f}")
    for duel in sorted(race["duels"], key=lambda duel: -duel["peer"]["peak_bytes"]):
        peer, ours = duel["peer"], duel["ours"]
        each = sorted(a / b for a, b in zip(ours["times"], peer["times"], strict=True))
        table.add_row(
            peer["name"],
            f"{peer['peak_bytes'] / MIB:.1f}",
            f"{median(peer):.3f}",
            "1.5 x the peak" if is_larger(duel) else "the peak",
            f"{ours['peak_bytes'] / MIB:.1f}",
            f"{median(ours):.3f}",
            f"{ratio(duel):.3f}",
            f"{each[0]:.3f} to {each[-1]:.3f}",
        )
    for point in race["smallest"]:
        peak = f"{point['peak_bytes'] / MIB:.1f}"
        table.add_row("", "", "", point["name"], peak, f"{median(point):.3f}")
    return table


def bars_of(races: list[Data]) -> Table:
    """Each bar over all models measured."""
    table = Table("against", "duels", "geometric mean", "worst", "bar")
    duels = [duel for race in races for duel in race["duels"]]
    joint = [
        d for race in races for d in frontier(d for d in race["duels"] if family(d["peer"]["name"]) in ("ratio", "regional"))
    ]
    whole = [d for race in races for d in frontier(d for d in race["duels"] if family(d["peer"]["name"]) == "ratio")]
    checkpoint = [d for d in duels if family(d["peer"]["name"]).endswith("checkpoint")]
    selective = [d for d in duels if family(d["peer"]["name"]) == "selective"]
    rows = [
        ("ratio budgets, joint frontier", joint, "mean ≤ 0.95, none above 1.02"),
        ("ratio budgets, whole model", whole, "mean ≤ 0.93"),
        (
            "per-block and every-k checkpointing, at its peak",
            [d for d in checkpoint if not is_larger(d)],
            "mean ≤ 0.92, none above 1",
        ),
        ("per-block checkpointing, at 1.5 x its peak", [d for d in checkpoint if is_larger(d)], "mean ≤ 0.86"),
        ("selective checkpointing", selective, "mean ≤ 0.97, none above 1"),
    ]
    for name, found, bar in rows:
        if found:
            ratios = {ratio(duel): f"{ratio(duel):.3f}, {duel['peer']['name']}" for duel in found}
            mean = math.exp(statistics.mean(map(math.log, map(ratio, found))))
            table.add_row(name, str(len(found)), f"{mean:.3f}", ratios[max(ratios)], bar)
    compiled = [point for point in ours_of(races) if point.get("peaks")]
    if compiled:
        firsts = [(point["peaks"][0], point["name"]) for point in compiled]
        off, name = max((generated / planned - 1, name) for (planned, generated), name in firsts)
        most = f"{max(len(point['peaks']) for point in compiled)} plans at most"
        table.add_row("code above its first plan", str(len(compiled)), "", f"{off:.1%}, {name}", most)
    for race in races:
        for door in ("remat", "remat-compiled"):
            ours = [point for point in ours_of([race]) if family(point["name"]) == door]
            if len(ours) > 2:
                rank = spearmanr([point["predicted_us"] for point in ours], [median(point) for point in ours]).statistic
                table.add_row(
                    f"{race['model']}: predicted order of {door}", str(len(ours)), f"{rank:.3f}", "", "Spearman ≥ 0.95"
                )
        peers = [d["peer"]["peak_bytes"] for d in race["duels"] if family(d["peer"]["name"]) in ("ratio", "regional")]
        peers += unreached(race)
        least = [point["peak_bytes"] for point in race["smallest"] if family(point["name"]) == "remat-compiled"]
        if peers and least:
            share = f"{min(least) / MIB:.1f} of {min(peers) / MIB:.1f} MiB"
            table.add_row(f"{race['model']}: lowest peak, of the ratio budgets'", "", share, "", "below")
    return table


def ours_of(races: Iterable[Data]) -> list[Data]:
    """Everything of remat's that was measured."""
    return [point for race in races for point in (*(duel["ours"] for duel in race["duels"]), *race["smallest"])]


def unreached(race: Data) -> list[int]:
    """Peaks of ratio budgets at which remat had no plan: "remat-compiled/BYTES against regional/0.0/dp" was left out."""
    pairs = [name.split(" against ") for name in race["left_out"] if " against " in name]
    return [int(ours.rpartition("/")[2]) for ours, peer in pairs if family(peer) in ("ratio", "regional")]


def draw(race: Data, path: Path) -> None:
    """Step time against peak, peers and remat, eager left and compiled right."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, door, title in zip(axes, ("remat", "remat-compiled"), ("eager", "compiled"), strict=True):
        duels = [duel for duel in race["duels"] if family(duel["ours"]["name"]) == door]
        for kind, label in FAMILIES.items():
            peers = {d["peer"]["name"]: d["peer"] for d in duels if family(d["peer"]["name"]) == kind}
            if peers:
                axis.scatter(*_xy(peers.values()), label=label, s=28)
        plain = [point for point in race["plain"] if point["name"] == ("eager" if door == "remat" else "compile")]
        if plain:
            axis.scatter(*_xy(plain), label=plain[0]["name"], marker="s", color="black", s=28)
        ours = [duel["ours"] for duel in duels] + [p for p in race["smallest"] if family(p["name"]) == door]
        ours.sort(key=lambda point: point["peak_bytes"])
        if ours:
            axis.plot(*_xy(ours), "k.-", label="remat", linewidth=1)
        axis.set(title=f"{race['model']}, {title}", xlabel="peak, MiB", ylabel="CPU seconds of a step")
        if axis.has_data():
            axis.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _xy(points: Iterable[Data]) -> tuple[list[float], list[float]]:
    found = list(points)
    return [point["peak_bytes"] / MIB for point in found], [median(point) for point in found]


if __name__ == "__main__":
    main()
