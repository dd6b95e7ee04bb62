"""The notebooks in examples/: without outputs, with imports that exist; and (slow) they run. Ruff reads their cells."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_have_no_outputs_and_what_they_import_exists(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    text = "".join(line for cell in cells for line in [*cell["source"], "\n"])
    exec("\n".join(re.findall(r"^(?:from|import) .+", text, flags=re.M)), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel, as a user runs it, without a network; its last numbers are percentages above chance."""
    for module in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(
            module, reason=f"the extra [notebooks] is not installed, so {path.name} is not run: no {module}"
        )
    import nbformat
    from nbclient import NotebookClient

    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    means = [float(line.split(" ± ")[0].split()[-1]) for line in text.splitlines() if " ± " in line]
    assert len(means) == {"augment_your_classifier": 3, "synthetic_copy": 4}[path.stem]
    assert all(40 < mean <= 100 for mean in means), text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not list(tmp_path.iterdir())
