"""Run `examples/workshop.ipynb` and keep what its cells show: `python -m benchmarks.notebook`.

Outputs hold no time, no progress bars and no places on this machine, so that equal results make equal files.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from sae_research.runtime.files import project_root, write_text

NOTEBOOK = Path(__file__).parents[1] / "examples/workshop.ipynb"


def executed(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in a folder. Raises nbclient's `CellExecutionError` where a cell fails."""
    found = nbformat.read(notebook, 4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(found, timeout=1800, resources=where, record_timing=False).execute()
    for cell in found.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    found.metadata.pop("widgets", None)
    found.metadata.language_info = {"name": "python"}  # the kernel adds its version
    return found


def main() -> None:
    """Run it on this project's SAE, and write it over itself."""
    write_text(NOTEBOOK, nbformat.writes(executed(NOTEBOOK, project_root())) + "\n")
    print(f"wrote {NOTEBOOK.relative_to(Path(__file__).parents[1])}")


if __name__ == "__main__":
    main()
