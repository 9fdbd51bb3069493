"""Training, core evaluation and latent statistics on conversations count the tokens of the roles asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from sae_research.analysis.collect import collect_stats
from sae_research.config.params import Params, check_params
from sae_research.evals.core import evaluation
from sae_research.lm import LanguageModel, load_configured
from sae_research.saes import load_sae
from sae_research.setup.checks import preflight, preflight_contexts
from sae_research.setup.controls import sample_activations
from sae_research.text.chat import Reader
from sae_research.text.corpus import documents
from sae_research.text.tokens import reorder_evenly, token_contexts, token_strings
from sae_research.training import stage
from sae_research.training.stream import ActivationStream
from tests.helpers.tiny_model import WORDS, make_tiny_model
from tests.helpers.tiny_saes import HOOK, tiny_sae
from tests.helpers.training import STANDARD

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] }}\n{% endfor %}"
SIZE, TOKENS = 32, 4096


def conversation(rng: random.Random) -> list[dict[str, str]]:
    turns = [
        {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randrange(4, 25)))}
        for _ in range(rng.randrange(1, 4))
        for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": "be like the first people"}, *turns]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("chat"), random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(root / "model"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "model")
    (root / "text").mkdir()
    rows = [json.dumps({"messages": conversation(rng)}) for _ in range(400)]
    (root / "text" / "chats.jsonl").write_text("\n".join(rows))
    return root


@pytest.fixture
def params(chat: Path, in_project: Path) -> Params:
    values = {
        "model": {"name": str(chat / "model"), "device": "cpu", "llm_batch_size": 4},
        "text": {
            "dataset": str(chat / "text"),
            "column_name": "messages",
            "roles": ["assistant"],
            "context_size": SIZE,
        },
        "token_mask": {"drop_first_position": False, "outlier_norm_multiple": None},
        "train": {
            "hook_name": HOOK,
            "tokens": TOKENS,
            "batch_size": 16,
            "buffer_tokens": 1024,
            "llm_dtype": "float32",
            "held_out_tokens": 512,
            "evaluate_tokens": 256,
            "saes": {"standard": STANDARD},
        },
        "core_eval": {
            "batch_size_prompts": 3,
            "n_eval_reconstruction_batches": 2,
            "n_eval_sparsity_variance_batches": 3,
        },
        "preflight": {"tokens": 512},
        "analysis": {"tokens": 1_000, "split": "core_eval", "top_contexts": 4},
    }
    return check_params(values, "here")


@pytest.fixture
def lm(params: Params) -> LanguageModel:
    return load_configured(params.model)


def by_hand(lm: LanguageModel, params: Params, split: str, n_contexts: int) -> tuple[Tensor, Tensor]:
    """(ids, whether a token stands in what an assistant says) of packed contexts, from the texts of the tokens."""
    texts, stream, flags = token_strings(lm.tokenizer), [], []
    for document in documents(params.text, split, Reader(lm.tokenizer)):
        inside = []
        for part in document.text.split("[")[1:]:
            head = part.index("\n") + 1
            said = len(part) - head - 1
            inside += [False] * (1 + head) + [part.startswith("assistant]")] * said + [False]
        ids = lm.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        stream += ([lm.separator_id] if stream else []) + ids
        flags += [False] if len(flags) else []
        place = 0
        for i in ids:
            flags.append(all(inside[place : place + len(texts[i])]))
            place += len(texts[i])
        assert place == len(document.text) == len(inside)
    columns = []
    for values, first in ((stream, lm.separator_id), (flags, False)):
        rows = torch.tensor(values[: n_contexts * (SIZE - 1)]).view(n_contexts, SIZE - 1)
        columns.append(torch.cat([torch.full((n_contexts, 1), first, dtype=rows.dtype), rows], 1))
    return columns[0], columns[1]


def test_an_sae_is_trained_on_what_the_assistant_says(params: Params, lm: LanguageModel, tmp_path: Path) -> None:
    tokens, mask = by_hand(lm, params, "sae_train", TOKENS // SIZE)
    assert 0.2 < mask.float().mean() < 0.8
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", TOKENS)
    assert torch.equal(contexts.tokens, tokens) and torch.equal(contexts.counted, mask)  # ty: ignore
    stream = ActivationStream(lm, tokens, params, counted=mask)
    stream.calibrate()
    served = torch.cat([batch[HOOK].acts for batch in stream]) / stream.buffers[HOOK].calibration.scale
    want = lm.activations(tokens, HOOK)[mask]
    assert len(want) - 16 < len(served) <= len(want) and stream.buffers[HOOK].rows_read == len(want)
    assert (torch.cdist(served.double(), want.double()).min(1).values < 1e-3).all()
    stage.train(params, tmp_path / "out")
    assert load_sae(tmp_path / "out" / "standard").cfg.provenance["tokens"] == len(served)


def test_core_evaluation_counts_the_same_tokens(params: Params, lm: LanguageModel) -> None:
    tokens, mask = by_hand(lm, params, "core_eval", 15)
    contexts = reorder_evenly(token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 15 * SIZE), 6)
    place = {tuple(row): i for i, row in enumerate(tokens.tolist())}
    mask = mask[[place[tuple(row)] for row in contexts.tokens.tolist()]]
    sae = tiny_sae()
    (result,) = dict(evaluation.evaluate({"sae": sae}, lm, params)).values()
    lab = result["eval_result_unstructured"]["lab_v1"]["metrics"]
    assert lab["fraction_tokens_kept"] == pytest.approx(mask[6:].float().mean().item())
    x = lm.activations(contexts.tokens[6:], HOOK)
    l0 = (sae.encode(x, None) != 0).sum(-1)[mask[6:]].float().mean().item()
    assert lab["l0"] == pytest.approx(l0, rel=1e-5)
    assert result["eval_result_metrics"]["sparsity"]["l0"] == pytest.approx(l0, rel=1e-5)
    everything = params.model_copy(update={"text": params.text.model_copy(update={"roles": None})})
    (other,) = dict(evaluation.evaluate({"sae": sae}, lm, everything)).values()
    assert other["eval_result_metrics"] != result["eval_result_metrics"], "another mask is another key of the cache"


def test_latent_statistics_count_the_same_tokens(params: Params, lm: LanguageModel) -> None:
    n = -(-params.analysis.tokens // SIZE)
    tokens, mask = by_hand(lm, params, "core_eval", n)
    sae = tiny_sae()
    stats = collect_stats({"sae": sae}, lm, params)["sae"]
    assert stats.tokens == mask.sum()
    fires = (sae.encode(lm.activations(tokens, HOOK), None) != 0) & mask[..., None]
    assert stats.count.tolist() == fires.sum((0, 1)).tolist()


def test_controls_and_the_preflight_count_the_same_tokens(params: Params, lm: LanguageModel) -> None:
    tokens, mask = by_hand(lm, params, "sae_train", TOKENS // SIZE)
    assert torch.equal(sample_activations(lm, HOOK, params, TOKENS), lm.activations(tokens, HOOK)[mask])
    tokens, mask = by_hand(lm, params, "core_eval", 512 // SIZE)
    loose: Any = params.model_copy(
        update={"preflight": params.preflight.model_copy(update={"min_variance_explained": -1e9})}
    )
    found = preflight({"sae": tiny_sae()}, "sae", lm, loose, preflight_contexts(lm, params))
    norms = lm.activations(tokens, HOOK)[mask].norm(dim=1)
    assert found.report["hooks"][HOOK]["mean_norm"] == pytest.approx(norms.mean().item(), rel=1e-3)
