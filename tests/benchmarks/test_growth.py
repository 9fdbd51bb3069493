"""What one more SAE costs: every evaluation is timed or says why not, and the floor is the arithmetic's."""

from __future__ import annotations

import pytest

from benchmarks import growth
from sae_research.config.evaluations import EVALUATIONS, OF_SAES
from sae_research.config.params import Params
from tests.lm.test_lm_model import make


def test_every_evaluation_is_timed_or_says_why_not() -> None:
    assert set(growth.SIZES) | set(growth.UNTIMED) == set(OF_SAES)
    assert not set(growth.SIZES) & set(growth.UNTIMED)
    assert set(growth.GROWN) <= set(growth.SIZES) <= set(EVALUATIONS)


def test_the_floor_of_core_is_its_products() -> None:
    """A layer has four square matrices' worth of attention (half of it for keys and values here) and three of the MLP."""
    bench = growth.Bench(make("llama"), Params())
    bench.hook = "blocks.1.hook_resid_post"
    params = bench.settings(
        "core", batch_size_prompts=1, n_eval_reconstruction_batches=3, n_eval_sparsity_variance_batches=2
    )
    width, d_in, context = 40, 32, params.text.context_size
    each, shared = bench._floors("core", params, bench.saes(1, width), rate=1.0)
    layer = 2 * (d_in * d_in * 2 + d_in * 16 * 2 + 3 * d_in * 48) + 2 * context * d_in
    above = 2 * layer + 2 * d_in * 97
    encoded = 5 * context * 2 * d_in * width
    assert each == pytest.approx(3 * 2 * context * above + encoded + 2 * d_in * width * width)
    assert shared == pytest.approx(5 * context * 2 * layer + 3 * 3 * context * above)


def test_saes_are_new_each_time() -> None:
    bench = growth.Bench(make("llama"), Params())
    bench.hook = "blocks.1.hook_resid_post"
    first, second = bench.saes(2, 40), bench.saes(2, 40)
    assert not first.keys() & second.keys()
    assert len({sae.info().fingerprint for sae in (*first.values(), *second.values())}) == 4
