"""A small world of known features, and SAEs whose codes are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae_research.config.ground_truth import GroundTruth
from sae_research.evals.ground_truth.data import World
from sae_research.evals.ground_truth.measures import Truth, measure
from sae_research.saes import SAEConfig, SparseAutoencoder

SMALL = {"num_features": 48, "hidden_dim": 24, "hierarchy_roots": 6, "max_probability": 0.2, "min_probability": 0.02}


def world(seed: int = 0, **values: Any) -> World:
    return World(GroundTruth.model_validate({"data": {**SMALL, **values}}).data.whole(), seed)


def truth(n: int = 2048, **values: Any) -> Truth:
    made = world(**values)
    return Truth(made, made.sample(n, "test"), 32)


class Coded(SparseAutoencoder):
    """An SAE that is told its activations."""

    form = "coded"
    tensor_names = ("W_dec", "b_dec")


def coded(rows: Tensor, bias: Tensor) -> SparseAutoencoder:
    return Coded(SAEConfig("coded", rows.shape[1], len(rows)), W_dec=rows, b_dec=bias)


def measured(known: Truth, rows: Tensor, z: Tensor) -> dict[str, float]:
    return measure(coded(rows, known.world.bias), z.view(-1, 32, z.shape[1]), known)


def true_codes(known: Truth) -> Tensor:
    return torch.from_numpy(known.samples.codes.toarray())
