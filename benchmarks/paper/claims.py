"""The paper's claims against the measured tables: holds, does not hold, or not decidable at this scale.

A difference is significant if chance alone gives it in less than 5 % of cases. Over seeds, the test is paired if both
values come from the same flows, and Welch's test otherwise. Three seeds say little about their variance. In Welch's
test, the variance is therefore averaged with the mean variance of all methods on the data set, which counts as two more
seeds (after Smyth 2004). One run decides nothing.

A claim with several parts holds if all parts hold. It fails if one part is significantly reversed, at 5 % shared among
the parts. A series rises or falls if the difference of its ends is significant.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats

from benchmarks.common import interval
from glem_augment.io import write_json

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decidable at this scale"
# Degrees of freedom with which the variance of all methods counts in the variance of one method.
_PRIOR = 2


@dataclass
class Verdict:
    """A verdict on a claim. `evidence`: the numbers behind the verdict."""

    verdict: str
    evidence: str


class Comparison(NamedTuple):
    """Whether a is above b (+1), below (-1) or equal (0), and how often chance alone gives such a difference."""

    direction: int
    chance: float

    def sign(self, level: float = 0.05) -> int:
        """The direction if it is significant at that level, else 0."""
        return self.direction if self.chance <= level else 0


def _chance(t: float, freedom: int) -> float:
    """Probability that Student's t is farther from 0 than this."""
    return float(2 * stats.t.sf(abs(t), freedom))


