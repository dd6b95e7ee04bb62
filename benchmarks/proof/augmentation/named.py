"""The numbers of the pages that come from the stored rows of `augmentation/run.py`, with names."""

from __future__ import annotations

import itertools
import re
import statistics
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
    gains: dict[str, list[tuple[str, Interval]]] = {}  # with the data set
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
                        gains.setdefault(f"{group}: {what}", []).append((SETTINGS[result.setting].data, gain))
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
    yield from first_places(results)
    yield "flows: at the lowest strength", f"{sum(lowest)} of {len(lowest)}"
    yield from pixel_modes(results, gains, over_stack)
    yield from without_network(results, others)
    yield from verdicts(gains)
    yield from directions(results)
    yield from pretrained_and_longer(results)
    kinds = ("unlabelled images", "other images", "pixels")
    lines = [
        [f"`{setting}`", classifier, *(bold(over.get(kind)) or "not measured" for kind in kinds)]
        for (setting, classifier), over in over_stack.items()
        if any(over[kind].clear for kind in kinds if kind in over)
    ]
    head = "setting | classifier | flow of unlabelled images | flow of other images | pixels' modes"
    yield "clear gains", table(head, sorted(lines, key=naturally))


def first_places(results: list[Result]) -> Named:
    """How often validation images put a move first, of the settings and flows in which it was tried."""
    first: dict[str, list[bool]] = {"adversarial": [], "mode-mixup": []}
    for result in results:
        rows = [row for row in result.tuning if row["stage"] == "ours" and row["base"] == result.base]
        for flow in dict.fromkeys(row["flow"] for row in rows):
            values: dict[tuple[str, str], list[float]] = {}
            for row in rows:
                if row["flow"] == flow:
                    key = row["method"].removesuffix("-shared"), str([row["method"], row["params"]])
                    values.setdefault(key, []).append(row["val_accuracy"])
            most = max(map(len, values.values()))  # the best trials have more tuning seeds
            best = max((k for k in values if len(values[k]) == most), key=lambda k: statistics.mean(values[k]))
            tried = {method for method, _ in values}
            for move, found in first.items():
                found += [best[0] == move] if move in tried and len(tried) > 1 else []  # alone, a move comes first
    for move, found in first.items():
        yield f"first on validation images: {move}", f"{sum(found)} of {len(found)}"


def verdicts(gains: dict[str, list[tuple[str, Interval]]]) -> Named:
    """Counts and means of each family of comparisons, and the correction over all families."""
    advised = f"adversarial {RECIPE:g}, fixed: over that stack"
    lines = []
    for name, pairs in {**gains, "all of these": list(itertools.chain(*gains.values()))}.items():
        found = [gain for _, gain in pairs]
        chances = holm([gain.chance for gain in found])
        counts = {
            "rows": len(found),
            "positive": sum(gain.mean > 0 for gain in found),
            "clear": sum(gain.clear for gain in found),
            "clear after Holm": sum(p < 0.05 and gain.mean > 0 for p, gain in zip(chances, found, strict=True)),
        }
        for what, count in counts.items():
            yield f"{name}: {what}", str(count)
        if name not in gains:
            lines.append([f"**{name}**", *map(str, counts.values()), "", ""])
            continue
        by_data: dict[str, list[float]] = {}
        for data, gain in pairs:
            by_data.setdefault(data, []).append(gain.mean)
        over_data = interval(map(statistics.mean, by_data.values()))
        means = interval(gain.mean for gain in found), over_data
        for over, mean in zip(("mean", "mean over data sets"), means, strict=True):
            yield f"{name}: {over}", mean.text(2, sign=True)
        texts = [mean.text(2, sign=True) if mean.seeds > 1 else "" for mean in means]
        lines.append([name, *map(str, counts.values()), *texts])
        if name == advised:
            much = "Not clearly" if not over_data.clear else "A little" if over_data.mean < 1 else "Clearly"
            yield (
                "moves: verdict",
                f"{much}, in {'few' if counts['clear after Holm'] < len(found) / 4 else 'many'} settings",
            )
            brief = {
                f"mean over {len(by_data)} data sets ({len(found)} comparisons)": texts[1],
                "comparisons clear of zero": str(counts["clear"]),
                "clear after Holm's correction": str(counts["clear after Holm"]),
            }
        if name == "noise 0.5, fixed: over that stack":
            brief[f"`Noise(strength=0.5)`, mean over {len(by_data)} data sets"] = texts[1]
            yield "moves in brief", table("comparison | gain in points (± over data sets)", map(list, brief.items()))
    head = "comparison | rows | mean above zero | interval above zero | after Holm's correction | mean over rows"
    yield "verdicts", table(f"{head} | mean over data sets", lines)


