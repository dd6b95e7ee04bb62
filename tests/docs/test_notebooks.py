"""The notebooks in examples/: without outputs, of cells that compile and use names that exist; and (slow) they run."""

from __future__ import annotations

import ast
import builtins
import importlib
import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_compile_and_their_names_exist(path: Path) -> None:
    """What a cell uses is imported or assigned in it or before it, and what it imports is there."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    known = set(dir(builtins))
    for cell in cells:
        tree = ast.parse("".join(cell["source"]))
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                known |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.FunctionDef):
                known |= {node.name, *(argument.arg for argument in node.args.args)}
            elif isinstance(node, ast.Name):
                (used if isinstance(node.ctx, ast.Load) else known).add(node.id)
        assert used <= known, f"{path.name}: {sorted(used - known)}"


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
    assert len(means) == {"augment_your_classifier": 3, "synthetic_copy": 2}[path.stem]
    assert all(40 < mean <= 100 for mean in means), text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not list(tmp_path.iterdir())
