"""The numbers of the pages that come from the stored rows of `augmentation/run.py`, with names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common import Interval, Named, by_seed, holm, interval, table
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
from benchmarks.proof.augmentation.settings import METHODS, PLAIN, RECIPES, SETTINGS, TUNING_SEED

RECIPE = RECIPES["adversarial"]["strength"]
GROUPS: dict[str, Callable[[str], bool]] = {
    "own images": lambda flow: flow == "own",
    "unlabelled images": lambda flow: flow.endswith("-unlabelled"),
    "other images": lambda flow: flow != "own" and not flow.endswith("-unlabelled"),
}
OVER = ("over that stack", "over the control", "over the control's best")


def naturally(line: list[str]) -> list[Any]:
    """A key that puts 5 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", line[0])] + line[1:2]


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


def numbers(store: Store, no_network: list[dict[str, Any]]) -> Named:
    """Gains and counts; `no_network`: the rows of no_network.py."""
    results = results_of(store)
    others = by_seed(no_network, "setting", "method")
    gains: dict[str, list[Interval]] = {}
    over_stack: dict[tuple[str, str], dict[str, Interval]] = {}  # of settings and classifiers, by the kind of moves
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
                if over[0] is not None:
                    over_stack.setdefault((result.setting, result.classifier), {})[group] = over[0]
                lowest.append(arm.params["strength"] == METHODS[arm.method].trials[0]["strength"])
                for what, gain in zip(OVER, over, strict=True):
                    if gain is not None:
                        gains.setdefault(f"{group}: {what}", []).append(gain)
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
    yield from pixel_modes(results, gains, over_stack)
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
        if name == f"adversarial {RECIPE:g}, fixed: over that stack":
            brief = [f"mean of {len(found)} comparisons", mean.text(2, sign=True)]
            rows = [brief, ["comparisons clear of zero", str(clear)], ["clear after Holm's correction", str(corrected)]]
            noise = gains["noise 0.5, fixed: over that stack"]
            gain = interval(found.mean for found in noise).text(2, sign=True)
            rows.append([f"`Noise(strength=0.5)`, mean of {len(noise)}", gain])
            head = "comparison | gain in points (± over comparisons, which share data sets)"
            yield "moves in brief", table(head, rows)
    head = "comparison | rows | mean above zero | interval above zero | after Holm's correction | mean over rows"
    yield "verdicts", table(head, lines)
    kinds = ("unlabelled images", "other images", "pixels")
    lines = [
        [f"`{setting}`", classifier, *(bold(over.get(kind)) or "not measured" for kind in kinds)]
        for (setting, classifier), over in over_stack.items()
        if any(over[kind].clear for kind in kinds if kind in over)
    ]
    head = "setting | classifier | flow of unlabelled images | flow of other images | pixels' modes"
    yield "clear gains", table(head, sorted(lines, key=naturally))


def pixel_modes(
    results: list[Result],
    gains: dict[str, list[Interval]],
    over_stack: dict[tuple[str, str], dict[str, Interval]],
) -> Named:
    """Moves along the modes of the pixels: tuned, and the fixed moves that the pages advise."""
    lines, strengths, shorter = [], [], []
    fixed = {name: f"{name} {params['strength']:g}" for name, params in RECIPES.items()}
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
        over_stack.setdefault((result.setting, result.classifier), {})["pixels"] = gain
        strengths.append(arm.params["strength"])
        advised = {name: result.advised(name) for name in RECIPES}
        for name, found in advised.items():
            if found is not None:
                over_stack[result.setting, result.classifier][name] = found
                gains.setdefault(f"{fixed[name]}, fixed: over that stack", []).append(found)
        lines.append(
            [f"`{result.setting}`", result.classifier, stack_text(result, strongest, arm.accuracies),
             f"{arm.mean.mean:.1f} %",
             bold(gain), *(bold(found) or "not measured" for found in advised.values()), str(gain.seeds)]
        )  # fmt: skip
    yield "pixels: a shorter move is better on validation images", f"{sum(shorter)} of {len(shorter)}"
    yield "pixels: at the lowest strength", f"{strengths.count(RECIPE)} of {len(strengths)}"
    head = "setting | classifier | best other stack | pixels' modes, adversarial | over that stack"
    head = " | ".join([head, *fixed.values(), "seeds"])
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
        gain = [bold(paired_gain(arm.accuracies, values)) if arm else "" for values in (hog, spread)]
        means = [interval(100 * v for v in values.values()).text() for values in (hog, spread)]
        sides = [f"{side.over(hog).text()} %" if side else "" for side in (strongest, control, arm)]
        seeds = str(len(hog))
        lines.append([f"`{result.setting}`", *(f"{mean} %" for mean in means), *sides, *gain, seeds])
    head = "setting | HOG + ridge | label spreading | cnn, best other stack | cnn, pixels' modes | cnn, flow"
    lines.sort(key=naturally)
    yield "no network", table(f"{head} | flow over HOG + ridge | flow over label spreading | seeds", lines)
