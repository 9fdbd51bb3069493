"""What a plan counts of core is what the model then runs, layer by layer: of SAEs, transcoders and crosscoders."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from sae_research.lm import LanguageModel
from sae_research.planning.saes import described
from sae_research.planning.work import phases
from sae_research.saes import SparseAutoencoder
from sae_research.setup.checks import time_lines
from tests.evals.test_core_eval import run
from tests.helpers.core_reference import texts
from tests.helpers.crosscoders import config, random_crosscoder
from tests.helpers.evals_saes import standard
from tests.helpers.transcoders import random_transcoder

TWO = "blocks.0.hook_resid_post + blocks.1.hook_mlp_out"


def crosscoder(seed: int = 0) -> SparseAutoencoder:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (64, 64), "b_enc": (64,), "W_dec": (64, 64), "b_dec": (64,)}
    weights = {name: torch.randn(*shape, generator=g) / 10 for name, shape in shapes.items()}
    cfg = config("standard", hook_name=TWO, hook_scales=(1.0, 2.0)).replace(d_in=64)
    return type(random_crosscoder())(cfg, **weights)


def layer_tokens(lm: LanguageModel, saes: dict[str, SparseAutoencoder], params: Any) -> list[int]:
    """Tokens that each layer ran while core scored them."""
    ran, handles = [0] * len(lm.layers), []
    for number, layer in enumerate(lm.layers):

        def counted(_: Any, inputs: Any, number: int = number) -> None:
            ran[number] += inputs[0].shape[:2].numel()

        handles.append(layer.register_forward_pre_hook(counted))
    run(saes, lm, params)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("make", [lambda seed: standard(), random_transcoder, crosscoder])
def test_passes_of_core(make: Any, lm: LanguageModel, make_params: Any) -> None:
    params = make_params(activation_caching={"enabled": False})
    saes = {f"s{seed}": make(seed) for seed in range(2)}
    planned = described("s0", saes["s0"].info())
    for hook in saes["s0"].cfg.hook_names:
        lm.activations(torch.tensor([[1, 2, 3]]), hook)  # the first use of a hook checks it
    depth, expected = int(planned.hook.split(".")[1]) + 1, [0.0] * len(lm.layers)
    for phase in phases("core", params, planned.at) or []:
        work = phase.work
        whole = work.whole + 2 * work.patched_whole
        for number in range(len(lm.layers)):
            inside = work.prefix if number < depth else work.above + 2 * work.patched
            expected[number] += phase.parts * (inside + whole)
    if planned.at.in_stream:  # SAE Bench's ablation, one sequence for all
        for number in range(depth, len(lm.layers)):
            expected[number] += texts(lm, params).shape[1]
    assert layer_tokens(lm, saes, params) == expected


def test_setup_names_what_each_evaluation_takes(lm: LanguageModel, make_params: Any) -> None:
    on = {"core": True, "sparse_probing": True, "absorption": True}
    params = make_params(eval_types=on)
    saes = {"sae": standard(), "trans": random_transcoder(), "cross": crosscoder()}
    lines = dict(line.split(": ", 1) for line in time_lines(params, lm, saes, dict.fromkeys(saes, 1e-6)))
    found = {name: re.search(r"for (\d) SAEs on", lines[name]) for name in on}
    assert {name: match and match[1] for name, match in found.items()} == {
        "core": "3",
        "sparse_probing": "2",
        "absorption": "1",
    }
    only = dict(line.split(": ", 1) for line in time_lines(params, lm, {"cross": crosscoder()}, {"cross": 1e-6}))
    assert only["absorption"] == "no SAE that it applies to"
