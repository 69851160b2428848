"""The notebook runs from a fresh start."""

import nbformat
from nbclient import NotebookClient

import tiny


def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(tiny.ROOT / "examples" / "faster.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    table, speeds, shared = printed[2], printed[6], printed[8]
    assert "staged-prox" in table and "perplexity" in table
    assert speeds.count("tokens/s") == 3 and "config.json" in shared
