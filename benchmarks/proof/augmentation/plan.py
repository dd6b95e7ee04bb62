"""The plan of `augmentation/run.py`: tuning cells, the final cells that follow, and the rows of finished cells."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.proof.augmentation.data import Flows
from benchmarks.proof.augmentation.settings import (
    FINALISTS,
    METHODS,
    MOVES,
    PLAIN,
    PROTOCOL,
    RECIPES,
    TUNING_SEED,
    TUNING_SEEDS,
    Setting,
)
from glem_augment.io import write_json

Component = tuple[str, dict[str, Any]]
FINAL, TUNING = "augmentation.json", "augmentation_tuning.json"
ON_TEST = ("final", "recipe", "moves", "longer")  # stages of test images
# Two rows with equal values of these columns are the same cell. Files are sorted by these columns, too.
IDENTITY = ("stage", "setting", "classifier", "flow", "method", "params", "base", "seed", "protocol")


@dataclass(frozen=True)
class Cell:
    """One classifier to train.

    Attributes:
        stage: singles, pairs, triples, ours, final, recipe, moves or longer.
        side: opponent, ours or control.
        flow: "none" of opponents, "identity" of controls.
        method, params: the tested method; base: the components under it.
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
        """A readable name, also for `--cells`."""
        # The flow of ours and of controls has a separate column.
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


