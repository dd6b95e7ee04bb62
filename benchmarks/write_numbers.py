"""Write the numbers of the documentation from the stored results.

    python benchmarks/write_numbers.py            # writes them; so does `make numbers`
    python benchmarks/write_numbers.py --check    # exit status 1 if a page and the results differ
    python benchmarks/write_numbers.py --list     # every name and its text

In a page, a number stands between `<!-- number: NAME -->` and `<!-- /number -->`, and a table between
`<!-- table: NAME -->` and `<!-- /table -->`. Names come from the stored rows, so every stored number has a name.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.common import RESULTS, ROOT, Interval, holm, interval
from benchmarks.proof.augmentation.plan import Store
from benchmarks.proof.augmentation.report import (
    Arm,
    Result,
    against_controls,
    base_text,
    paired_gain,
    results_of,
    signed,
)
from benchmarks.proof.augmentation.settings import METHODS, PLAIN, SETTINGS, TUNING_SEED
from benchmarks.proof.private import summary as private_rows
from benchmarks.proof.samples_alone import as_long
from benchmarks.speed.speed import OURS, REVERSIBLE
from glem_augment.io import atomic_write

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"<!-- (number|table): (.+?) -->(.*?)<!-- /\1 -->", re.S)
Named = Iterator[tuple[str, str]]


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: str, rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; `head` has the columns, with | between them."""
    columns = head.count("|") + 1
    lines = [f"| {head} |", "|" + "---|" * columns, *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n\n" + "\n".join(lines) + "\n\n"


def naturally(line: list[str]) -> list[Any]:
    """A key that puts 5 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", line[0])] + line[1:2]


def by_seed(rows: list[dict[str, Any]], *names: str) -> dict[tuple[str, ...], dict[int, Any]]:
    """Values by seed, for every combination of the values of these columns."""
    found: dict[tuple[str, ...], dict[int, Any]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), {})[row["seed"]] = row.get("value", row.get("accuracy"))
    return found


# ---- augmentation ----------------------------------------------------------------------------------------------------

RECIPE = 0.25  # strength of the adversarial policy that the pages advise, and the lowest that was tried
GROUPS: dict[str, Callable[[str], bool]] = {
    "own images": lambda flow: flow == "own",
    "unlabelled images": lambda flow: flow.endswith("-unlabelled"),
    "other images": lambda flow: flow != "own" and not flow.endswith("-unlabelled"),
}
OVER = ("over that stack", "over the control", "over the control's best")


def bold(gain: Interval | None) -> str:
    text = signed(gain, 1)
    return f"**{text}**" if gain and gain.clear else text


def stack_text(result: Result, strongest: Arm, seeds: Iterable[int]) -> str:
    """Accuracy over these seeds and operations of the opponent, and of the stack that validation chose."""

    def text(arm: Arm) -> str:
        return base_text([part for part in arm.stack if part[0] not in PLAIN]).replace("nothing", "crop + flip")

    mean, chosen = f"{strongest.over(seeds).mean:.1f} %", result.opponent
    if chosen is None or text(chosen) == text(strongest):
        return f"{mean} ({text(strongest)})"
    return f"{mean} ({text(strongest)}; validation chose {text(chosen)}, {chosen.over(seeds).mean:.1f} %)"


def augmentation() -> Named:
    results = results_of(Store(RESULTS))
    others = by_seed(stored("no_network")["measured"], "setting", "method")
    gains: dict[str, list[Interval]] = {}
    lowest: list[bool] = []  # whether a row's strength is the lowest that was tried
    for group, chosen in GROUPS.items():
        lines = []
        for result in results:
            for flow in filter(chosen, SETTINGS[result.setting].proof):
                arm = result.best((flow,))
                strongest = arm and result.strongest(arm)
                if arm is None or strongest is None:
                    continue
                over = (paired_gain(arm.accuracies, strongest.accuracies), *against_controls(result, arm))
                name = f"{result.setting}, {result.classifier}, {flow}"
                yield f"{name}: accuracy", arm.mean.text()
                lowest.append(arm.params["strength"] == METHODS[arm.method].trials[0]["strength"])
                for what, gain in zip(OVER, over, strict=True):
                    if gain is not None:
                        gains.setdefault(f"{group}: {what}", []).append(gain)
                        yield f"{name}: {what}", gain.text(sign=True)
                control = result.control(arm)
                for first, last in ((0, 9), (5, 9)):
                    if control and len(arm.accuracies) > last:
                        seeds = range(first, last + 1)
                        for what, other in ((OVER[0], strongest), (OVER[1], control)):
                            gain = paired_gain(arm.accuracies, other.accuracies, seeds)
                            yield f"{name}: {what}, seeds {first} to {last}", signed(gain, 1)
                means = [interval(100 * v for v in others[key].values()) for key in others if key[0] == result.setting]
                lines.append(
                    [f"`{result.setting}`", result.classifier, *([flow] if group == "other images" else []),
                     stack_text(result, strongest, arm.accuracies),
                     f"{arm.mean.mean:.1f} % ({arm.method})", *map(bold, over),
                     "; ".join(f"{mean.mean:.1f} %" for mean in means) or "not measured", str(len(arm.accuracies))]
                )  # fmt: skip
        flow_column = "flow | " if group == "other images" else ""
        head = f"setting | classifier | {flow_column}best other stack | ours | {' | '.join(OVER)} | no network | seeds"
        yield f"flow of {group}", table(head, sorted(lines, key=naturally))
    tried = [result for result in results if any(row["stage"] == "triples" for row in result.tuning)]
    yield "triples: preferred", f"{sum(len(result.opponents) > 1 for result in tried)} of {len(tried)}"
    once = [result for result in results if all(row["seed"] == TUNING_SEED for row in result.tuning)]
    yield "tuned on one seed", f"{len(once)} of {len(results)}"
    yield "flows: at the lowest strength", f"{sum(lowest)} of {len(lowest)}"
    yield from pixel_modes(results, gains)
    yield from without_network(results, others)
    lines = []
    for name, found in gains.items():
        clear, chances = sum(gain.clear for gain in found), holm([gain.chance for gain in found])
        corrected = sum(p < 0.05 and gain.mean > 0 for p, gain in zip(chances, found, strict=True))
        mean = interval(gain.mean for gain in found)
        counts = {"rows": len(found), "positive": sum(gain.mean > 0 for gain in found)}
        counts |= {"clear": clear, "clear after Holm": corrected}
        for what, count in counts.items():
            yield f"{name}: {what}", str(count)
        yield f"{name}: mean", mean.text(2, sign=True)
        lines.append([name, *map(str, counts.values()), mean.text(2, sign=True)])
    head = "comparison | rows | mean above zero | interval above zero | after Holm's correction | mean over rows"
    yield "verdicts", table(head, lines)


def pixel_modes(results: list[Result], gains: dict[str, list[Interval]]) -> Named:
    """The adversarial policy along the modes of the pixels, and the rows with the settings that the pages advise."""
    lines, matching, strengths, shorter = [], [], [], []
    steps: dict[str, list[tuple[float, float]]] = {"pixels": [], "flow": []}
    for result in results:
        below = next((a for a in result.arms if a.side == "opponent" and a.stack == result.base), None)
        for arm in result.arms:
            if below and arm.side in ("control", "ours") and arm.method.startswith("adversarial"):
                steps["pixels" if arm.side == "control" else "flow"].append((arm.step, below.step))
        arm = next((a for a in result.arms if a.side == "control" and a.method == "adversarial"), None)
        strongest = arm and result.strongest(arm)
        if arm is None or strongest is None:
            continue
        tried = {
            row["params"]["strength"]: row["val_accuracy"]
            for row in result.tuning
            if (row["flow"], row["method"], row["seed"]) == ("identity", "adversarial", TUNING_SEED)
            and row["base"] == result.base
        }
        shorter += [tried.pop(RECIPE / 2) > max(tried.values())] if RECIPE / 2 in tried else []
        gain = paired_gain(arm.accuracies, strongest.accuracies)
        assert gain is not None
        gains.setdefault("pixels' modes: over that stack", []).append(gain)
        through = any(name == "latent-noise" for name, _ in result.base)
        strengths.append(arm.params["strength"])
        matches = arm.params["strength"] == RECIPE and not through
        matching += [gain] if matches else []
        why = "" if matches else "stack uses a flow" if through else f"strength {arm.params['strength']:g}"
        yield f"{result.setting}, {result.classifier}, pixels: over that stack", gain.text(sign=True)
        lines.append(
            [f"`{result.setting}`", result.classifier, stack_text(result, strongest, arm.accuracies),
             f"{arm.mean.mean:.1f} %",
             bold(gain), why or "yes", str(gain.seeds)]
        )  # fmt: skip
    gains["pixels' modes as advised: over that stack"] = matching
    yield "pixels: a shorter move is better on validation images", f"{sum(shorter)} of {len(shorter)}"
    yield "pixels: at the lowest strength", f"{strengths.count(RECIPE)} of {len(strengths)}"
    head = "setting | classifier | best other stack | pixels' modes, adversarial | over that stack | as advised | seeds"
    yield "modes of the pixels", table(head, sorted(lines, key=naturally))
    for side, values in steps.items():
        added, times = [1000 * (a - b) for a, b in values], [a / b for a, b in values]
        yield f"ms added to a step: {side}", f"{min(added):.0f} to {max(added):.0f}"
        yield f"times as long: {side}", f"{min(times):.1f} to {max(times):.1f}"


def without_network(results: list[Result], others: dict[tuple[str, ...], dict[int, float]]) -> Named:
    """HOG with a ridge, and label spreading, beside the small CNN's best stack and ours."""
    lines = []
    for result in results:
        hog = others.get((result.setting, "hog-ridge"))
        if hog is None or result.classifier != "cnn" or (opponent := result.opponent) is None:
            continue
        spread, flows = others[result.setting, "label-spreading"], SETTINGS[result.setting].proof
        arm = result.best(tuple(filter(GROUPS["unlabelled images"], flows))) or result.best(flows)
        control = result.best_control()
        strongest = result.strongest(arm or opponent) or opponent
        for name, values in (("HOG + ridge", hog), ("label spreading", spread)):
            yield f"{result.setting}: {name}", interval(100 * v for v in values.values()).text()
            for side, other in (("flow", arm), ("pixels", control), ("stack", strongest)):
                if other:
                    yield f"{result.setting}: {side}, same seeds", other.over(hog).text()
                    gain = paired_gain(other.accuracies, values)
                    yield f"{result.setting}: {side} over {name}", signed(gain, 1)
        gain = [bold(paired_gain(arm.accuracies, values)) if arm else "" for values in (hog, spread)]
        means = [interval(100 * v for v in values.values()).text() for values in (hog, spread)]
        sides = [f"{side.over(hog).text()} %" if side else "" for side in (strongest, control, arm)]
        lines.append([f"`{result.setting}`", *(f"{mean} %" for mean in means), *sides, *gain])
    head = "setting | HOG + ridge | label spreading | cnn, best other stack | cnn, pixels' modes | cnn, flow"
    lines.sort(key=naturally)
    yield "no network", table(f"{head} | flow over HOG + ridge | flow over label spreading", lines)
    yield "few labels", table(head, [line[:6] for line in lines if re.fullmatch(r"`(fashion|cifar10)-\d+`", line[0])])


# ---- other proofs ----------------------------------------------------------------------------------------------------


def samples() -> Named:
    """Classifiers trained on samples alone."""
    found = by_seed(stored("samples_alone"), "data", "method", "setting", "metric")
    for (data, method, setting, metric), values in found.items():
        name = f"samples, {data}: {method} {setting}".strip() + ("" if metric == "CNN-A" else f", {metric}")
        digits = 1 if metric.endswith("CNN-A") else 2
        yield name, interval(values.values()).text(digits) if len(values) > 1 else f"{values.popitem()[1]:.{digits}f}"
    lines = []
    for data, method, setting, metric in found:
        if metric == "CNN-A" and len(found[data, method, setting, metric]) > 1:
            real = found.get((data, "real", as_long(setting), metric))
            mean = interval(found[data, method, setting, metric].values())
            share = f"{mean.mean / statistics.mean(real.values()):.2f}" if real else ""
            lines.append(
                [data, method.replace("identity", "pixels"), setting, f"{mean.text()} %", share, str(mean.seeds)]
            )
    yield "samples alone", table("data | trained on | setting | test accuracy | of real | seeds", lines)


def private() -> Named:
    """Classifiers trained on samples of private models."""
    lines = private_rows(stored("private"))
    for line in lines:
        values = f"{line['accuracy']:.1f} ± {line['+/-']:.1f}" if line["+/-"] else f"{line['accuracy']:.1f}"
        yield f"private, {line['data']}, {line['method']}, {line['judged']}: epsilon {line['epsilon']:g}", values
    columns = sorted({line["epsilon"] for line in lines if line["epsilon"]})
    real = by_seed(stored("samples_alone"), "data", "method", "setting", "metric")
    rows = []
    for data, shown in (("fashion-mnist", "Fashion-MNIST"), ("cifar10", "CIFAR-10")):
        own = {n["epsilon"]: n for n in lines if (n["data"], n["method"], n["judged"]) == (data, "taef2", "test")}
        cells = [
            ""
            if e not in own
            else f"{own[e]['accuracy']:.1f}" + (f" ± {own[e]['+/-']:.1f}" if own[e]["+/-"] else " (one release)")
            for e in columns
        ]
        if own:
            rows.append([shown, *cells, f"{statistics.mean(real[data, 'real', '', 'CNN-A'].values()):.1f}"])
    head = " | ".join(["", *(f"ε = {epsilon:g}" for epsilon in columns), "real images"])
    yield "private sets", table(head, rows)


def photographs() -> Named:
    """Few photographs per class, with stacks chosen on other images."""
    found, lines = stored("photographs"), []
    for row in found["rows"]:
        seeds, over = row["seeds"], []
        mean = Interval(row["accuracy"], row["+/-"], seeds)
        for place, base in enumerate(("crop + flip", "the best other stack"), 1):
            gain = Interval(row[f"over {base}"], row[f"+/- ({place})"], seeds)
            over.append("" if gain.half == 0 else f"**{signed(gain, 1)}**" if gain.clear else signed(gain, 1))
            for what in row["what"].split("; "):
                yield f"photographs: {what}, over {base}", gain.text(sign=True)
        for what in row["what"].split("; "):
            yield f"photographs: {what}", mean.text()
        lines.append([row["what"], row["stack"], f"{mean.text()} %", *over, str(seeds)])
    for row in found["differences"]:
        gain = Interval(row["points"], row["+/-"], row["seeds"])
        yield f"photographs: {row['difference']}", gain.text(sign=True)
    head = "what | stack | test accuracy | over crop + flip | over the best other stack | seeds"
    yield "photographs", table(head, lines)


def latents() -> Named:
    """Flows of latents, and class covariances of latents."""
    found = stored("latent_flows")["rows"]
    for row in found:
        yield f"latent_flows, {row['numbers']}: {row['flow']}", f"{row['held out']:.3f}"
    names = [name for name in dict.fromkeys(row["numbers"] for row in found) if "channels" in name]
    lines = []
    for flow in dict.fromkeys(row["flow"] for row in found if row["numbers"] in names):
        held = {row["numbers"]: row["held out"] for row in found if row["flow"] == flow}
        lines.append([flow, *(f"{held[name]:.3f}" if name in held else "" for name in names)])
    yield "latent flows", table(" | ".join(["flow", *names]), lines)
    rows = stored("covariances")["rows"]
    columns = [name for name in rows[0] if name != "count"]
    cells = [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    yield "covariances", table(" | ".join(columns).replace("per dimension", "images per number"), cells)


def long_tails() -> Named:
    rows = [row for row in stored("long_tails") if row["seed"] != 1000]
    found, lines = by_seed(rows, "setting", "source", "stack"), []
    for setting in dict.fromkeys(setting for setting, *_ in found):
        line = [setting.replace("-long-tail-", ", ") + " to 1"]
        for source in ("re-sampled", "identity", "flow"):
            own = [v for (s, o, _), v in found.items() if (s, o) == (setting, source)]
            line.append(f"{max((interval(v.values()) for v in own), key=lambda i: i.mean).text()} %")
        lines.append(line)
    yield (
        "long tails",
        table("data | drawn equally often | filled up by the pixels' modes | filled up by a flow", lines),
    )


BACKBONE_MOVES = {"modes": "pixels' modes", "taef2": "TAEF2's modes", "flow": "flow"}


def pretrained() -> Named:
    found = by_seed(stored("pretrained")["measured"], "setting", "views")
    lines = []
    for setting in dict.fromkeys(setting for setting, _ in found):
        lines.append([f"`{setting}`"])
        for arm in ("none", "flip", "ordinary", *BACKBONE_MOVES):
            mean = interval(100 * value for value in found[setting, arm].values())
            yield f"{setting}: probe, {arm}", mean.text()
            if arm not in BACKBONE_MOVES:
                lines[-1].append(f"{mean.text()} %")
                continue
            gain = paired_gain(found[setting, arm], found[setting, "ordinary"])
            yield f"{setting}: probe, {arm} over ordinary", signed(gain, 1)
            lines[-1].append(bold(gain))
    head = "setting | the image | + mirror image | + ordinary views"
    yield "pretrained", table(" | ".join([head, *(f"{text} over ordinary" for text in BACKBONE_MOVES.values())]), lines)


def fine_tuned() -> Named:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in stored("fine_tuned"):
        if "accuracy" in row:
            found.setdefault(row["setting"], {}).setdefault(row["arm"], {})[row["seed"]] = row["accuracy"]
    lines = []
    for setting, arms in found.items():
        means = {arm: interval(100 * share for share in values.values()) for arm, values in arms.items()}
        yield from ((f"{setting}: fine-tuned, {arm}", mean.text()) for arm, mean in means.items())
        better = max(arms["cropflip"], arms["ordinary"], key=lambda v: statistics.mean(v.values()))
        gains = {arm: paired_gain(arms.get(arm, {}), better) for arm in BACKBONE_MOVES}
        yield from ((f"{setting}: fine-tuned, {arm} over the better", signed(gain, 1)) for arm, gain in gains.items())
        lines.append(
            [f"`{setting}`", *(f"{means[arm].text()} %" for arm in ("cropflip", "ordinary")),
             *(bold(gain) or "not measured" for gain in gains.values()), str(len(better))]
        )  # fmt: skip
    head = "setting | crop + flip | + RandAugment"
    over = [f"{text} over the better" for text in BACKBONE_MOVES.values()]
    yield "fine-tuned", table(" | ".join([head, *over, "seeds"]), lines)


def unlabelled() -> Named:
    """Pseudo-labels, Mean Teacher and FixMatch, alone and with our moves."""
    rows, best = stored("unlabelled"), {}
    tested, judged = ([row for row in rows if metric in row] for metric in ("accuracy", "val_accuracy"))
    for row in sorted(judged, key=lambda row: row["val_accuracy"]):  # the best comes last
        name = row["method"] + (" with moves" if row["moves"] else "")
        best[f"{row['setting']}: {name}, validation"] = row["val_accuracy"]
    yield from ((name, f"{100 * value:.1f}") for name, value in best.items())
    alone = by_seed([row for row in tested if not row["moves"]], "setting", "method")
    moved = by_seed([row for row in tested if row["moves"]], "setting", "method")
    results = {result.setting: result for result in results_of(Store(RESULTS)) if result.classifier == "cnn"}
    for (setting, method), values in alone.items():
        if method == "labelled" and (control := results[setting].best_control()):  # measured by augmentation.py
            moved[setting, method] = {s: v for s, v in control.accuracies.items() if s in values}
    lines, gains = [], []
    for (setting, method), values in alone.items():
        flow = results[setting].best(tuple(filter(GROUPS["unlabelled images"], SETTINGS[setting].proof)))
        means, over, over_flow = [], [], []
        for name, sides in ((method, alone), (f"{method} with moves", moved)):
            side = sides[setting, method]
            means.append(interval(100 * v for v in side.values()).text())
            over.append(None if method == "labelled" else paired_gain(side, sides[setting, "labelled"]))
            over_flow.append(flow and paired_gain(flow.accuracies, side))
            yield f"{setting}: {name}", means[-1]
            yield f"{setting}: {name} over labelled", signed(over[-1], 1)
            yield f"{setting}: flow over {name}", signed(over_flow[-1], 1)
        gain = paired_gain(moved[setting, method], values)
        yield f"{setting}: moves over {method}", signed(gain, 1)
        gains += [gain] if gain and method != "labelled" else []
        lines.append(
            [f"`{setting}`", method.replace("labelled", "labelled images alone"), *(f"{mean} %" for mean in means),
             bold(gain), *map(bold, over), bold(over_flow[1]), str(len(values))]
        )  # fmt: skip
    yield "moves over methods: clear", f"{sum(gain.clear for gain in gains)} of {len(gains)}"
    head = "setting | method | alone | with moves | moves over alone | over labelled images | both with moves"
    yield "unlabelled", table(f"{head} | flow over moves | seeds", sorted(lines, key=naturally))


def single_files() -> Named:
    """Results of one file and one run."""
    for name in ("bundled_fashion-mnist", "bundled_cifar10"):
        record = stored(name)
        for key, digits, factor in (
            ("accuracy", 2, 100),
            ("bits_per_dim", 3, 1),
            ("nats_per_number", 3, 1),
            ("ece", 3, 1),
        ):
            if key in record:
                yield f"{name}: {key}", f"{factor * record[key]:.{digits}f}"
        trip = record["round_trip"]
        if "psnr" in trip:
            yield f"{name}: psnr", f"{trip['psnr']:.1f}"
            yield f"{name}: flow error", f"{trip['flow_error']:.2g}"
            continue
        yield f"{name}: largest error", f"{trip['max_error']:.3f}"
        yield f"{name}: pixels back", f"{100 * trip['within_half_step']:.4f}".rstrip("0").rstrip(".")
    record = stored("bundled_flow")
    yield "bundled_flow: judge", f"{100 * record['judge_accuracy']:.1f}"
    for row in record["rows"]:
        mean = Interval(100 * row["judged as intended"], 100 * row["half the 95 % interval"], 3)
        yield f"bundled_flow: {row['samples']} T={row['temperature']:g}", mean.text()
    record = stored("trained_flow")["measured"]
    yield "trained_flow: accuracy", f"{100 * record['accuracy']:.1f}"
    yield "trained_flow: bits_per_dim", f"{record['bits_per_dim']:.3f}"
    for row in stored("overhead")["rows"][1:]:
        yield f"overhead: {row['policy']}", f"{row['longer by %']:.0f}"
    for row in stored("kld")["rows"]:
        yield f"kld: {row['pass']}, seconds", f"{row['median s']:.1f}"
        yield f"kld: {row['pass']}, memory", f"{row['peak extra memory / mu']:.1f}"
    for row in stored("matexp")["rows"]:
        yield f"matexp: {row['way']}", f"{row['median ratio']:.0f}"
    for row in stored("backbones")["rows"]:
        for key, digits in (("bits/dim", 2), ("NF accuracy %", 1)):
            if row[key] != "diverged":
                yield f"backbones: {row['variant']}, {key}", f"{float(row[key].split()[0]):.{digits}f}"
    for row in stored("ranks")["rows"]:
        yield f"ranks: {row['job']}", f"{row['ratio']:.2f}"
        yield f"ranks: {row['job']}, communication", f"{100 * row['share of communication']:.0f}"
    record = stored("sharpness")
    rows, failed = record["rows"], [row["what"] for row in record["verdicts"] if not row["met"]]
    lines = [
        [row["flow"].replace("identity", "pixels' modes"), row["policy"], f"{row['change']:.1f}",
         f"{100 * row['energy']:.0f} %", f"{row['accuracy']:.1f} %", f"{rows[0]['accuracy'] - row['accuracy']:.1f}",
         ", ".join(w.split(": ")[1] for w in failed if w.startswith(f"{row['flow']}, {row['policy']}:"))]
        for row in rows
    ]  # fmt: skip
    for flow, policy, *_, lost, _ in lines:
        yield f"sharpness: {flow}, {policy}, points lost", lost
    yield (
        "sharpness",
        table("flow | policy | levels moved | energy of fine detail | top-1 | points lost | limits missed", lines),
    )
    calm = stored("training_is_calm")["rows"]
    for key in ("below independent pixels", "above, with a message", "above, cut off too early", "above, silent"):
        count = sum(
            v if isinstance(v := row[key], int) else len([part for part in v.split(",") if part]) for row in calm
        )
        yield f"training_is_calm: {key}", str(count)


def speed() -> Named:
    record = stored("speed")
    for row in record["rows"]:
        for operation in ("train", "encode", "decode"):
            if row[f"{operation} overhead"] is not None:
                yield f"speed: {row['case']} {row['side']} {operation}", f"{100 * row[f'{operation} overhead']:.0f}"
    lines = [
        [f"`{row['case']}`", row["what"], f"{row['ratio']:.2f}", f"{row['noise']:.2f}", f"{row['limit']:.2f}",
         "yes" if row["met"] else "**no**"]
        for row in record["verdicts"]
    ]  # fmt: skip
    yield "speed", table("case | time of ours over | ratio | noise | limit | met", lines)
    taken = {(row["case"], row["side"]): row["train ms"] for row in record["rows"]}
    longer = [100 * (ms / taken[case, OURS] - 1) for (case, side), ms in taken.items() if side == REVERSIBLE]
    yield "speed: reversible, longer", f"{min(longer):.0f} to {max(longer):.0f}"
    failed = [row for row in record["verdicts"] if not row["met"]]
    yield "speed: verdicts", str(len(record["verdicts"]))
    yield "speed: failed", str(len(failed))


# ---- the paper -------------------------------------------------------------------------------------------------------

DIGITS = {"BPD": 2, "FID": 2, "rho-distance": 2, "rho-confusion": 2}
ROLES = {"main": "Fashion-MNIST", "second": "CIFAR-10"}


def paper() -> Named:
    files = [f"table{n}" for n in range(1, 9)] + ["pareto", "trust"]
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for file in files:
        rows = [row | {"file": file} for row in stored(f"paper/{file}.cpu")]
        found |= by_seed(rows, "file", "role", "method", "setting", "metric")

    def text(file: str, role: str, method: str, setting: str, metric: str) -> str:
        values = found.get((file, role, method, setting, metric))
        if values is None:
            return ""
        digits, mean = DIGITS.get(metric, 1), interval(values.values())
        return mean.text(digits) if mean.seeds > 1 else f"{mean.mean:.{digits}f}"

    for key in found:
        file, role, method, setting, metric = key
        name = f"{file}, {ROLES[role]}: {method} {metric}"
        yield name if setting in ("default", "tau=1") else f"{name}, {setting}", text(*key)

    def compare(file: str, metrics: tuple[str, ...], roles: tuple[str, ...] = ("main", "second")) -> str:
        own = [(role, method, setting) for f, role, method, setting, _ in found if f == file and method != "oracle"]
        lines = [
            [*([ROLES[role]] if len(roles) > 1 else []), f"{method}, {setting}" if setting.endswith("x") else method,
             *(text(file, role, method, setting, metric) for metric in metrics)]
            for role, method, setting in dict.fromkeys(own) if role in roles
        ]  # fmt: skip
        data = "data | " if len(roles) > 1 else ""
        return table(
            f"{data}method | " + " | ".join(metrics), sorted(lines, key=lambda line: line[0] != "Fashion-MNIST")
        )

    columns = {1: ("NF-A", "CNN-A"), 3: ("NF-A", "CNN-A", "FID", "Cov", "L-R", "BPD", "ECE"), 4: ("CNN-A",)}
    columns |= {5: ("CNN-A", "FID", "Cov", "L-R"), 6: ("NF-A", "CNN-A", "FID", "Cov", "L-R")}
    columns |= {7: ("NF-A", "CNN-A", "FID", "Cov", "L-R"), 8: ("NF-A", "CNN-A", "BPD")}
    for number, metrics in columns.items():
        roles = ("main", "second") if number in (1, 4, 8) else ("main",)
        yield f"paper {number}", compare(f"table{number}", metrics, roles)
    for role in ROLES:
        for metric in dict.fromkeys(m for f, r, *_, m in found if (f, r) == ("trust", role)):
            values = [v[0] for (f, r, *_, m), v in found.items() if (f, r, m) == ("trust", role, metric)]
            yield f"trust, {ROLES[role]}: {metric}", f"{min(values):.2f} to {max(values):.2f}"
    yield "pareto", compare("pareto", ("NF-A", "BPD", "ECE", "FID"))
    claims = stored("paper/claims")
    yield "claims", table("claim of the paper | here", ([row["claim"], f"**{row['verdict']}**"] for row in claims))
    sources = [("the real images (15 epochs, one seed)", ("table3", "main", "oracle", "default", "accuracy")),
               ("as many samples of the class Gaussians", ("table5", "main", "tau = 0.9", "default", "CNN-A")),
               ("as many samples of the RFCM", ("table5", "main", "RFCM", "rfcm", "CNN-A")),
               ("samples of the class Gaussians of `hybrid-joint`",
                ("table8", "main", "hybrid-joint (not in the paper)", "default", "CNN-A")),
               ("the same on CIFAR-10",
                ("table8", "second", "hybrid-joint (not in the paper)", "default", "CNN-A"))]  # fmt: skip
    yield (
        "samples of the paper",
        table("a small CNN trained on | test accuracy, %", ([w, text(*key)] for w, key in sources)),
    )


# ---- pages -----------------------------------------------------------------------------------------------------------

SOURCES = (
    augmentation,
    samples,
    private,
    photographs,
    latents,
    long_tails,
    pretrained,
    fine_tuned,
    unlabelled,
    single_files,
    speed,
    paper,
)


def names() -> dict[str, str]:
    """Every name and its text."""
    found: dict[str, str] = {}
    for source in SOURCES:
        for name, text in source():
            assert found.setdefault(name, text) == text, f"two numbers are called {name!r}"
    return found


def written(text: str, known: dict[str, str]) -> str:
    """A page with the stored numbers.

    Raises:
        KeyError: no stored result has this name.
    """
    return MARK.sub(lambda m: f"<!-- {m[1]}: {m[2]} -->{known[m[2]]}<!-- /{m[1]} -->", text)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing")
    arguments.add_argument("--list", action="store_true", help="print all names")
    args = arguments.parse_args()
    known = names()
    if args.list:
        print("\n".join(f"{name}: {text.strip()}" for name, text in known.items()))
        return
    different = []
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = written(before, known)
        if after != before:
            different.append(str(page.relative_to(ROOT)))
            if not args.check:
                with atomic_write(page, "w") as file:
                    file.write(after)
    if args.check and different:
        raise SystemExit(f"numbers: {', '.join(different)} differ from the stored results; run `make numbers`")
    print(f"numbers: wrote {', '.join(different)}" if different else "numbers: all pages agree with the stored results")


if __name__ == "__main__":
    main()
