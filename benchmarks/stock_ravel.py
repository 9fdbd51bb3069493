"""SAE Bench 0.6.0's RAVEL on our model, prompts and SAEs: for the parity fixture and for side-by-side timings.

Its code reads a decoder layer as `outputs[0]` of a tuple and knows two architectures; under transformers 5 layers return
a bare tensor, so it stops with "Unexpected output shape". The one function that finds the layer (`get_module`) is replaced
by one that finds any layer and shows SAE Bench's hooks the tuple they expect; everything else is its own code.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

os.environ["JAXTYPING_DISABLE"] = "1"

from sae_bench.evals.ravel import intervention, mdbm
from sae_bench.evals.ravel import main as ravel_main
from sae_bench.evals.ravel.eval_config import RAVELEvalConfig
from sae_bench.evals.ravel.instance import Prompt, RAVELFilteredDataset
from sae_bench.sae_bench_utils import activation_collection
from torch import Tensor

from benchmarks.stock import StockSAE
from sae_research.config.params import Params
from sae_research.evals.ravel.prompts import Known
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder


def dataset(known: Sequence[Known]) -> RAVELFilteredDataset:
    """Our known prompts as SAE Bench's; places of entities count from the end, as SAE Bench counts them."""
    return RAVELFilteredDataset(
        [
            Prompt(
                text=one.prompt.text,
                template="",
                attribute_type=one.prompt.attribute,
                attribute_label=one.prompt.label,
                entity_label=one.prompt.entity,
                context_split="train",
                entity_split="train",
                input_ids=list(one.prompt.ids),
                final_entity_token_pos=one.prompt.position - len(one.prompt.ids),
                first_generated_token_id=one.first,
                is_correct=True,
            )
            for one in known
        ],
        {},
    )


def config(params: Params, model_folder: str) -> RAVELEvalConfig:
    ours = params.ravel
    return RAVELEvalConfig(
        model_name=model_folder,
        llm_batch_size=ours.batch_size,
        num_pairs_per_attribute=ours.num_pairs_per_attribute,
        train_test_split=ours.train_test_split,
        learning_rate=ours.learning_rate,
        num_epochs=ours.num_epochs,
        n_generated_tokens=ours.n_generated_tokens,
        llm_dtype="float32",
        random_seed=params.random_seed,
        entity_attribute_selection=ours.entity_attribute_selection,
    )


def one_attribute(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    known: Sequence[Known],
    attribute: str,
    params: Params,
    seed: str,
    model_folder: str,
) -> dict[str, Any]:
    """SAE Bench's `run_eval_single_cause_attribute`, its generator seeded with `seed`.

    Returns its scores, and what it did on the way: `pairs` (base text, source text, label) as formatted for its loaders,
    `losses` of every training step, `numbers` of the mask [d_sae], `answers` to the scored pairs.
    """
    seen: dict[str, Any] = {"losses": [], "answers": []}
    others = [a for a in dict.fromkeys(one.prompt.attribute for one in known) if a != attribute]
    random.seed(seed)
    with (
        _any_decoder(lm),
        _recorded(seen),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        scores = ravel_main.run_eval_single_cause_attribute(
            dataset(known), attribute, others, config(params, model_folder), StockSAE(sae, lm.name), lm.model
        )
    return {"scores": scores, **seen}


@contextlib.contextmanager
def _any_decoder(lm: LanguageModel) -> Iterator[None]:
    original = activation_collection.get_module

    def get_module(_: Any, layer: int) -> SimpleNamespace:
        def register(hook: Callable[..., Any]) -> Any:
            return lm.layers[layer].register_forward_hook(lambda module, args, out: hook(module, args, (out,))[0])

        return SimpleNamespace(register_forward_hook=register)

    activation_collection.get_module = get_module
    try:
        yield
    finally:
        activation_collection.get_module = original


@contextlib.contextmanager
def _recorded(seen: dict[str, Any]) -> Iterator[None]:
    """Note what SAE Bench computes: its losses, its pairs, its mask, its generations."""
    loss, loader, train, judge = (
        mdbm.compute_loss,
        ravel_main.create_dataloader_from_pairs,
        mdbm.train_mdbm,
        intervention.evaluate_completion,
    )

    def compute_loss(logits: Tensor, targets: Tensor) -> Any:
        result = loss(logits, targets)
        seen["losses"].append(float(result[0]))
        return result

    def create_dataloader(pairs: list[Any], *rest: Any) -> Any:
        seen.setdefault("pairs", []).append([[list(p[0]), list(p[1]), p[7], p[9]] for p in pairs])
        return loader(pairs, *rest)

    def train_mdbm(*args: Any, **kwargs: Any) -> Any:
        trained = train(*args, **kwargs)
        seen["numbers"] = trained.binary_mask.detach().tolist()
        return trained

    def evaluate_completion(text: str, label: str, answer: str) -> bool:
        seen["answers"].append(answer)
        return judge(text, label, answer)

    mdbm.compute_loss, ravel_main.create_dataloader_from_pairs = compute_loss, create_dataloader
    mdbm.train_mdbm, intervention.evaluate_completion = train_mdbm, evaluate_completion
    try:
        yield
    finally:
        mdbm.compute_loss, ravel_main.create_dataloader_from_pairs = loss, loader
        mdbm.train_mdbm, intervention.evaluate_completion = train, judge