class Store:
    """Two JSON lists of rows in `folder`: rows of tuning cells, and rows of final cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows = {name: self._read(folder / name) for name in (FINAL, TUNING)}

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return {identity(row): row for row in rows if row["protocol"] == PROTOCOL}

    def rows(self, final: bool) -> list[dict[str, Any]]:
        return list(self._rows[FINAL if final else TUNING].values())

    def find(self, cell: Cell) -> dict[str, Any] | None:
        name = FINAL if cell.stage in ON_TEST else TUNING
        return self._rows[name].get(identity({**cell.row(), "protocol": PROTOCOL}))

    def has(self, cell: Cell) -> bool:
        return self.find(cell) is not None

    def add(self, row: dict[str, Any]) -> None:
        name = FINAL if row["stage"] in ON_TEST else TUNING
        self._rows[name].pop(identity(row), None)
        self._rows[name][identity(row)] = row
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / name, list(self._rows[name].values()))


def identity(row: dict[str, Any]) -> str:
    return json.dumps([row[key] for key in IDENTITY], sort_keys=True)


class Plan:
    """The cells of a setting and classifier that follow from the measured rows.

    Args:
        args: `opponents`, `methods`, `trials`, `tuning_seeds`, `best`, `seeds`, `leaking`, `through`, `beside`.
        flows: tells which flows can be used.
    """

    def __init__(self, args: Any, flows: Flows) -> None:
        self.args, self.flows = args, flows

    def cells(self, setting: Setting, classifier: str, store: Store) -> list[Cell]:
        """All cells known so far, in the order in which to run them."""
        singles = self.singles(setting, classifier)
        if self.args.beside:
            return self.beside(singles, store)
        cells = [*singles, *self.again(singles, store)]
        best_single = self.best(singles, store)
        # Only after every opponent has been measured: a flow that an opponent needs may be missing.
        if best_single is None or not self.available(setting):
            return cells
        pairs = self.with_another("pairs", best_single, singles, store)
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
        """Whether a cell can't run yet, because one of its flows is missing."""
        names = [params["flow"] for _, params in cell.stack if "flow" in params]
        return any(self.flows.missing(name, cell.setting) is not None for name in names)

    def singles(self, setting: Setting, classifier: str) -> list[Cell]:
        result = []
        # An opponent that needs a flow runs through every flow that counts as proof.
        counting = [flow for flow in self.available(setting) if flow in setting.proof]
        flows = [{"flow": flow} for flow in dict.fromkeys((*setting.proof[:1], *counting))]
        for name in (name for name in self.args.opponents if fits(name, setting)):
            base = () if name in ("none", setting.plain) else plain(setting)
            where = ("singles", setting, classifier, "opponent", "none", name)
            trials = METHODS[name].trials[: self.args.trials]
            for flow in flows if METHODS[name].flow else [{}]:
                result += [Cell(*where, {**params, **flow}, base, TUNING_SEED) for params in trials]
        return result

    def with_another(self, stage: str, best: Cell, singles: list[Cell], store: Store) -> list[Cell]:
        """The best stack plus each further method at its best value; none if the best stack is crop + flip alone."""
        there = {"none", best.setting.plain, *(name for name, _ in best.stack)}
        if best.method in ("none", best.setting.plain):
            return []
        result = []
        for name in dict.fromkeys(cell.method for cell in singles if cell.method not in there):
            own = self.leading([cell for cell in singles if cell.method == name], store)[0]
            where = (stage, best.setting, best.classifier, "opponent", "none")
            result.append(Cell(*where, name, own.params, best.stack, best.seed))
        return result

    def beside(self, singles: list[Cell], store: Store) -> list[Cell]:
        """Further cells after the test: a third operation of opponents, a shorter move of ours, the advised moves."""
        setting, classifier = singles[0].setting, singles[0].classifier
        here = {"setting": setting.name, "classifier": classifier, "method": "opponent"}
        final = [row for row in store.rows(final=True) if row["stage"] == "final" and here.items() <= row.items()]
        if not final:
            return []
        base = tuple((name, params) for name, params in final[-1]["base"])
        if self.args.beside == "recipe":
            return self.recipe(setting, classifier, base, store)
        if self.args.beside == "longer":
            if needs_flow(base):  # as in `recipe`
                base = self.without_flow(setting, classifier, store)
            opponent = Cell("longer", setting, classifier, "opponent", "none", "opponent", {}, base, 0)
            return [replace(opponent, seed=seed) for seed in self.args.seeds]
        if self.args.beside == "moves":
            return self.moves(setting, classifier, base)
        where = setting, classifier, "opponent", "none"
        if self.args.beside == "shorter":
            lowest = {**METHODS["adversarial"].trials[0], "flow": "identity"}
            shorter = {**lowest, "strength": lowest["strength"] / 2}
            where = setting, classifier, "control", "identity"
            return [Cell("ours", *where, "adversarial", shorter, base, TUNING_SEED)]
        if len(base) < 3:  # crop + flip alone, or one operation that was better than all pairs
            return []
        pair = Cell("pairs", *where, *base[-1], base[:-1], TUNING_SEED)
        cells = self.with_another("triples", pair, singles, store)
        best, again = self.best(cells, store), self.again(cells, store)
        if best is None or self.value(best, store) <= self.value(pair, store):
            return cells + again
        final = [row for row in final if row["base"] == final[-1]["base"]]
        return [*cells, *again, *(replace(best, stage="final", seed=row["seed"]) for row in final)]

    def recipe(self, setting: Setting, classifier: str, base: tuple[Component, ...], store: Store) -> list[Cell]:
        """The moves that the pages advise, where the choices left them out, and the opponent again beside them.

        The opponent is measured again, since accuracies differ a little between processors. Where it needs a flow, the
        best stack without a flow takes its place, since whoever moves images along modes of pixels has no flow.
        """
        where = setting, classifier, "control", "identity"
        moves = [Cell("final", *where, method, params, base, self.args.seeds[0]) for method, params in RECIPES.items()]
        missing = [cell for cell in moves if not store.has(cell)]
        if not missing:
            return []
        if needs_flow(base):
            base = self.without_flow(setting, classifier, store)
            missing = [replace(cell, base=base) for cell in missing]
        opponent = Cell("final", setting, classifier, "opponent", "none", "opponent", {}, base, self.args.seeds[0])
        return [replace(cell, stage="recipe", seed=seed) for seed in self.args.seeds for cell in (opponent, *missing)]

    def moves(self, setting: Setting, classifier: str, base: tuple[Component, ...]) -> list[Cell]:
        """Moves through the flows of `through`, the same moves of pixels, and the opponent, measured together."""
        arms: list[tuple[str, str, str, dict[str, Any]]] = [("opponent", "none", "opponent", {})]
        for flow in ("identity", *(self.args.through or ())):
            side = "control" if flow == "identity" else "ours"
            arms += [(side, flow, method, {**params, "flow": flow}) for method, params in MOVES.items()]
        return [Cell("moves", setting, classifier, *arm, base, seed) for seed in self.args.seeds for arm in arms]

    def without_flow(self, setting: Setting, classifier: str, store: Store) -> tuple[Component, ...]:
        """The opponent's stack without a flow that was measured with most tuning seeds, and then has the best mean."""
        values: dict[str, list[float]] = {}
        for row in store.rows(final=False):
            stack = [*row["base"], [row["method"], row["params"]]]
            here = row["setting"], row["classifier"], row["side"]
            if here == (setting.name, classifier, "opponent") and not needs_flow(stack):
                values.setdefault(json.dumps(stack), []).append(row["val_accuracy"])
        best = max(values, key=lambda key: (len(values[key]), statistics.mean(values[key])))
        return tuple((name, params) for name, params in json.loads(best))

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
        """Per flow, the `best` methods by validation with their controls; also the best method of the control."""
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
        result = []
        for seed in self.args.seeds:
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
        """The `FINALISTS` best cells by the first tuning seed, best first; none until all are measured."""
        rows = [row for cell in cells if (row := store.find(cell)) is not None]
        if len(rows) < len(cells):
            return []
        order = sorted(range(len(cells)), key=lambda index: -rows[index]["val_accuracy"])
        return [cells[index] for index in order[:FINALISTS]]

    def again(self, cells: list[Cell], store: Store) -> list[Cell]:
        """The leading cells with the further tuning seeds."""
        seeds = TUNING_SEEDS[1 : self.args.tuning_seeds]
        return [replace(cell, seed=seed) for cell in self.leading(cells, store) for seed in seeds]

    def best(self, cells: list[Cell], store: Store) -> Cell | None:
        """The leading cell with the best mean over tuning seeds; None until all are measured."""
        leading = self.leading(cells, store)
        if not leading or not all(store.has(cell) for cell in self.again(cells, store)):
            return None
        return max(leading, key=lambda cell: self.value(cell, store))

    def estimate(self, cell: Cell, store: Store) -> float | None:
        """Median seconds of similar cells; None if there are none."""
        keys = ("setting", "classifier", "method")
        wanted = cell.row()
        rows = store.rows(final=cell.stage in ON_TEST)
        alike = [
            row["cell_seconds"]
            for row in rows
            if all(row[key] == wanted[key] for key in keys) and (row["side"] == "ours") == (cell.side == "ours")
        ]
        return statistics.median(alike) if alike else None


def plain(setting: Setting) -> tuple[Component, ...]:
    """The stack of crop + flip alone, or crop."""
    return ((setting.plain, {}),)


def fits(method: str, setting: Setting) -> bool:
    """Whether a method makes sense in a setting."""
    if method == "natural":
        return setting.imbalance != 1.0
    if method in PLAIN:
        return method == setting.plain
    # The method moves latents of the classifier's images, so the flow must have the same size.
    return method != "latent-noise" or setting.flow_size in (None, setting.size)


def needs_flow(stack: Iterable[Any]) -> bool:
    """Whether a component, with its method and parameters, moves images through a flow."""
    return any("flow" in params for _, params in stack)


def params_text(params: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in params.items() if k != "flow"}, sort_keys=True)[1:-1].replace('"', "")
