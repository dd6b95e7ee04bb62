"""Write the numbers of the documentation from the stored results.

    python benchmarks/write_numbers.py            # writes them; so does `make numbers`
    python benchmarks/write_numbers.py --check    # exit status 1 if a page and the results differ
    python benchmarks/write_numbers.py --list     # every name and its text

In a page, a number stands between `<!-- number: NAME -->` and `<!-- /number -->`, and a table between
`<!-- table: NAME -->` and `<!-- /table -->`. Names come from the stored rows, so every stored number has a name.

Tables in `benchmarks/results` that follow from stored rows are made again as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository

from benchmarks.common import RESULTS, ROOT, Interval, Named, by_seed, holm, interval, markdown, over_seeds, table
from benchmarks.paper.claims import verdicts
from benchmarks.paper.paper import stored_page
from benchmarks.proof import directions, long_tails, no_network, pretrained
from benchmarks.proof import photographs as photos
from benchmarks.proof import private as private_sets
from benchmarks.proof.augmentation.named import bold
from benchmarks.proof.augmentation.named import numbers as augmentation
from benchmarks.proof.augmentation.plan import Store
from benchmarks.proof.augmentation.report import page as augmentation_page
from benchmarks.proof.augmentation.report import results_of
from benchmarks.proof.private import report as private_page
from benchmarks.proof.private import summary as private_rows
from benchmarks.proof.private_audit import report as audit_page
from benchmarks.proof.private_curve import report as curve_page
from benchmarks.proof.private_opponents import report as opponents_page
from benchmarks.proof.samples_alone import as_long, summary, worth
from benchmarks.proof.samples_alone import report as samples_page
from benchmarks.speed.backbones import summary as backbones
from benchmarks.speed.overhead import PER_IMAGE
from benchmarks.speed.speed import judged
from glem_augment import GLEM
from glem_augment.hub.cards import table_row
from glem_augment.io import atomic_write, json_text
from glem_augment.model.files import bundled_models


def photograph_page(name: str, record: dict[str, Any]) -> dict[str, Any]:
    return photos.page(name, record["cells"], stored("photographs")["cells"])


LATENT_OBJECTIVES = ("accuracy", "nats", "fitted accuracy", "fitted nats")
PAPER = (*(f"table{n}" for n in range(1, 9)), "pareto")
REPORTS: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    "augmentation": lambda _: augmentation_page(results_of(Store(RESULTS))),
    "directions": lambda rows: directions.page(rows, "noise"),
    "adversarial_directions": lambda rows: directions.page(rows, "adversarial"),
    "fine_tuned": pretrained.report,
    "long_tails": long_tails.report,
    **{name: partial(photograph_page, name) for name in photos.SETTINGS},
    "private": private_page,
    "private_audit": audit_page,
    "private_curve": curve_page,
    "private_opponents": opponents_page,
    "samples_alone": samples_page,
}


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def rebuilt(name: str, record: Any) -> Any:
    """A stored result with its rows made again from what was measured."""
    return {**record, **SUMMARIES[name](record)} if name in SUMMARIES else record


def in_words(found: set[Any]) -> str:
    """The size of a set, as a word up to twelve."""
    words = "no one two three four five six seven eight nine ten eleven twelve".split()
    return words[len(found)] if len(found) < len(words) else str(len(found))


SUMMARIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "backbones": lambda record: {"rows": backbones(record["cells"])},
    "no_network": lambda record: {"rows": no_network.summary(record["measured"])},
    "pretrained": lambda record: {"rows": over_seeds(record["measured"], "setting", "views", "strength")},
    "speed": lambda record: {"verdicts": [judged(row) for row in record["verdicts"]]},
}


def derived() -> dict[str, Callable[[], str]]:
    """The files in `benchmarks/results` that follow from stored rows, each with a function that makes its text."""
    folder = RESULTS / "paper"
    made = {f"paper/{name}.cpu.md": partial(lambda name: markdown(stored_page(folder, name)), name) for name in PAPER}
    made["paper/claims.json"] = lambda: json_text(verdicts(folder, "cpu")) + "\n"
    return made | {f"{name}.md": partial(markdown, report) for name, report in reports().items()}


def reports() -> dict[str, dict[str, Any]]:
    """The content of the page of each result that has a command."""
    names = [path.stem for path in sorted(RESULTS.glob("*.json"))]
    found = {name: REPORTS.get(name, partial(rebuilt, name))(stored(name)) for name in names}
    return {name: report for name, report in found.items() if isinstance(report, dict) and "command" in report}


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
    subsets = summary(stored("samples_alone"), False)
    for line in (line for line in subsets if line["method"] in ("bundled", "taef2")):
        data, setting = line["data"], line["setting"]
        yield (
            f"samples, {data}: {line['method']} {setting}, worth",
            worth(subsets, data, line["CNN-A"], as_long(setting)),
        )
    deep, flat = (
        found["fashion-mnist", method, setting, "CNN-A"]
        for method, setting in (("bundled", "rfcm T=0.85 parts=32"), ("identity", "rfcm T=1 parts=64"))
    )
    more = interval(deep[seed] - flat[seed] for seed in deep)
    yield "samples, fashion-mnist: 32 parts of the flow over 64 of the pixels", more.text(sign=True)
    yield "samples alone", table("data | trained on | setting | test accuracy | of real | seeds", lines)


def private() -> Named:
    """Classifiers trained on samples of private models."""
    usual = {"judged": "test", "temperature": 1.0}.items()
    lines = [n for n in private_rows(stored("private")) if usual <= n.items()]
    columns = sorted({line["epsilon"] for line in lines if line["epsilon"]})
    subsets = summary(stored("samples_alone"), False)
    names = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
    judges = {"taef2": "ResNet, decoded samples", "long": "ResNet, 60,000 samples, 30 epochs"}
    judges |= {"latents": "perceptron, samples' latents", "pixels": "ResNet, samples of pixels"}
    # What differs from the usual rows: delta, and the Gaussians of a class.
    variants = {"": (False, None), ", one Gaussian per class": (False, 1), ", δ = 1 / (n log n)": (True, None)}
    rows, controls, reals = [], [], {}
    for (data, shown), (kind, judge), words in itertools.product(names.items(), judges.items(), variants):
        wanted = data, kind, *variants[words]
        known = ((n, n["cells asked"] if n["epsilon"] or words else None) for n in lines)
        own = {n["epsilon"]: n for n, parts in known if (n["data"], n["method"], n["delta"] != 1e-5, parts) == wanted}
        cells = {e: f"{n['accuracy']:.1f} " + (f"± {n['+/-']:.1f}" if n["+/-"] else "(one)") for e, n in own.items()}
        if kind == "long":
            yield from ((f"private, {data}: long epsilon {e:g}", cell.split()[0]) for e, cell in cells.items())
        if own:
            controls.append([shown, judge + words, *(cells.get(e, "") for e in (*columns, 0))])
        if own and kind == "taef2" and not words:
            everything = {"data": data, "method": "real", "setting": ""}.items()
            real = next(line for line in subsets if everything <= line.items())
            reals["ResNet", data] = f"{real['CNN-A']:.1f}"
            rows.append([shown, *(cells.get(e, "") for e in columns), reals["ResNet", data]])
            count = [worth(subsets, data, own[e]["accuracy"]) if e in own else "" for e in columns]
            rows.append(["worth so many real images", *count, "all"])
        if own and kind == "latents" and not words:
            most = next(n["accuracy"] for n in lines if (n["data"], n["method"]) == (data, "real"))
            reals["perceptron", data] = f"{most:.1f}"
            rows.append(["perceptron on latents", *(cells.get(e, "") for e in columns), reals["perceptron", data]])
    epsilons = " | ".join(f"ε = {epsilon:g}" for epsilon in columns)
    yield "private controls", table(f"data | judge | {epsilons} | no privacy", controls)
    yield "private sets", table(f" | {epsilons} | real images", rows)
    curve: dict[str, dict[float, str]] = {}
    for n in curve_page(stored("private_curve"))["rows"]:
        half = f"± {n['+/-']:.1f}" if n["+/-"] else "(one)"
        cell = "refused" if n["accuracy"] is None else f"{n['accuracy']:.1f} {half}"
        name = f"{n['set']}, {n['per class']:,}" + ", all coordinates" * (n["coordinates"] == "all")
        curve.setdefault(name, {})[n["epsilon"]] = cell
    columns = sorted({e for own in curve.values() for e in own})
    epsilons = " | ".join(f"ε = {epsilon:g}" for epsilon in columns)
    cells = [[name, *(own.get(e, "") for e in columns)] for name, own in curve.items()]
    yield "private curve", table(f"images of each class | {epsilons}", cells)
    brief = []
    whole = {"fashion-mnist": ("ten kinds of clothes", "6,000"), "cifar10": ("CIFAR-10", "5,000")}
    for data, (name, most) in whole.items():
        shown = names[data]
        for size in ("300", "2,000", most):
            own = curve[f"{name}, {size}"]
            brief.append([shown, size, *(own.get(e, "") for e in columns), reals["perceptron", data]])
    head = f"samples of | images of each class | {epsilons} | all real images"
    yield "private sets in brief", table(head, brief)
    methods = {"probe": "a linear layer on the latents", "dp-sgd": "a small network with tanh, on images"}
    found = []
    for row in opponents_page(stored("private_opponents"))["rows"]:
        data, method, epsilon = row["data"], row["method"], f"{row['epsilon']:g}"
        accuracy = f"{row['accuracy']:.1f} ± {row['+/-']:.1f}"
        yield f"private_opponents, {data}: {method} epsilon {epsilon}", accuracy
        found += [[names[data], methods[method], epsilon, accuracy]] if method in methods else []
    yield "private classifiers", table("data | classifier | ε | accuracy", found)
    audit = stored("private_audit")
    for kind, name in (("ours", "trials"), ("ours, a fit", "fit trials")):
        trials = sorted({row["trials"] for row in audit if row["release"] == kind})
        yield f"private_audit: {name}", " to ".join(f"{count:,}" for count in trials)
    kinds = {"ours": "a release", "ours, a fit": "a fit", "ours, a model": "a model"}
    kinds["ours, noise halved: a deliberate mistake"] = "a release with half the noise"
    bounds = []
    for row in (row for row in audit if row["release"] in kinds):
        least = (f"{row[f'at least, {of}']:.2f}" for of in ("Gaussian", "any mechanism"))
        bounds.append([kinds[row["release"]], str(row["images"]), f"{row['claimed epsilon']:g}", *least])
    head = "attacked | images of a class | promised ε | at least, normal scores | at least, any scores"
    yield "private audit", table(head, bounds)


def photographs() -> Named:
    """Few photographs per class, with stacks chosen on other images."""
    chosen, compared = stored("photographs")["cells"], {}
    for name, setting in photos.SETTINGS.items():
        cells, lines = stored(name)["cells"], []
        found = photos.differences(name, cells, chosen, setting.seeds)
        first = photos.differences(name, cells, chosen, setting.first)
        for pair, gain in found.items():
            yield f"{name}: {pair}", gain.text(sign=True)
            yield f"{name}: {pair}, first {len(setting.first)} seeds", first[pair].text(sign=True)
        compared |= {
            (name, pair): gain for pair, gain in found.items() if tuple(pair.split(" over ")) in photos.COMPARED
        }
        for row in photos.page(name, cells, chosen)["rows"]:
            mean = Interval(row["accuracy"], row["+/-"], row["seeds"])
            gains = [
                found.get(f"{row['what'].split('; ')[0]} over {base}") for base in ("crop + flip", "best other stack")
            ]
            lines.append([row["what"], row["stack"], f"{mean.text()} %", *map(bold, gains), str(mean.seeds)])
        head = "what | stack | test accuracy | over crop + flip | over the best other stack | seeds"
        yield name, table(head, lines)
    chances = dict(zip(compared, holm([gain.chance for gain in compared.values()]), strict=True))
    clear = {key: chances[key] < 0.05 and gain.mean > 0 for key, gain in compared.items()}
    moves = ("moves on the best other stack over ColorJitter", "moves on crop + flip over ColorJitter")
    yield "photographs: differences", in_words(set(compared))
    yield "photographs: clear moves", which(clear[name, pair] for pair in moves for name in list(photos.SETTINGS)[:2])
    noise = [f"class noise over {base} noise" for base in ("pooled", "smooth")]
    yield "photographs: clear noise", which(clear["photographs", pair] for pair in noise)
    judged = {row["stack"] for row in chosen if row["seed"] == photos.TUNING} - {"crop + flip"}
    ours = {name for name in judged if "modes" in name}
    yield "photographs: other stacks", in_words(judged - ours)
    yield "photographs: trials of moves", in_words(ours)


def which(clear: Iterable[bool]) -> str:
    """Words for the differences that are clear."""
    found = list(clear)
    names = [name for name, one in zip(("first", "second", "third", "fourth"), found, strict=False) if one]
    if not names or len(names) == len(found):
        return "all are clear" if names else "none is clear"
    return f"only the {' and the '.join(names)} {'is' if len(names) == 1 else 'are'} clear"


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
    sizes = stored("latent_sizes")
    lines = [
        [f"{r['size']}x{r['size']}", str(r["seed"]), f"{r['parameters'] / 1e6:.2f} M",
         f"{100 * r['fitted accuracy']:.1f} %", f"{r['fitted ece']:.3f}"]
        for r in sizes
    ]  # fmt: skip
    yield "sizes", table("images | seed | parameters of the flow | NF accuracy | calibration error", lines)
    for file in ("latent_objectives", "latent_sizes", "latent_other_images", "latent_photographs"):
        option = file.removeprefix("latent").replace("_", "-")
        yield f"{file}: command", f"`python benchmarks/proof/latent_flows.py -{option}`"
    lines = [[r["fitted"], f"{100 * r['accuracy']:.1f} %", f"{r['nats']:.3f}"] for r in stored("latent_other_images")]
    yield "other images", table("fitted through | NF accuracy | nats per number", lines)
    lines = [[r["fitted"], *three_measures(r, "nats")] for r in stored("latent_photographs")]
    yield "flow of photographs", table(MEASURES, lines)
    lines = []
    for row in stored("latent_objectives"):
        flow = "`latent`" if row["parameters"] else "whitening alone"
        found = (f"{100 * row[k]:.1f} %" if "acc" in k else f"{row[k]:.3f}" for k in LATENT_OBJECTIVES)
        lines.append([flow, f"`{row['objective']}`", str(row["epochs"]), *found])
    for file, *about in (
        ("gaussians_cifar10", "no flow, four Gaussians per class", "", ""),
        ("bundled_cifar10", "`bundled:cifar10`", "`hybrid`", "20"),
    ):
        record = stored(file)
        lines.append([*about, "", "", f"{100 * record['accuracy']:.1f} %", f"{record['nats_per_number']:.3f}"])
    head = "flow | objective | epochs | NF accuracy | nats per number | with full covariances | nats per number"
    yield "latent objectives", table(head, lines)
    rows = stored("covariances")["rows"]
    columns = [name for name in rows[0] if name != "count"]
    cells = [["" if row[name] is None else str(row[name]) for name in columns] for row in rows]
    better = [
        max(value for name, value in row.items() if name.startswith("shrunk") and value is not None) - row["variances"]
        for row in rows
        if row["per dimension"] < 8
    ]
    yield "covariances: most with few images", f"{max(better):.1f}"
    yield "covariances", table(" | ".join(columns).replace("per dimension", "images per number"), cells)


MEASURES = "model | NF accuracy | nats per number | calibration error"


def three_measures(record: dict[str, Any], nats: str) -> list[str]:
    return [f"{100 * record['accuracy']:.1f} %", f"{record[nats]:.3f}", f"{record['ece']:.3f}"]


def single_files() -> Named:
    """Results of one file and one run."""
    for name in ("bundled_fashion-mnist", "bundled_cifar10", "gaussians_cifar10"):
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
    lines = []
    for name, what in (
        ("gaussians_cifar10", "four full Gaussians per class"),
        ("bundled_cifar10", "`bundled:cifar10`"),
    ):
        lines.append([what, *three_measures(stored(name), "nats_per_number")])
    yield "flow of latents", table(MEASURES, lines)
    share = {
        (f"{row['codec']}, {row['size']} px", row["policy"]): f"{percent:.{int(percent < 10)}f}"
        for row in stored("overhead")["rows"]
        if (percent := row["% of the step"]) is not None
    }
    policies = list(dict.fromkeys(policy for _, policy in share))
    lines = [[codec, *(share[codec, each] for each in policies)] for codec in dict.fromkeys(c for c, _ in share)]
    yield "costs", table(" | ".join(["modes of", *policies]), lines)
    each = {(row["side"], row["size"]): row for row in stored("overhead")[PER_IMAGE]}
    sizes = sorted({size for _, size in each})
    lines = [
        [side, *(f"{each[side, size][column]:.2f}" for size in sizes for column in ("ms", "of ColorJitter"))]
        for side in dict.fromkeys(side for side, _ in each)
    ]
    header = [f"{size} px: {column}" for size in sizes for column in ("ms", "of ColorJitter")]
    yield "costs per image", table(" | ".join(["", *header]), lines)
    for row in backbones(stored("backbones")["cells"]):
        for key, digits in (("bits/dim", 2), ("NF accuracy %", 1)):
            if row[key] != "diverged":
                yield f"backbones: {row['variant']}, {key}", f"{float(row[key].split()[0]):.{digits}f}"
    for row in stored("ranks")["rows"]:
        yield f"ranks: {row['job']}", f"{row['ratio']:.2f}"
        yield f"ranks: {row['job']}, communication", f"{100 * row['share of communication']:.0f}"


def models() -> Named:
    """The models in the package, from their files."""
    rows = [
        {"name": f"`bundled:{name}`", **table_row(GLEM.from_pretrained(f"bundled:{name}"))} for name in bundled_models()
    ]
    for row in rows:
        row["made by"] = f"`{row['made by']}`"
    brief = ["name", "size", "codec", "flow", "accuracy", "licence"]
    for title, columns in (("models", list(rows[0])), ("models in brief", brief)):
        yield title, table(" | ".join(columns), [[row[column] for column in columns] for row in rows])


def commands() -> Iterable[list[str]]:
    """Result, commands and processor of each page of results."""
    for name, report in reports().items():
        lines = "<br>".join(f"`{line}`" for line in report["command"].splitlines())
        yield [
            f"[{name}](../benchmarks/results/{name}.md)",
            lines,
            report.get("measured on") or report["machine"]["processor"],
        ]


def counts() -> Named:
    """Counts that sentences have as words."""
    cells = stored("backbones")["cells"]
    yield "backbones: flows", in_words({row["variant"] for row in cells})
    yield "backbones: seeds", in_words({row["seed"] for row in cells})
    yield "paper: seeds", in_words({row["seed"] for row in stored("paper/table1.cpu")})
    usual = [row for row in stored("private") if (row["judged"], row["method"]) == ("test", "taef2") and row["epsilon"]]
    deltas = [row["delta"] for row in usual]
    yield "private: samples", f"{10 * private_sets.PER_CLASS:,}"
    yield "private: epochs", str(private_sets.EPOCHS)
    noise = [private_sets.Privacy(1, delta, images=60_000).mu for delta in (1e-5, 1e-6)]
    yield "private: more noise at 1e-6", f"{100 * (noise[0] / noise[1] - 1):.0f}"
    yield "private: delta", f"{max(set(deltas), key=deltas.count):.0e}".replace("e-0", "e-")
    yield "kld: of all pairs", f"{1000**2 * 12_288 * 4 / 2**30:.0f}"
    yield from ((f"published: {row['name']}", row["value"]) for row in stored("published"))
    cells = [*stored("augmentation"), *stored("augmentation_tuning")]
    yield "augmentation: hours", f"{sum(row['cell_seconds'] for row in cells) / 3600:.0f}"
    yield "commands", table("result | command | measured on", commands())
    for name, report in reports().items():
        yield f"{name}: command", ", ".join(f"`{line}`" for line in report["command"].splitlines())


def speed() -> Named:
    record = stored("speed")
    verdicts_of_speed = [judged(row) for row in record["verdicts"]]
    lines = [
        [f"`{row['case']}`", row["what"], f"{row['ratio']:.2f}", f"{row['noise']:.2f}", f"{row['limit']:.2f}",
         "yes" if row["met"] else "**no**"]
        for row in verdicts_of_speed
    ]  # fmt: skip
    yield "speed", table("case | time of ours over | ratio | noise | limit | met", lines)
    yield "speed: verdicts", str(len(verdicts_of_speed))
    yield "speed: failed", str(sum(not row["met"] for row in verdicts_of_speed))


# ---- the paper -------------------------------------------------------------------------------------------------------

DIGITS = {"BPD": 2, "FID": 2, "rho-distance": 2, "rho-confusion": 2}
ROLES = {"main": "Fashion-MNIST", "second": "CIFAR-10"}


def paper() -> Named:
    found: dict[tuple[str, ...], dict[int, float]] = {}
    for file in PAPER:
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
    yield "pareto", compare("pareto", ("NF-A", "BPD", "ECE", "FID"))
    claims = stored("paper/claims")
    yield "claims", table("claim of the paper | here", ([row["claim"], f"**{row['verdict']}**"] for row in claims))
    sources = [("the real images (15 epochs)", ("table3", "main", "oracle", "default", "accuracy")),
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

MARK = re.compile(r"<!-- (number|table): (.+?) -->((?:(?!<!-- ).)*)<!-- /\1 -->", re.S)
SOURCES = (samples, private, photographs, latents, single_files, models, counts, speed, paper)


def names() -> dict[str, str]:
    """Every name and its text."""
    found: dict[str, str] = {}
    own = (
        augmentation(Store(RESULTS), stored("no_network")["measured"]),
        directions.numbers(stored("directions"), "noise", stored("photographs")["cells"]),
        directions.numbers(stored("adversarial_directions"), "adversarial", []),
        long_tails.numbers(stored("long_tails")),
        pretrained.numbers(stored("pretrained")["measured"]),
        pretrained.fine_tuned_numbers(stored("fine_tuned")),
    )
    for source in (*own, *(source() for source in SOURCES)):
        for name, text in source:
            assert found.setdefault(name, text) == text, f"two numbers are called {name!r}"
    return found


def pages() -> list[Path]:
    return [ROOT / "CHANGELOG.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def written(text: str, known: dict[str, str]) -> str:
    """A page with the stored numbers.

    Raises:
        ValueError: no stored result has this name.
    """
    if unknown := next((name for _, name, _ in MARK.findall(text) if name not in known), None):
        raise ValueError(f"no number is called {unknown!r}: `benchmarks/write_numbers.py --list` shows the names")
    if wrong := re.search(r"[\d+\-−±]\0|\0\.?\d|(±|\+/-)\s*\d|<!-- /?(number|table).*", MARK.sub("\0", text)):
        raise ValueError(f"a marker is damaged, or a number stands beside or without one: {wrong[0]!r}")
    return MARK.sub(lambda m: f"<!-- {m[1]}: {m[2]} -->{known[m[2]]}<!-- /{m[1]} -->", text)


def agree(place: Path, text: str, check: bool) -> None:
    """Write a file, unless it has this text.

    Raises:
        SystemExit: with `check`, in place of writing.
    """
    if place.is_file() and place.read_text(encoding="utf-8") == text:
        return
    name = place.relative_to(ROOT).as_posix()
    if check:
        raise SystemExit(f"numbers: {name} differs from the stored results: run `make numbers`")
    with atomic_write(place, "w") as file:
        file.write(text)
    print(f"numbers: wrote {name}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", action="store_true", help="write nothing")
    arguments.add_argument("--list", action="store_true", help="print all names")
    args = arguments.parse_args()
    if args.list:
        print("\n".join(f"{name}: {text.strip()}" for name, text in names().items()))
        return
    try:
        update(args.check)
    except ValueError as error:
        raise SystemExit(f"numbers: {error}") from error


def update(check: bool) -> None:
    """Write the results that follow from stored rows, and the numbers of all pages.

    Args:
        check: write nothing.

    Raises:
        SystemExit: with `check`, a file differs; or a page has an unknown name or a damaged marker.
        ValueError: rows are missing or contradict each other.
    """
    for name, text in derived().items():
        agree(RESULTS / name, text(), check)
    known = names()
    for page in pages():
        try:
            agree(page, written(page.read_text(encoding="utf-8"), known), check)
        except ValueError as error:
            raise SystemExit(f"numbers: {page.relative_to(ROOT)}: {error}") from None
    print(f"numbers: all {len(pages())} pages agree with the stored results; none needs data or a GPU")


if __name__ == "__main__":
    main()
