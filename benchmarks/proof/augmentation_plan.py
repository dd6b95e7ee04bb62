"""Which cells there are: tuning first, and what follows from it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.proof.augmentation_data import Flows
from benchmarks.proof.augmentation_settings import (
    FINALISTS,
    METHODS,
    PLAIN,
    REUSE,
    TUNING_SEED,
    TUNING_SEEDS,
    WHOLE_LATENT,
    Setting,
)
from benchmarks.proof.augmentation_store import Store

Component = tuple[str, dict[str, Any]]
# Seconds for an image on one core, where nothing has been measured yet.
_CLASSIFIER = {"cnn": 5e-4, "resnet": 1.3e-3}
_DECODE = 3e-3


@dataclass(frozen=True)
class Cell:
    """One classifier to train.

    Attributes:
        stage: singles, pairs, ours or final.
        side: opponent, ours or control.
        flow: "none" of opponents, "identity" of controls.
        method, params: what is tested; base: the components under it.
    """

    stage: str
    setting: Setting
    classifier: str
    side: str
    flow: str
    method: str
    params: dict[str, Any]
    base: tuple[Component, ...]
    seed: int

    @property
    def stack(self) -> tuple[Component, ...]:
        own = () if self.method == "opponent" else ((self.method, self.params),)
        return (*self.base, *own)

    @property
    def key(self) -> str:
        """A name, for people and for ``--cells``."""
        # The flow of ours and of controls has a place of its own.
        values = ",".join(f"{k}={v}" for k, v in self.params.items() if k != "flow" or self.side == "opponent")
        under = "+".join(name for name, _ in self.base)
        where = f"{self.setting.name}/{self.classifier}/{self.stage}/{self.side}/{self.flow}"
        return f"{where}/{under}+{self.method}({values})/{self.seed}"

    def row(self) -> dict[str, Any]:
        return {
            "setting": self.setting.name,
            "classifier": self.classifier,
            "stage": self.stage,
            "side": self.side,
            "flow": self.flow,
            "method": self.method,
            "params": self.params,
            "base": [[name, params] for name, params in self.base],
            "seed": self.seed,
        }


class Plan:
    """The cells of a setting and classifier, as far as what has been measured determines them.

    Args:
        args: ``opponents``, ``methods``, ``trials``, ``tuning_seeds``, ``best``, ``seeds``, ``leaking``, ``through``.
        flows: tells which ones can be used.
    """

    def __init__(self, args: Any, flows: Flows) -> None:
        self.args, self.flows = args, flows

    def cells(self, setting: Setting, classifier: str, store: Store) -> list[Cell]:
        """All cells known so far, in the order in which to run them."""
        singles = self.singles(setting, classifier)
        cells = [*singles, *self.again(singles, store)]
        best_single = self.best(singles, store)
        # Not before every opponent has been measured: a flow that one of them needs may not be there yet.
        if best_single is None or not self.available(setting):
            return cells
        pairs = self.pairs(best_single, singles, store)
        cells += [*pairs, *(cell for cell in self.again([*singles, *pairs], store) if cell not in cells)]
        opponent = self.best([*singles, *pairs], store)
        if opponent is None:
            return cells
        base = opponent.stack
        ours = self.ours(setting, classifier, base)
        cells += ours
        for flow, method in dict.fromkeys((cell.flow, cell.method) for cell in ours):
            cells += self.again([c for c in ours if (c.flow, c.method) == (flow, method)], store)
        if not all(store.has(c) for c in cells):
            return cells
        return cells + self.final(setting, classifier, base, ours, store)

    # ---- stages ----------------------------------------------------------------------------------------------------

    def available(self, setting: Setting) -> list[str]:
        names = (*setting.proof, *(setting.leaking if self.args.leaking else ()))
        wanted = self.args.through or names
        return [name for name in names if name in wanted and self.flows.missing(name, setting) is None]

    def lacks(self, cell: Cell) -> bool:
        """Whether a cell can't run yet, because a flow that it takes is not there."""
        names = [params["flow"] for _, params in cell.stack if "flow" in params]
        return any(self.flows.missing(name, cell.setting) is not None for name in names)

    def singles(self, setting: Setting, classifier: str) -> list[Cell]:
        result = []
        # Through every flow that counts as proof: what one adds without a choice of direction is an opponent's, too.
        counting = [flow for flow in self.available(setting) if flow in setting.proof]
        flows = [{"flow": flow} for flow in dict.fromkeys((*setting.proof[:1], *counting))]
        for name in (name for name in self.args.opponents if fits(name, setting)):
            base = () if name in ("none", setting.plain) else plain(setting)
            where = ("singles", setting, classifier, "opponent", "none", name)
            trials = METHODS[name].trials[: self.args.trials]
            for flow in flows if METHODS[name].flow else [{}]:
                result += [Cell(*where, {**params, **flow}, base, TUNING_SEED) for params in trials]
        return result

    def pairs(self, best: Cell, singles: list[Cell], store: Store) -> list[Cell]:
        """The best single with each other method at its best; none where that is crop + flip alone."""
        if best.method in ("none", best.setting.plain):
            return []
        result = []
        for name in dict.fromkeys(cell.method for cell in singles):
            if name in ("none", best.setting.plain, best.method):
                continue
            own = self.leading([cell for cell in singles if cell.method == name], store)[0]
            where = ("pairs", best.setting, best.classifier, "opponent", "none")
            result.append(Cell(*where, name, own.params, best.stack, best.seed))
        return result

    def ours(self, setting: Setting, classifier: str, base: tuple[Component, ...]) -> list[Cell]:
        result = []
        for flow in ("identity", *self.available(setting)):
            side = "control" if flow == "identity" else "ours"
            for name in (name for name in self.args.methods if fits(name, setting)):
                for params in METHODS[name].trials[: self.args.trials]:
                    params = {**params, "flow": flow}
                    result.append(Cell("ours", setting, classifier, side, flow, name, params, base, TUNING_SEED))
        return result

    def final(
        self, setting: Setting, classifier: str, base: tuple[Component, ...], ours: list[Cell], store: Store
    ) -> list[Cell]:
        """Per flow the ``best`` methods by validation; the control of each of these, and its own best method."""
        flows = list(dict.fromkeys(cell.flow for cell in ours if cell.flow != "identity"))
        methods = [name for name in self.args.methods if fits(name, setting)]
        tuned = {
            (flow, name): self.best([c for c in ours if c.flow == flow and c.method == name], store)
            for flow in ("identity", *flows)
            for name in methods
        }

        def ranked(flow: str) -> list[str]:
            return sorted(methods, key=lambda name: -self.value(tuned[flow, name], store))

        arms: list[tuple[str, str, Cell]] = []
        for flow in flows:
            arms += [("ours", flow, tuned[flow, name]) for name in ranked(flow)[: self.args.best]]
        wanted = [cell.method for _, _, cell in arms] + ranked("identity")[:1]
        arms += [("control", "identity", tuned["identity", name]) for name in dict.fromkeys(wanted)]
        leaks = set(flows) & set(setting.leaking)
        result = []
        for seed in self.args.seeds:
            if leaks:
                params = METHODS["distill"].trials[0]
                result.append(Cell("final", setting, classifier, "teacher", "none", "distill", params, base, seed))
            if base != plain(setting):
                result.append(Cell("final", setting, classifier, "opponent", "none", setting.plain, {}, (), seed))
            result.append(Cell("final", setting, classifier, "opponent", "none", "opponent", {}, base, seed))
            for side, flow, cell in arms:
                result.append(Cell("final", setting, classifier, side, flow, cell.method, cell.params, base, seed))
        return result

    # ---- what was measured -----------------------------------------------------------------------------------------

    def value(self, cell: Cell, store: Store) -> float:
        """The mean validation accuracy over the tuning seeds measured so far."""
        seeds = TUNING_SEEDS[: self.args.tuning_seeds]
        rows = [row for seed in seeds if (row := store.find(replace(cell, seed=seed))) is not None]
        return statistics.mean(row["val_accuracy"] for row in rows)

    def leading(self, cells: list[Cell], store: Store) -> list[Cell]:
        """The few best by the first tuning seed, best first and the first of equals; none until all are measured."""
        rows = [row for cell in cells if (row := store.find(cell)) is not None]
        if len(rows) < len(cells):
            return []
        order = sorted(range(len(cells)), key=lambda index: -rows[index]["val_accuracy"])
        return [cells[index] for index in order[:FINALISTS]]

    def again(self, cells: list[Cell], store: Store) -> list[Cell]:
        """The leading ones with the other tuning seeds."""
        seeds = TUNING_SEEDS[1 : self.args.tuning_seeds]
        return [replace(cell, seed=seed) for cell in self.leading(cells, store) for seed in seeds]

    def best(self, cells: list[Cell], store: Store) -> Cell | None:
        """Of the leading ones the one with the best mean, the first of equals; None until all are measured."""
        leading = self.leading(cells, store)
        if not leading or not all(store.has(cell) for cell in self.again(cells, store)):
            return None
        return max(leading, key=lambda cell: self.value(cell, store))

    # ---- time ------------------------------------------------------------------------------------------------------

    def estimate(self, cell: Cell, store: Store) -> float:
        """Seconds: the median of cells alike, else a guess."""
        rows = store.rows(final=False) + store.rows(final=True)
        alike = [
            row["cell_seconds"]
            for row in rows
            if (row["setting"], row["classifier"], row["method"], row["flow"] == "identity")
            == (cell.setting.name, cell.classifier, cell.method, cell.flow == "identity")
            and (row["stage"] == "final") == (cell.stage == "final")
        ]
        if alike:
            return statistics.median(alike)
        images = cell.setting.steps[cell.classifier] * cell.setting.batch
        area = (cell.setting.size / 32) ** 2
        cost = images * area * _CLASSIFIER[cell.classifier] + 2 + 5 * (cell.stage == "final")
        for name, params in cell.stack:
            if METHODS[name].flow and params.get("flow") != "identity":
                cost += 5 + images * params["p"] / REUSE * _DECODE * (7 if "adversarial" in name else 1)
        return cost

    def later(self, setting: Setting, classifier: str, store: Store) -> tuple[int, float]:
        """How many cells will follow on the known ones, and seconds for them."""
        known = {cell.stage for cell in self.cells(setting, classifier, store)}
        following: list[Cell] = []
        singles = self.singles(setting, classifier)
        if "ours" not in known and "pairs" not in known:
            following += singles[: max(0, len(self.args.opponents) - 3)]
        ours = self.ours(setting, classifier, plain(setting))
        if "ours" not in known:
            following += ours
        if "final" not in known:
            first = [cell for cell in ours if cell.params["flow"] != "identity"] or ours
            arms = 2 + 2 * self.args.best * max(1, len(self.available(setting))) + 1
            following += first[:1] * (arms * len(self.args.seeds))
        return len(following), sum(self.estimate(cell, store) for cell in following)


def plain(setting: Setting) -> tuple[Component, ...]:
    """The stack of crop + flip alone, or crop."""
    return ((setting.plain, {}),)


def fits(method: str, setting: Setting) -> bool:
    """Whether a method makes sense in a setting."""
    if method == "natural":
        return setting.imbalance != 1.0
    if method in PLAIN:
        return method == setting.plain
    return method not in WHOLE_LATENT or setting.flow_size in (None, setting.size)


def params_text(params: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in params.items() if k != "flow"}, sort_keys=True)[1:-1].replace('"', "")