def directions(results: list[Result]) -> Named:
    """Adversarial moves along the modes of the class's pixels over the same along pooled modes, each as tuned."""
    lines, gains = [], []
    for result in results:
        arms = {arm.method: arm for arm in result.arms if arm.side == "control"}
        own, pooled = arms.get("adversarial"), arms.get("adversarial-shared")
        if own and pooled and (gain := paired_gain(own.accuracies, pooled.accuracies)):
            gains.append(gain)
            sides = [f"{arm.mean.mean:.1f} % ({arm.params['strength']:g})" for arm in (own, pooled)]
            line = [f"`{result.setting}`", result.classifier, *sides, signed(gain, 2), str(gain.seeds)]
            lines.append(line)
    head = "setting | classifier | class's modes (strength) | pooled modes (strength) | class's over pooled | seeds"
    yield "adversarial class and pooled", table(head, sorted(lines, key=naturally))
    yield "adversarial class and pooled: above", f"{sum(gain.clear for gain in gains)} of {len(gains)}"
    below = sum(gain.mean + gain.half < 0 for gain in gains)
    yield "adversarial class and pooled: below", f"{below} of {len(gains)}"


def pretrained_and_longer(results: list[Result]) -> Named:
    """Moves through a pretrained flow beside the same moves of pixels; fixed moves beside a longer training."""
    lines = []
    for result in results:
        stack = next((arm for arm in result.moves if arm.side == "opponent"), None)
        for arm in (arm for arm in result.moves if arm.flow not in ("none", "identity")):
            same = next(a for a in result.moves if (a.flow, a.method) == ("identity", arm.method))
            pairs = [(arm, stack), (same, stack), (arm, same)]
            gains = [bold(paired_gain(a.accuracies, b.accuracies)) for a, b in pairs if b]
            name, times = arm.params["policy"], f"{arm.step / stack.step:.1f}" if stack else ""
            lines.append([f"`{result.setting}`", name, *gains, times, str(len(arm.accuracies))])
    head = "setting | move | flow's modes | pixels' modes | flow's over pixels' | times a step, flow | seeds"
    yield "moves through a pretrained flow", table(head, sorted(lines, key=naturally))
    lines, found = [], []
    for result in results:
        for longer in result.longer:
            arms = [*result.recipe, *result.arms]
            once = next(a for a in arms if a.side == "opponent" and a.stack == longer.stack)
            moved = next(a for a in arms if (a.method, a.params) == ("adversarial", RECIPES["adversarial"]))
            seeds = longer.accuracies
            means = [f"{each.over(seeds).mean:.1f} %" for each in (once, longer, moved)]
            if gain := paired_gain(moved.accuracies, seeds):
                found.append(gain)
                lines.append([f"`{result.setting}`", base_text(longer.stack), *means, bold(gain), str(len(seeds))])
    head = "setting | best other stack | its accuracy | with 1.4 times the steps | with moves | moves over more steps"
    yield "more steps", table(f"{head} | seeds", sorted(lines, key=naturally))
    yield "more steps: clear", f"{sum(gain.clear for gain in found)} of {len(found)}"
    yield "more steps: below", f"{sum(gain.mean < 0 for gain in found)} of {len(found)}"


def pixel_modes(
    results: list[Result],
    gains: dict[str, list[tuple[str, Interval]]],
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
        data = SETTINGS[result.setting].data
        gains.setdefault("pixels' modes: over that stack", []).append((data, gain))
        over_stack.setdefault((result.setting, result.classifier), {})["pixels"] = gain
        strengths.append(arm.params["strength"])
        advised = {name: result.advised(name) for name in RECIPES}
        for name, found in advised.items():
            if found is not None:
                over_stack[result.setting, result.classifier][name] = found
                gains.setdefault(f"{fixed[name]}, fixed: over that stack", []).append((data, found))
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
        yield f"times as long, at most: {side}", f"{max(times):.1f}"
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
