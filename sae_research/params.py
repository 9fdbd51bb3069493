"""What `params.yaml` may say. Unknown keys, wrong types and impossible values are refused in one line.

Sections stand in the `*_params.py` beside this file.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML, YAMLError

from sae_research.analysis_params import Analysis
from sae_research.dashboard_params import Dashboards
from sae_research.errors import UserError
from sae_research.eval_params import (
    SCR,
    TPP,
    Absorption,
    Autointerp,
    CoreEval,
    EvalTypes,
    MetaSAE,
    Ravel,
    SparseProbing,
    SparseProbingSaeProbes,
    Unlearning,
)
from sae_research.ground_truth_params import GroundTruth
from sae_research.model_params import ActivationCaching, Model, Text, TokenMask
from sae_research.recipe_params import recipe_model
from sae_research.sae_params import BaselineSAE, Comparison, Controls, Preflight, Variants
from sae_research.section import Section
from sae_research.tracking_params import Tracking
from sae_research.train_params import Train
from sae_research.transfer_params import Transfer
from sae_research.visualization_params import Visualization


class Params(Section):
    random_seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    model: Model = Model()
    text: Text = Text()
    token_mask: TokenMask = TokenMask()
    train: Train = Train()
    baseline_sae: BaselineSAE = BaselineSAE()
    sae_variants: Variants = Variants()
    comparison_saes: Comparison = Comparison()
    controls: Controls = Controls()
    preflight: Preflight = Preflight()
    eval_types: EvalTypes = EvalTypes()
    core_eval: CoreEval = CoreEval()
    sparse_probing: SparseProbing = SparseProbing()
    scr: SCR = SCR()
    tpp: TPP = TPP()
    absorption: Absorption = Absorption()
    unlearning: Unlearning = Unlearning()
    sparse_probing_sae_probes: SparseProbingSaeProbes = SparseProbingSaeProbes()
    meta_sae: MetaSAE = MetaSAE()
    autointerp: Autointerp = Autointerp()
    ravel: Ravel = Ravel()
    transfer: Transfer = Transfer()
    ground_truth: GroundTruth = GroundTruth()
    analysis: Analysis = Analysis()
    dashboards: Dashboards = Dashboards()
    tracking: Tracking = Tracking()
    activation_caching: ActivationCaching = ActivationCaching()
    visualization: Visualization = Visualization()


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check the configuration. Raises `UserError` naming the key that is wrong.

    YAML 1.2 (ruamel), as DVC reads it: `1e-4` is a number, `on` is a word.
    """
    path = Path(path)
    try:
        values = YAML(typ="safe").load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run from the project's folder") from None
    except YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}; if `dvc exp run -S KEY=[]` made it so, "
                        f"restore it (git checkout {path}) and write KEY=null") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections such as `model:` and `eval_types:`")
    return check_params(values, str(path))


def check_params(values: dict[str, Any], where: str) -> Params:
    """Parameters from nested values. Raises `UserError` that begins with `where` and names the key that is wrong."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise UserError(f"{where}: " + "; ".join(lines)) from None


def _explain(item: dict[str, Any]) -> str:
    """One pydantic complaint as a user would say it, with the nearest known key where one is misspelt."""
    in_recipe = item["loc"][:2] == ("train", "saes") and len(item["loc"]) > 3  # its fourth part names the recipe
    where = ".".join(str(part) for i, part in enumerate(item["loc"]) if not (in_recipe and i == 3))
    if item["type"] != "extra_forbidden":
        return f"{where}: {item['msg'].removeprefix('Value error, ')}" + (
            f" (got {item['input']!r})" if not isinstance(item["input"], dict) else "")
    known = sorted(recipe_model(item["loc"][3]).model_fields) if in_recipe else _known_keys(item["loc"][:-1])
    close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
    return f"unknown key {where}" + (f", did you mean {close[0]}?" if close else f"; known: {', '.join(known)}")


def _known_keys(loc: tuple[Any, ...]) -> list[str]:
    section: Any = Params
    for part in loc:
        field = section.model_fields.get(part) if isinstance(section, type) else None
        if field is None:  # inside a mapping such as train.saes.<name>
            continue
        section = field.annotation
        for candidate in getattr(section, "__args__", ()):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                section = candidate
    return sorted(section.model_fields)
