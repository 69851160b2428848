"""The notebook runs from a fresh start."""

import nbformat
from nbclient import NotebookClient

import tiny

SMALLER = {'"data.seq_len": 256': '"data.seq_len": 48', '"data.fit_windows": 4': '"data.fit_windows": 2'}
SMALLER |= {"count=48": "count=8", "max_new_tokens=8": "max_new_tokens=2"}


def test_the_notebook_runs(tmp_path):
    """With less text and fewer new tokens."""
    notebook = nbformat.read(tiny.ROOT / "examples" / "faster.ipynb", as_version=4)
    for size, smaller in SMALLER.items():
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and size in cell.source)
        cell.source = cell.source.replace(size, smaller)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    table, speeds, shared = printed[2], printed[6], printed[8]
    assert "staged-prox" in table and "perplexity" in table
    assert speeds.count("tokens/s") == 3 and "config.json" in shared
