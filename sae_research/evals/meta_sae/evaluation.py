"""Meta-SAE: how far the latents of an SAE decompose into fewer, shared ones (arXiv 2502.04878).

A BatchTopK SAE of a quarter of the width is trained on the decoder's rows. The metric is the fraction of their variance
about their mean that it explains: high values say that latents are combinations of common parts. It is measured on the rows
that it was trained on, so a random dictionary, a row of every table, shows what memorising alone is worth.

Source: SAE Bench 0.6.0, sae_bench/evals/meta_structure/main.py, and what SAELens 6 does there: Adam at a constant rate,
gradients clipped to norm 1, no auxiliary loss within 2000 steps. Of a batch of n rows the k n largest activations stay,
each measured by its pre-activation times the norm of its decoder row; that norm cancels in the reconstruction, so that it
only decides what is active. SAE Bench trains under bfloat16 autocast; here everything is float32.

Only the decoder is read: SAEs over one dictionary share one run, and the language model is not used.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from sae_research.config.evaluation_params import MetaSAE
from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import infos_of, made_once
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Guard, SAEInfo
from sae_research.saes.registry import code_fingerprint
from sae_research.stats.intervals import interval, ratio
from sae_research.training.products import Support, decode_at, encode_at

INIT_NORM = 0.1


class Code(NamedTuple):
    """Rows encoded and decoded."""

    x_hat: Tensor
    """[rows, d_in]"""
    active: Tensor
    """Numbers of the active entries of [rows, width], flattened, in order [N]."""


class BatchTopKSAE(nn.Module):
    """`x_hat = z W_dec + b_dec`, `z = (x - b_dec) W_enc^T + b_enc` at the active entries and zero elsewhere."""

    def __init__(self, d_in: int, width: int, k: float, generator: torch.Generator) -> None:
        super().__init__()
        directions_FD = torch.rand(width, d_in, generator=generator) - 0.5  # SAELens' initial directions are uniform too
        rows_FD = INIT_NORM * nn.functional.normalize(directions_FD, dim=1)
        self.k = k
        self._hint = 0.0
        self.W_enc, self.W_dec = nn.Parameter(rows_FD.clone()), nn.Parameter(rows_FD.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(d_in))

    def forward(self, x_BD: Tensor) -> Code:
        width = len(self.b_enc)
        with torch.no_grad():
            centred_BD = x_BD - self.b_dec
            pre_BF = torch.addmm(self.b_enc, centred_BD, self.W_enc.T)
            acts = (pre_BF * self.W_dec.norm(dim=1)).relu().flatten()
            active = self._largest(acts, min(int(self.k * len(x_BD)), len(acts)))
        if x_BD.device.type != "cpu":
            return Code(self._decode_densely(x_BD, active), active)
        crow = torch.zeros(len(x_BD) + 1, dtype=torch.long)
        crow[1:] = torch.bincount(active // width, minlength=len(x_BD)).cumsum(0)
        support = Support(crow, active % width, width)
        z_N = encode_at(support, pre_BF.flatten()[active], centred_BD, self.W_enc, self.b_enc, self.b_dec)
        return Code(decode_at(support, z_N, self.W_dec) + self.b_dec, active)

    def _largest(self, acts: Tensor, n: int) -> Tensor:
        """Numbers of the n largest of `acts` that are not zero, in order.

        Sorting partially is a third of a step's work, so it looks above the limit of the last batch, lowered a little,
        and at everything only where too few are there. The outcome is the same.
        """
        candidates = (acts > self._hint).nonzero()[:, 0]
        if len(candidates) < n and self._hint > 0:
            candidates = (acts > 0).nonzero()[:, 0]
        if len(candidates) > n:
            candidates = candidates[acts[candidates].topk(n, sorted=False).indices].sort().values
        self._hint = 0.8 * float(acts[candidates].min()) if len(candidates) else 0.0
        return candidates

    def _decode_densely(self, x_BD: Tensor, active: Tensor) -> Tensor:
        """The same by plain autograd, which a GPU prefers."""
        pre_BF = torch.addmm(self.b_enc, x_BD - self.b_dec, self.W_enc.T)
        kept = torch.zeros(pre_BF.numel(), device=pre_BF.device)
        kept[active] = 1.0
        return (pre_BF * kept.view_as(pre_BF)) @ self.W_dec + self.b_dec


def train_meta_sae(rows_ND: Tensor, config: MetaSAE, seed: int) -> BatchTopKSAE:
    """Trained on `rows_ND` [d_sae, d_in] float32, whose device it uses; batches are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    n_rows, d_in = rows_ND.shape
    width = max(math.ceil(n_rows * config.width_ratio), config.k)
    sae = BatchTopKSAE(d_in, width, config.k, generator).to(rows_ND.device)
    optimiser = torch.optim.Adam(sae.parameters(), lr=config.learning_rate, fused=rows_ND.device.type != "mps")
    for _ in range(config.train_steps):
        index = torch.randint(n_rows, (config.train_batch_size,), generator=generator)
        x_BD = rows_ND[index.to(rows_ND.device)]
        loss = (sae(x_BD).x_hat - x_BD).square().sum() / len(x_BD)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
    return sae


