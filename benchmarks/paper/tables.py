"""Tables 1 to 8 of Enescu & Sahbi, ACCV 2024, as cells to measure, with the printed numbers.

All tables of the paper are on CIFAR-100 ("main"), and Tables 1, 4 and 8 also on CIFAR-10 ("second").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL = ("NF-A", "CNN-A", "FID", "Cov", "L-R")
# Of Table 7 (Sec. 5.3): the wider variances.
_WIDE = dict(psi=[5.0, 0.2, 0.05])


@dataclass(frozen=True)
class Cell:
    """One flow, one source of samples, and the metrics to measure.

    Attributes:
        label: the row. data: "main" or "second". method, changes: of `training.config`.
        metrics: any of NF-A, CNN-A, ViT-A, FID, Cov, L-R, BPD, ECE, rho-distance, rho-confusion (rank correlations of
            pairwise KLD with the oracle).
        source: "gaussian" or "rfcm". tau: temperature. size: generated images for the classifier, in multiples of the
            training set.
        paper: printed numbers by metric.
    """

    label: str
    data: str
    method: str
    metrics: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    source: str = "gaussian"
    tau: float = 0.9
    size: int = 1
    paper: Mapping[str, float] = field(default_factory=dict)

    @property
    def setting(self) -> str:
        """The settings that distinguish cells with the same label."""
        parts = [f"tau={self.tau:g}"] if self.tau != 0.9 else []
        parts += [f"{self.size}x"] if self.size != 1 else []
        parts += ["rfcm"] if self.source == "rfcm" else []
        return ", ".join(parts) or "default"

    @property
    def arm(self) -> str:
        """The name in the store."""
        return self.label + f" ({self.setting})" * (self.setting != "default")


def _numbers(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(ALL, values, strict=True) if value is not None}


def _table1() -> list[Cell]:
    rows = (
        ("Baseline 1 (CE)", "ce", (None, 75.54), (None, 37.40)),
        ("Baseline 2 (lambda = 0)", "lambda0", (57.83, 60.17), (19.12, 26.7)),
        ("Baseline 3 (CEGLEM)", "ceglem", (12.82, 76.03), (2.04, 38.85)),
        ("GLEM", "glem", (92.02, 77.39), (67.67, 45.22)),
    )
    cells = []
    for label, method, second, main in rows:
        for data, values in (("second", second), ("main", main)):
            names = ("NF-A", "CNN-A") if values[0] is not None else ("CNN-A",)
            names = (*names, "ViT-A") if method == "glem" else names  # the paper's own figures are in its supplement
            printed = {n: v for n, v in zip(("NF-A", "CNN-A"), values, strict=True) if v is not None}
            cells.append(Cell(label, data, method, names, paper=printed))
    return cells


def _table2() -> list[Cell]:
    three = dict(kld_weight=3.0)
    return [
        Cell("Baseline 1 (CE)", "main", "ce", ALL[1:], paper=_numbers(None, 37.40, 37.62, 17.70, 12.58)),
        Cell("Baseline 2 (lambda = 0)", "main", "lambda0", ALL, paper=_numbers(19.12, 26.7, 25.68, 19.77, 9.65)),
        Cell("CEGLEM 3", "main", "ceglem", ALL, three, paper=_numbers(2.23, 39.40, 27.34, 17.83, 16.38)),
        Cell("CEGLEM 10", "main", "ceglem", ALL, paper=_numbers(2.04, 38.85, 26.38, 17.97, 16.25)),
        Cell("GLEM 3", "main", "glem", ALL, three, paper=_numbers(63.40, 45.95, 19.96, 25.93, 38.36)),
        Cell("GLEM 10", "main", "glem", ALL, paper=_numbers(67.67, 45.22, 26.33, 19.15, 32.51)),
    ]


def _table3() -> list[Cell]:
    printed = {
        1: (26.45, 30.95, 21.54, 23.86, 21.04, 1.64),
        3: (63.40, 45.95, 19.96, 25.93, 38.36, 1.74),
        5: (66.53, 47.21, 23.71, 22.0, 35.39, 1.87),
        10: (67.67, 45.22, 26.33, 19.14, 32.52, 2.07),
        15: (68.23, 43.51, 31.36, 16.17, 30.10, 2.19),
        20: (67.39, 42.85, 35.83, 14.35, 24.66, 2.25),
    }
    names = (*ALL, "BPD", "ECE", "rho-distance", "rho-confusion")
    # Pixels in place of latents: how close classes are without any flow.
    control = Cell("identity flow (control)", "main", "pixels", ("NF-A", "BPD", "rho-distance", "rho-confusion"))
    cells = [
        Cell(
            f"lambda_0 = {weight}", "main", "glem", names, dict(kld_weight=float(weight)),
            paper={**_numbers(*values[:5]), "BPD": values[5]},
        )
        for weight, values in printed.items()
    ]  # fmt: skip
    return [*cells, control]


def table4(sizes: tuple[int, ...]) -> list[Cell]:
    """Table 4, with the sizes of the scale."""
    second = {1: 81.02, 2: 82.48, 5: 84.25, 10: 84.45, 20: 85.77, 50: 86.59, 100: 87.14}
    main = {1: 55.21, 2: 57.66, 5: 59.47, 10: 61.11, 20: 61.84, 50: 63.42, 100: 63.52}
    return [
        Cell("GLEM", data, "glem", ("CNN-A",), size=size, paper={"CNN-A": printed[size]} if size in printed else {})
        for data, printed in (("second", second), ("main", main))
        for size in sizes
    ]


def _table5() -> list[Cell]:
    printed = {
        1.2: (42.99, 30.15, 16.13, 26.82),
        1.1: (43.63, 28.17, 17.21, 28.92),
        1.0: (44.64, 26.90, 18.47, 30.86),
        0.9: (45.22, 26.33, 19.15, 32.51),
        0.8: (44.99, 26.45, 19.33, 33.67),
        0.7: (44.17, 27.21, 19.19, 34.69),
    }
    cells = [Cell(f"tau = {t}", "main", "glem", ALL[1:], tau=t, paper=_numbers(None, *v)) for t, v in printed.items()]
    rfcm = Cell("RFCM", "main", "glem", ALL[1:], source="rfcm", paper=_numbers(None, 49.74, 25.55, 22.47, 33.56))
    return [*cells, rfcm]


def _table6() -> list[Cell]:
    three = dict(kld_weight=3.0)
    return [
        Cell("1: no KLD, psi, RFCM", "main", "lambda0", ALL, paper=_numbers(19.12, 26.7, 25.68, 19.78, 9.66)),
        Cell("2: KLD 10", "main", "no-psi", ALL, paper=_numbers(38.21, 27.87, 22.96, 21.96, 24.59)),
        Cell("3: KLD 10 + psi", "main", "glem", ALL, paper=_numbers(67.67, 45.22, 26.33, 19.15, 32.51)),
        Cell("4: KLD 3 + psi", "main", "glem", ALL, three, paper=_numbers(63.40, 45.95, 19.96, 25.93, 38.36)),
        Cell(
            "5: KLD 10 + psi + RFCM", "main", "glem", ALL, source="rfcm",
            paper=_numbers(67.50, 49.74, 25.55, 22.47, 33.56),
        ),
    ]  # fmt: skip


def _table7() -> list[Cell]:
    return [
        Cell("only mu", "main", "only-mu", ALL, _WIDE, paper=_numbers(64.31, 45.29, 20.29, 25.74, 35.70)),
        Cell("only Sigma", "main", "only-sigma", ALL, _WIDE, paper=_numbers(66.91, 41.16, 36.02, 15.76, 30.18)),
        Cell("both", "main", "glem", ALL, _WIDE, paper=_numbers(66.49, 46.12, 21.43, 24.39, 36.38)),
        # The paper's numbers of this row were not readable.
        Cell("random initialisation", "main", "random", ALL, _WIDE),
    ]


def _table8() -> list[Cell]:
    rows = (
        ("GLEM", "glem", 92.63, 70.11, 80.03, 53.07),
        ("IB-INN", "ib-inn", 91.28, 66.22, 42.87, 19.20),
        ("FlowGMM", "flowgmm", 88.44, None, None, None),
        ("ULCGM", "ulcgm", 84.0, None, None, None),
        ("hybrid (not in the paper)", "hybrid", None, None, None, None),
        ("hybrid-joint (not in the paper)", "hybrid-joint", None, None, None, None),
    )
    cells = []
    for label, method, nf2, nf1, cnn2, cnn1 in rows:
        for data, nf, cnn in (("second", nf2, cnn2), ("main", nf1, cnn1)):
            printed = {name: v for name, v in (("NF-A", nf), ("CNN-A", cnn)) if v is not None}
            cells.append(Cell(label, data, method, ("NF-A", "CNN-A", "BPD"), paper=printed))
    return cells


TITLES = {
    1: "Accuracy of flows, and of CNNs on their samples",
    2: "Baselines and GLEM by all metrics",
    3: "lambda_0",
    4: "CNN accuracy by the number of generated images",
    5: "Sampling temperature and RFCM",
    6: "Ablation of KLD, psi and RFCM",
    7: "Which Gaussian parameters are learned",
    8: "Related methods on one backbone",
}
ROLES = {"main": "Fashion-MNIST", "second": "CIFAR-10"}  # of the scale "cpu"


def _claims() -> list[tuple[str, int, str, str, str, str]]:
    """Claim, table, data, the arm that the claim puts first, the other arm, and the metric."""
    rows = [
        ("GLEM is above lambda = 0", 1, ROLES, "GLEM", "Baseline 2 (lambda = 0)", ("NF-A", "CNN-A")),
        ("GLEM is above cross-entropy alone", 1, ROLES, "GLEM", "Baseline 1 (CE)", ("CNN-A",)),
        ("GLEM is above class codes (CEGLEM)", 1, ROLES, "GLEM", "Baseline 3 (CEGLEM)", ("CNN-A",)),
        ("lambda_0 = 10 is above 1", 3, ("main",), "lambda_0 = 10", "lambda_0 = 1", ("NF-A", "CNN-A")),
        ("lambda_0 = 10 is above 20", 3, ("main",), "lambda_0 = 10", "lambda_0 = 20", ("NF-A", "CNN-A", "FID")),
        ("8 times as many samples help", 4, ROLES, "GLEM (8x)", "GLEM", ("CNN-A",)),
        ("tau = 0.9 is above tau = 1", 5, ("main",), "tau = 0.9", "tau = 1.0 (tau=1)", ("CNN-A", "L-R")),
        ("RFCM helps", 5, ("main",), "RFCM (rfcm)", "tau = 0.9", ("CNN-A", "FID", "Cov")),
        ("psi helps", 6, ("main",), "3: KLD 10 + psi", "2: KLD 10", ("NF-A", "CNN-A", "L-R")),
        ("learning both is above means alone", 7, ("main",), "both", "only mu", ("CNN-A", "L-R")),
        ("learning both is above variances alone", 7, ("main",), "both", "only Sigma", ("CNN-A", "L-R")),
        ("KLD follows similarity more than in pixels", 3, ("main",), "lambda_0 = 10",
         "identity flow (control)", ("rho-distance",)),
        ("GLEM is above IB-INN", 8, ROLES, "GLEM", "IB-INN", ("NF-A", "CNN-A")),
        ("GLEM is above FlowGMM", 8, ROLES, "GLEM", "FlowGMM", ("NF-A", "CNN-A")),
    ]  # fmt: skip
    each = ((row, role, metric) for row in rows for role in row[2] for metric in row[5])
    return [(claim, number, role, arm, other, metric) for (claim, number, _, arm, other, _), role, metric in each]


CLAIMS = _claims()
_MAKERS = {1: _table1, 2: _table2, 3: _table3, 5: _table5, 6: _table6, 7: _table7, 8: _table8}


def cells_of(table: int, sizes: tuple[int, ...]) -> list[Cell]:
    """The cells of a table, in the paper's order."""
    return table4(sizes) if table == 4 else _MAKERS[table]()
