"""The notebook runs in a kernel of its own, finds the same model, and is committed without output."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

PATH = Path(__file__).parents[2] / "examples/quickstart.ipynb"
# What has to hold of its variables, in its own kernel.
CHECK = """
from hf_gdn.eval.accuracy import SAME_MODEL

bounds = SAME_MODEL["float32"]
assert abs(perplexity[1] / perplexity[0] - 1) <= bounds["ppl_ratio"]
assert kl.mean() <= bounds["kl_mean"] and 100 * same_top >= bounds["same_top"]
sinks, everything = caches
assert len(set(memory[sinks])) == 1 and memory[everything][-1] == 24 * memory[everything][0]
assert sum(losses[sinks]) < sum(losses[everything])  # every token beyond the training length
assert all(len(found) == 3 for found in times.values())
"""


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_committed_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None), cell.id
        assert cell.metadata == {}, cell.id
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_it_runs_and_draws(notebook, tmp_path):
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises for a cell that does
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "patched families: [" in printed and "chunk_gdn: " in printed and printed.endswith("False\n")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
