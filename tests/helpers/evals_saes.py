"""SAEs of every kind for the tiny model, in memory."""

from __future__ import annotations

from typing import Any

import torch

from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import LinearSAE, StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE

D, HOOK = 32, "blocks.1.hook_resid_post"


def config(form: str, d_sae: int = 64, **options: Any) -> SAEConfig:
    return SAEConfig(form=form, d_in=D, d_sae=d_sae, hook_name=HOOK, options=options)


def dictionary(seed: int = 0, d_sae: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(d_sae, D, generator=generator), dim=1)


def standard(seed: int = 0, sign: float = 1.0) -> StandardSAE:
    W = dictionary(seed)
    return StandardSAE(
        config("standard"), W_enc=W.T.contiguous(), b_enc=torch.full((64,), -0.5), W_dec=W * sign, b_dec=torch.zeros(D)
    )


def identity() -> LinearSAE:
    return LinearSAE(config("linear", D), W_enc=torch.eye(D), b_enc=torch.zeros(D), W_dec=torch.eye(D), b_dec=torch.zeros(D))


def mean_predictor(mean: torch.Tensor) -> LinearSAE:
    return LinearSAE(config("linear", D), W_enc=torch.zeros(D, D), b_enc=torch.zeros(D), W_dec=torch.eye(D), b_dec=mean)


def everything() -> dict[str, SparseAutoencoder]:
    W, b = dictionary(), torch.zeros(D)
    return {
        "standard": standard(),
        "identity": identity(),
        "mpsae_s3": MPSAE(W, b, 3, config("matching_pursuit", s=3)),
        "mpsae_s6": MPSAE(W, b, 6, config("matching_pursuit", s=6)),
        "ihtp_k1": IHTPSAE(W, b, 1, config("ihtp", k=1)),
        "ihtp_k4": IHTPSAE(W, b, 4, config("ihtp", k=4)),
    }


MOVIE_REVIEWS: dict[str, Any] = {
    "dataset_names": ["113_movie_sent"],
    "max_texts": 140,
    "k_values": [1],
    "context_length": 16,
    "probe_train_set_size": 32,
    "probe_test_set_size": 16,
}
"""Section `sparse_probing_sae_probes` of one small task."""


def small_sections(tasks: str) -> dict[str, Any]:
    """Sections of parameters by which evaluations take seconds. tasks: a task file."""
    probing = {"dataset_names": [tasks], "context_length": 12, "probe_train_set_size": 16, "probe_test_set_size": 8}
    return {
        "sparse_probing": {**probing, "k_values": [1], "train_draws": 2},
        "tpp": {"n_values": [2], "probe_epochs": 2},
        "absorption": {"icl_examples": 2, "icl_prompts": 3, "max_k_value": 2, "min_ground_truth_probe_f1": 0.1},
        "sparse_probing_sae_probes": {
            "dataset_names": ["117_us_state_FL"],
            "max_texts": 132,
            "k_values": [1],
            "context_length": 8,
            "probe_train_set_size": 32,
            "probe_test_set_size": 16,
        },
        "meta_sae": {"train_steps": 2, "train_batch_size": 8},
        "autointerp": {"buffer": 2, "n_latents": 3, "n_random_ex_for_scoring": 2},
    }