_SAE_BENCH_ROWS = 4096
_CLUSTERS = 256
"""Rows are pooled at random into so many groups for the interval."""


def evaluate(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `MetaStructureEvalOutput` in plain data.

    An SAE whose decoder rows do not vary, or whose meta-SAE has no metrics, is skipped. `lm` only says the device.
    """
    guard, infos = Guard(stage.skip), infos_of(saes)
    dictionaries = shared_dictionaries(saes)
    stage.notes["shared_dictionaries"] = {name: first for name, first in dictionaries.items() if name != first}
    found: dict[str, dict[str, Any]] = {}
    with tqdm(
        total=len(set(dictionaries.values())), desc="train meta-SAEs", unit="dictionary", dynamic_ncols=True, file=sys.stderr
    ) as bar:
        for name, first in dictionaries.items():
            with guard.on(name):
                if first not in found:
                    bar.update()
                    found[first] = _of_dictionary(saes[first].W_dec, params, lm.device)
                yield name, _result(name, infos[name], params, found[first])


def shared_dictionaries(saes: Mapping[str, SparseAutoencoder]) -> dict[str, str]:
    """SAE -> the first SAE with the same decoder rows, up to the rounding of their normalisation. Of every SAE a corner of
    its rows is kept; only where two agree are both opened."""

    def same(one: Tensor, other: Tensor) -> bool:
        return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6)

    corners: dict[str, tuple[torch.Size, Tensor]] = {}
    found = {}
    for name in saes:
        rows = saes[name].W_dec
        shape, corner = rows.shape, rows[:64, :64].clone()
        alike = (first for first, (size, its) in corners.items() if size == shape and same(its, corner))
        found[name] = next((first for first in alike if same(saes[first].W_dec, rows)), name)
        if found[name] == name:
            corners[name] = shape, corner
    return found


def _of_dictionary(W_dec: Tensor, params: Params, device: torch.device) -> dict[str, Any]:
    """Metrics of every seed, kept in the result cache. Raises `UserError` where the rows do not vary."""
    rows_ND = W_dec.detach().float().to(device)
    if not bool((rows_ND != rows_ND[0]).any()):
        raise UserError("the rows of its decoder do not vary")
    config = params.meta_sae
    one_seed = fingerprint(
        [
            fingerprint([list(rows_ND.shape), rows_ND.cpu().numpy().tobytes().hex()]),
            device.type,
            config.model_dump(exclude={"n_seeds"}),
            code_fingerprint(__name__),
        ]
    )

    def of_seed(number: int) -> dict[str, Any]:
        seed = int(fingerprint([params.random_seed, "meta_sae", number])[:12], 16)
        return measure(train_meta_sae(rows_ND, config, seed), rows_ND)

    keys = [fingerprint([one_seed, params.random_seed, number])[:40] for number in range(config.n_seeds)]
    return {"seeds": [made_once("meta_sae", key, partial(of_seed, number)) for number, key in enumerate(keys)]}


@torch.no_grad()
def measure(sae: BatchTopKSAE, rows_ND: Tensor) -> dict[str, Any]:
    """JSON-able metrics of one trained meta-SAE on the rows [d_sae, d_in].

    SAE Bench encodes 4096 rows at a time, and the k n largest activations are those of the rows together; ours encodes
    all at once, so that no metric depends on that number. Up to 4096 rows the two are one.
    """
    centred = (rows_ND - rows_ND.mean(0)).square().sum(1)
    squared_errors = torch.cat([(sae(chunk).x_hat - chunk).square().sum(1) for chunk in rows_ND.split(_SAE_BENCH_ROWS)])
    code = sae(rows_ND)
    residual = (code.x_hat - rows_ND).square().sum(1)
    width = len(sae.b_enc)
    groups = torch.randperm(len(rows_ND), generator=torch.Generator().manual_seed(0)) % _CLUSTERS
    count = min(_CLUSTERS, len(rows_ND))
    return {
        "sae_bench": {
            "decoder_fraction_variance_explained": 1 - float(squared_errors.sum() / centred.sum()),
            "final_reconstruction_mse": float(squared_errors.sum()) / rows_ND.numel(),
        },
        "explained": _by_group(centred - residual, groups, count),
        "variance": _by_group(centred, groups, count),
        "l0": len(code.active) / len(rows_ND),
        "fraction_alive": len((code.active % width).unique()) / width,
        "width": width,
    }


def _by_group(values: Tensor, groups: Tensor, count: int) -> list[float]:
    return np.bincount(groups.numpy(), values.double().cpu().numpy(), minlength=count).tolist()


def _result(name: str, info: SAEInfo, params: Params, found: dict[str, Any]) -> dict[str, Any]:
    seeds = found["seeds"]
    return harness.output(
        "meta_sae",
        name,
        info,
        config=_sae_bench_config(params.meta_sae, params.random_seed),
        # no time in results: equal runs write equal bytes
        metrics={"meta_structure": {**seeds[0]["sae_bench"], "train_time_seconds": 0.0}},
        unstructured={harness.LAB: _lab_block(seeds, params.random_seed)},
    )


def _sae_bench_config(config: MetaSAE, seed: int) -> dict[str, Any]:
    return {
        "random_seed": seed,
        "width_ratio": config.width_ratio,
        "k": config.k,
        "train_steps": config.train_steps,
        "train_batch_size": config.train_batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": 0.0,
        "autocast": False,
        "eval_batch_size": _SAE_BENCH_ROWS,
        "dead_feature_window": 2000,
        "feature_sampling_window": 200,
        "dtype": "float32",
    }


def _lab_block(seeds: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Means over seeds; the interval draws rows of the dictionary, for the meta-SAEs at hand."""
    explained, variance = (np.mean([figures[key] for figures in seeds], axis=0) for key in ("explained", "variance"))
    share = ratio(explained, variance)
    bounds = interval(share, seed)
    return {
        "metrics": {
            "meta_sae_variance_explained": share.value,
            "meta_sae_l0": float(np.mean([figures["l0"] for figures in seeds])),
            "meta_sae_fraction_alive": float(np.mean([figures["fraction_alive"] for figures in seeds])),
        },
        "intervals": {} if bounds is None else {"meta_sae_variance_explained": list(bounds)},
        "width": seeds[0]["width"],
        "seeds": [sum(figures["explained"]) / sum(figures["variance"]) for figures in seeds],
    }
