"""The notebook runs from a fresh project on the offline model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, load_language_model
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, save_sae
from sae_research.setup.controls import sample_activations

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/workshop.ipynb"


HOOK, D_SAE = "blocks.8.hook_resid_post", 768


def stand_in(lm: LanguageModel) -> SparseAutoencoder:
    """An SAE without training: rows of activations, each firing on the 3 % of tokens most like it."""
    acts = sample_activations(lm, HOOK, Params(activation_caching={"enabled": False}), 2_048)
    centre = acts.mean(0)
    rows = torch.nn.functional.normalize(acts[:D_SAE] - centre, dim=1)
    like = (acts - centre) @ rows.T
    cfg = SAEConfig(form="standard", d_in=lm.d_model, d_sae=D_SAE, model_name=lm.name, hook_name=HOOK)
    threshold = like.quantile(0.97, dim=0)
    return form_class("standard")(cfg, W_enc=rows.T.contiguous(), W_dec=rows, b_enc=-threshold, b_dec=centre)


def test_no_outputs_are_kept() -> None:
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_workshop_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    if (ROOT / ".cache/models").is_dir():  # dequantising takes a while
        (tmp_path / ".cache/models").symlink_to(ROOT / ".cache/models")
    shutil.copy2(ROOT / "params.yaml", tmp_path)
    lm = load_language_model("smollm2-135m-instruct", "cpu")
    save_sae(stand_in(lm), tmp_path / "downloaded_saes/standard")
    del lm
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert (tmp_path / "analysis_results/workshop/site/index.html").is_file()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "correlation with real ablations" in printed and "targets:" in printed
