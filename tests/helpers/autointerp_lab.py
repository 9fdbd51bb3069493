"""What the tests of autointerp share: windows of the tiny model's latents, and runs of the evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_research.config.params import Params
from sae_research.evals import autointerp
from sae_research.evals.autointerp.windows import Windows, collect_windows
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.forms import StandardSAE
from tests.fixtures import make_autointerp as fixture
from tests.helpers.evals_saes import HOOK, standard

BUFFER, TOP, WEIGHTED = 4, 6, 4
"""Of the fixture `settings`."""


def run(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params, folder: Path
) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    return dict(autointerp.evaluate(saes, lm, params, stage)), stage


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def activations(lm: LanguageModel, params: Params) -> HookActivations:
    return HookActivations(lm, HOOK, fixture.tokens_of(lm, params), params)


def windows_of(sae: SparseAutoencoder, lm: LanguageModel, params: Params, seed: int = 42) -> Windows:
    return collect_windows({"sae": sae}, activations(lm, params), params.autointerp, seed)["sae"]


def sparse() -> StandardSAE:
    """An SAE whose latents fire on one token in twenty: random windows hold them now and then."""
    sae = standard()
    sae.b_enc.fill_(-12)
    return sae
