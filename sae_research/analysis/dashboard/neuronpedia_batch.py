"""Latents as Neuronpedia's batch files: what its importer and SAEDashboard read (`batch-0.json`, `batch-1.json`, ...).

Fields and their meaning are those of SAEDashboard 0.8.0 (`NeuronpediaDashboardBatch`). What this project does not compute
(neuron alignment, correlated neurons and features, head weights) is empty there, as the format allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from sae_research.analysis.collect import SAMPLE_LEVELS
from sae_research.analysis.dashboard.latents import Shown, activation_bars, latent_records
from sae_research.runtime.files import write_bytes

LATENTS_PER_BATCH = 128
DECIMALS = 3

Floats = list[FiniteFloat]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Activation(_Strict):
    """One context. Top contexts carry bin_min -1 and bin_contains -1, sampled ones the bounds of their level."""

    bin_min: FiniteFloat
    bin_max: FiniteFloat
    bin_contains: FiniteFloat
    """Share of the latent's firings in the level."""
    tokens: Annotated[list[str], Field(min_length=1)]
    values: Floats
    qualifying_token_index: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _lengths(self) -> Activation:
        if len(self.tokens) != len(self.values) or self.qualifying_token_index >= len(self.tokens):
            raise ValueError("tokens and values are of one length, and the token meant is one of them")
        return self


class Feature(_Strict):
    feature_index: Annotated[int, Field(ge=0)]
    neg_str: list[str] = []
    neg_values: Floats = []
    pos_str: list[str] = []
    pos_values: Floats = []
    frac_nonzero: Annotated[float, Field(ge=0, le=1)]
    freq_hist_data_bar_values: Floats = []
    """Middles of the bars."""
    freq_hist_data_bar_heights: Floats = []
    logits_hist_data_bar_values: Floats = []
    logits_hist_data_bar_heights: Floats = []
    n_prompts_total: Annotated[int, Field(ge=1)]
    n_tokens_in_prompt: Annotated[int, Field(ge=1)]
    dataset: str
    activations: list[Activation] = []
    neuron_alignment_indices: list[int] = []
    neuron_alignment_values: Floats = []
    neuron_alignment_l1: Floats = []
    correlated_neurons_indices: list[int] = []
    correlated_neurons_l1: Floats = []
    correlated_neurons_pearson: Floats = []
    correlated_features_indices: list[int] = []
    correlated_features_l1: Floats = []
    correlated_features_pearson: Floats = []
    decoder_weights_dist: Floats = []
    vector: Floats = []


class Batch(_Strict):
    model_id: Annotated[str, Field(min_length=1)]
    layer: Annotated[int, Field(ge=0)]
    sae_set: Annotated[str, Field(min_length=1)]
    features: list[Feature]


def write_batches(shown: Shown, folder: Path) -> list[Path]:
    """Write one SAE's files; every one is checked against the schema first. Dead latents are left out, as in
    Neuronpedia's own files, and listed in `skipped_indexes.json`."""
    paths = []
    for number, batch in enumerate(batches(shown)):
        paths.append(folder / f"batch-{number}.json")
        write_bytes(paths[-1], orjson.dumps(batch.model_dump()))
    dead = np.flatnonzero(shown.stats.count == 0).tolist()
    write_bytes(
        folder / "skipped_indexes.json",
        orjson.dumps({"model_id": _model_id(shown), "layer": _layer(shown), "sae_set": shown.name, "skipped_indexes": dead}),
    )
    return paths


def batches(shown: Shown) -> Iterator[Batch]:
    """An SAE's latents, `LATENTS_PER_BATCH` at a time."""
    for first in range(0, shown.stats.d_sae, LATENTS_PER_BATCH):
        latents = range(first, min(first + LATENTS_PER_BATCH, shown.stats.d_sae))
        records = latent_records(shown, latents)
        bars = activation_bars(shown.stats, slice(latents.start, latents.stop))
        features = [_feature(shown, record, sides) for record, sides in zip(records, bars, strict=True) if record["count"]]
        yield Batch(model_id=_model_id(shown), layer=_layer(shown), sae_set=shown.name, features=features)


def _feature(shown: Shown, record: dict[str, Any], sides: list[dict[str, Any]]) -> Feature:
    logits = record["logits"]
    words = (
        {}
        if logits is None
        else {
            "pos_str": [token for token, _ in logits["raised"]],
            "pos_values": _round([v for _, v in logits["raised"]]),
            "neg_str": [token for token, _ in logits["lowered"]],
            "neg_values": _round([v for _, v in logits["lowered"]]),
            "logits_hist_data_bar_heights": _round(logits["counts"]),
            "logits_hist_data_bar_values": _middles(logits["edges"]),
        }
    )
    return Feature(
        feature_index=record["id"],
        frac_nonzero=float(record["density"]),
        freq_hist_data_bar_values=[float(middle) for side in sides for middle in _middles(side["edges"])],
        freq_hist_data_bar_heights=[height for side in sides for height in _round(side["counts"])],
        n_prompts_total=shown.stats.n_contexts,
        n_tokens_in_prompt=shown.stats.context_size,
        dataset=str(shown.stats.about["text"]["dataset"]),
        activations=_activations(shown, record),
        **words,  # ty: ignore[invalid-argument-type]
    )


def _activations(shown: Shown, record: dict[str, Any]) -> list[Activation]:
    levels = SAMPLE_LEVELS
    bounds = [float(shown.stats.quantile(i / levels, [record["id"]])[0]) for i in range(levels + 1)]
    rows = []
    for context in record["contexts"]:
        level, top = context["level"], (-1.0, float(record["max"]), -1.0)
        low, high, share = top if level < 0 else (bounds[level], bounds[level + 1], 1 / levels)
        values = np.zeros(len(context["t"]))
        values[context["i"]] = context["a"]
        rows.append(
            Activation(
                bin_min=low,
                bin_max=high,
                bin_contains=share,
                tokens=shown.stats.strings(context["t"]),
                values=_round(values),
                qualifying_token_index=context["at"],
            )
        )
    return rows


def _round(values: Any) -> list[float]:
    return np.round(np.asarray(values, np.float64), DECIMALS).tolist()


def _middles(edges: Any) -> list[float]:
    return _round((np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2)


def _model_id(shown: Shown) -> str:
    return Path(shown.lm.name).name


def _layer(shown: Shown) -> int:
    found = re.search(r"blocks\.(\d+)\.", shown.sae.cfg.hook_name)
    return int(found.group(1)) if found else 0