class Runs(list[float]):
    """Values in the order of the seeds, and the flows that they come from (None if unknown)."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        rows = sorted(rows, key=lambda row: row["seed"])
        super().__init__(row["value"] for row in rows)
        self.flows = [(row["seed"], row["weights_hash"]) if row.get("weights_hash") else None for row in rows]


class Measured:
    """The rows of all tables of one scale."""

    def __init__(self, folder: Path, scale: str) -> None:
        self.rows: list[dict[str, Any]] = []
        for path in sorted(folder.glob(f"table*.{scale}.json")):
            self.rows += json.loads(path.read_text(encoding="utf-8"))

    def variance(self, data: str, metric: str) -> float:
        """Mean variance between runs, over all methods with several runs; 0 if there are fewer than three methods."""
        groups: dict[tuple[Any, ...], list[float]] = {}
        for row in self.rows:
            if (row["role"], row["metric"]) == (data, metric):
                groups.setdefault((row["table"], row["method"], row["setting"]), []).append(row["value"])
        several = {tuple(values) for values in groups.values() if len(values) > 1}  # a flow stands in several tables
        return statistics.mean(map(statistics.variance, several)) if len(several) > 2 else 0.0

    def compare(self, a: Runs, b: Runs, metric: str, data: str) -> Comparison | None:
        """Compare two methods; None with fewer than two runs of each.

        The test is paired if the flows are the same. Otherwise it is Welch's test, and each variance is averaged with
        the variance of all methods.
        """
        if len(a) < 2 or len(b) < 2:
            return None
        gap = statistics.mean(a) - statistics.mean(b)
        direction = 0 if gap == 0 else int(math.copysign(1, gap))
        if a.flows == b.flows and all(a.flows):
            differences = [x - y for x, y in zip(a, b, strict=True)]
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            return Comparison(direction, _chance(gap / error, len(differences) - 1) if error else float(not gap))
        common = self.variance(data, metric)
        prior = _PRIOR if common else 0
        parts = []
        for values in (a, b):
            freedom = len(values) - 1 + prior
            variance = (prior * common + (len(values) - 1) * statistics.variance(values)) / freedom
            parts.append((variance / len(values), freedom))
        total = sum(part for part, _ in parts)
        if not total:
            return Comparison(direction, float(not gap))
        freedom = int(total**2 / sum(part * part / own for part, own in parts))
        return Comparison(direction, _chance(gap / math.sqrt(total), max(1, freedom)))

    def values(self, table: int, data: str, method: str, metric: str, setting: str = "default") -> Runs:
        """Values over seeds; empty if the method was not measured."""
        key = (table, data, method, metric, setting)
        names = ("table", "role", "method", "metric", "setting")
        return Runs([row for row in self.rows if tuple(row[name] for name in names) == key])


def _text(name: str, values: list[float]) -> str:
    if not values:
        return f"{name} not measured"
    mean = interval(values)
    spread = f" ± {mean.half:.2g} ({mean.seeds} seeds)" if mean.seeds > 1 else " (1 seed)"
    return f"{name} {mean.mean:.4g}{spread}"


def _all(parts: list[tuple[Comparison | None, str]]) -> Verdict:
    """Holds if every part is significant, fails if one part is significantly reversed, else open."""
    found = [comparison for comparison, _ in parts if comparison is not None]
    fails = any(c.sign(0.05 / len(parts)) == -1 for c in found)
    holds = bool(parts) and len(found) == len(parts) and all(c.sign() == 1 for c in found)
    return Verdict(FAILS if fails else HOLDS if holds else OPEN, "; ".join(text for _, text in parts))


def _above(
    m: Measured,
    table: int,
    data: str,
    winner: str,
    losers: tuple[str, ...],
    metrics: tuple[str, ...],
    settings: tuple[str, str] = ("default", "default"),
    lower: tuple[str, ...] = (),
) -> list[tuple[Comparison | None, str]]:
    """One part per loser and metric; `lower`: metrics where less is better."""  # fmt: skip
    parts = []
    for metric in metrics:
        a = m.values(table, data, winner, metric, settings[0])
        for loser in losers:
            b = m.values(table, data, loser, metric, settings[1])
            found = m.compare(b, a, metric, data) if metric in lower else m.compare(a, b, metric, data)
            parts.append((found, f"{data} {metric}: {_text(winner, a)} against {_text(loser, b)}"))
    return parts


def _baselines(m: Measured) -> Verdict:
    parts = []
    for data in ("main", "second"):
        parts += _above(m, 1, data, "GLEM", ("Baseline 2 (lambda = 0)",), ("NF-A", "CNN-A"))
        parts += _above(m, 1, data, "GLEM", ("Baseline 1 (CE)",), ("CNN-A",))
    return _all(parts)


def _codes(m: Measured) -> Verdict:
    return _all(
        [p for data in ("main", "second") for p in _above(m, 1, data, "GLEM", ("Baseline 3 (CEGLEM)",), ("CNN-A",))]
    )


def _lambda(m: Measured) -> Verdict:
    weights = (1, 3, 5, 10, 15, 20)
    series = {n: {w: m.values(3, "main", f"lambda_0 = {w}", n) for w in weights} for n in ("NF-A", "CNN-A", "FID")}
    if not all(all(values.values()) for values in series.values()):
        return Verdict(OPEN, "not all of lambda_0 = 1 ... 20 measured")
    means = {n: [statistics.mean(v[w]) for w in weights] for n, v in series.items()}
    text = "; ".join(f"{n} {', '.join(f'{x:.4g}' for x in xs)}" for n, xs in means.items())
    parts: list[tuple[Comparison | None, str]] = []
    for name in ("NF-A", "CNN-A"):
        best = weights[means[name].index(max(means[name]))]
        rises, falls = (m.compare(series[name][best], series[name][w], name, "main") for w in (1, 20))
        if rises is None or falls is None:
            return Verdict(OPEN, text)
        # No rise if the smallest is best and significantly better than the largest. Without a fall: no verdict.
        part = Comparison(-1, falls.chance) if best == 1 else Comparison(1, max(rises.chance, falls.chance))
        parts.append((part, f"{name} best at {best}"))
    worse = m.compare(series["FID"][20], series["FID"][1], "FID", "main")
    parts.append((worse, f"rank correlation of FID with lambda_0 {_rank(means['FID']):.2f}"))
    found = _all(parts)
    return Verdict(found.verdict, f"{text} (lambda_0 = 1, 3, 5, 10, 15, 20); {found.evidence}")


def _rank(values: list[float]) -> float:
    """Spearman correlation of a series with its order."""
    return float(stats.spearmanr(range(len(values)), values).statistic)


def _temperature(m: Measured) -> Verdict:
    taus = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
    found = {}
    for metric in ("CNN-A", "L-R"):
        for t in taus:
            setting = "default" if t == 0.9 else f"tau={t:g}"
            found[metric, t] = m.values(5, "main", f"tau = {t}", metric, setting)
    if not all(found.values()):
        return Verdict(OPEN, "not all temperatures measured")
    cnn = {t: statistics.mean(found["CNN-A", t]) for t in taus}
    labels = [statistics.mean(found["L-R", t]) for t in taus]
    best = max(cnn, key=cnn.__getitem__)
    below = max((t for t in taus if t < 1), key=cnn.__getitem__)
    above = max((t for t in taus if t >= 1), key=cnn.__getitem__)
    return _all(
        [
            (
                m.compare(found["CNN-A", below], found["CNN-A", above], "CNN-A", "main"),
                f"CNN-A best at tau = {best}; {cnn[below]:.4g} at {below}, {cnn[above]:.4g} at {above}",
            ),
            (
                m.compare(found["L-R", 0.7], found["L-R", 1.2], "L-R", "main"),
                f"L-R {', '.join(f'{v:.4g}' for v in labels)} at tau {taus}, rank correlation {_rank(labels):.2f}",
            ),
        ]
    )


def _count(m: Measured) -> Verdict:
    parts: list[tuple[Comparison | None, str]] = []
    for data in ("main", "second"):
        sizes = sorted(
            {
                1 if row["setting"] == "default" else int(row["setting"].removesuffix("x"))
                for row in m.rows
                if row["table"] == 4 and row["role"] == data
            }
        )
        series = [m.values(4, data, "GLEM", "CNN-A", "default" if s == 1 else f"{s}x") for s in sizes]
        if len(series) < 2:
            parts.append((None, f"{data} not measured"))
            continue
        text = ", ".join(f"{statistics.mean(v):.4g} at {s}x" for s, v in zip(sizes, series, strict=True))
        parts.append((m.compare(series[-1], series[0], "CNN-A", data), f"{data} CNN-A {text}"))
    return _all(parts)


def _rfcm(m: Measured) -> Verdict:
    settings = ("rfcm", "default")
    return _all(_above(m, 5, "main", "RFCM", ("tau = 0.9",), ("CNN-A", "FID", "Cov"), settings, ("FID",)))


def _continuum(m: Measured) -> Verdict:
    label = "lambda_0 = 10"
    rho, p = (m.values(3, "main", label, name) for name in ("rho-distance", "rho-distance p"))
    if not rho or not p:
        return Verdict(OPEN, "not measured")
    confusion = m.values(3, "main", label, "rho-confusion")
    mean = statistics.mean(rho)
    text = f"{_text('rank correlation of KLD with the distance of class features', rho)}, Mantel p up to {max(p):.3g}; "
    text += _text("with confusion", confusion)
    control = m.values(3, "main", "identity flow (control)", "rho-distance")
    text += "; " + _text("Gaussians of the pixels themselves (identity flow, by likelihood), with distance", control)
    if control and mean <= statistics.mean(control):
        text += ": the order is in the pixels already, the flow and the repulsion do not add to it"
    sure = max(p) < 0.025 and all(value * mean > 0 for value in rho)  # p: one-sided
    return Verdict(HOLDS if mean > 0 and sure else FAILS if mean < 0 and sure else OPEN, text)


def _both(m: Measured) -> Verdict:
    parts = _above(m, 7, "main", "both", ("only mu", "only Sigma", "random initialisation"), ("CNN-A", "L-R"))
    return _all(parts)


def _related(m: Measured) -> Verdict:
    parts = []
    for data in ("main", "second"):
        parts += _above(m, 8, data, "GLEM", ("IB-INN", "FlowGMM"), ("NF-A", "CNN-A"))
    return _all(parts)


def _psi(m: Measured) -> Verdict:
    return _all(_above(m, 6, "main", "3: KLD 10 + psi", ("2: KLD 10",), ("NF-A", "CNN-A", "L-R")))


CLAIMS: dict[str, Callable[[Measured], Verdict]] = {
    "GLEM is above lambda = 0 in NF and CNN accuracy, and above CE in CNN accuracy (Table 1)": _baselines,
    "GLEM is above CEGLEM, which has class codes, in CNN accuracy (Table 1)": _codes,
    "Accuracy rises, then falls with lambda_0, while FID worsens (Table 3)": _lambda,
    "CNN accuracy is best at tau below 1, and label reliability rises as tau falls (Table 5)": _temperature,
    "CNN accuracy grows with the number of generated images (Table 4)": _count,
    "psi helps NF accuracy, CNN accuracy and label reliability (Table 6)": _psi,
    "RFCM helps CNN accuracy, FID and Coverage (Table 5)": _rfcm,
    "Learning both mu and Sigma gives the best CNN accuracy and label reliability (Table 7)": _both,
    "Visually similar classes end up closer (rank correlation of pairwise KLD with the oracle)": _continuum,
    "GLEM is above IB-INN and FlowGMM in NF and CNN accuracy (Table 8)": _related,
}


def verdicts(folder: Path, scale: str) -> list[dict[str, str]]:
    """Claim, scale, verdict and evidence, for every claim."""
    measured = Measured(folder, scale)
    result = []
    for claim, judge in CLAIMS.items():
        found = judge(measured)
        result.append({"claim": claim, "scale": scale, "verdict": found.verdict, "evidence": found.evidence})
    return result


def write_claims(folder: Path, scale: str) -> None:
    """Write this scale's verdicts into `claims.json`, and keep the verdicts of other scales."""
    path = folder / "claims.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    found = verdicts(folder, scale)
    write_json(path, [entry for entry in before if entry["scale"] != scale] + found)
    for entry in found:
        print(f"{entry['verdict']}: {entry['claim']}\n    {entry['evidence']}")
