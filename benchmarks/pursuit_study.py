"""Every pursuit encoder against its size, over trained and untrained dictionaries, for docs/pursuit.md.

    python -m benchmarks.pursuit_study                # some minutes on the packaged model
    python -m benchmarks.pursuit_study --draw-only    # images and tables from the numbers there are

Reads `downloaded_saes/` (run the setup stage first) and writes `docs/pursuit/study.json`, `docs/pursuit/*.png` and the
tables of the page. The table of speeds comes from `python -m benchmarks.pursuit --json docs/pursuit/speed.json`.

Definitions are those of the core evaluation (lab_v1), on fewer contexts. Families share one run, as in the pipeline.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import pursuit_page
from sae_research.config.params import Params, load_params
from sae_research.evals.harness import PreparedSAEs
from sae_research.lm import Batch, LanguageModel, load_language_model
from sae_research.lm.activations import HookActivations
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import round_significant, write_json
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.saes.pursuit.encoders import (
    IHTPSAE,
    MPSAE,
    OMPSAE,
    NonNegativeMPSAE,
    NonNegativeOMPSAE,
    PursuitSAE,
    TopKRefitSAE,
)
from sae_research.saes.sources import PREPARED
from sae_research.stats.predictions import CleanPredictions
from sae_research.stats.reconstruction import ReconstructionStats
from sae_research.text.tokens import reorder_evenly, token_contexts

PAGE = Path("docs/pursuit.md")
FOLDER = Path("docs/pursuit")
LOSS_CONTEXTS = 4
STATISTICS_CONTEXTS = 16
BATCH = 4
"""Contexts at a time."""
MEMBERS: dict[str, tuple[type[PursuitSAE], tuple[int, ...]]] = {
    "ihtp": (IHTPSAE, (1, 2, 5, 10)),
    "topk_refit": (TopKRefitSAE, (1, 2, 5, 10, 20, 50)),
    "mpsae": (MPSAE, (1, 2, 5, 10, 20, 50, 100)),
    "omp": (OMPSAE, (1, 2, 5, 10, 20, 50)),
    "nn_mpsae": (NonNegativeMPSAE, (1, 2, 5, 10, 20, 50, 100)),
    "nn_omp": (NonNegativeOMPSAE, (1, 2, 5, 10, 20, 50)),
}
CONTROLS = ("data_rows", "random")
"""Kinds of control whose dictionaries are studied too."""


class Member(NamedTuple):
    """One encoder of the study."""

    dictionary: str
    """`trained`, `data_rows` or `random`; empty for an SAE with its own encoder."""
    encoder: str
    """Key of `MEMBERS`, or the SAE's name."""
    size: int
    """k or s; 0 for an SAE with its own encoder."""


def study(folder: Path, lm: LanguageModel, params: Params) -> dict[str, Any]:
    """Metrics of every member, dictionary and size, and of the trained SAEs with their own encoders.

    folder: what the setup stage wrote. Raises `UserError` where it holds no baseline or not both untrained
    dictionaries.
    """
    saes = dict(PreparedSAEs(folder, lm))
    baseline = next((sae for sae in saes.values() if sae.cfg.role == "baseline"), None)
    untrained = {sae.cfg.provenance.get("kind"): sae for sae in reversed(saes.values()) if sae.cfg.role == "control"}
    if baseline is None or not set(CONTROLS) <= set(untrained):
        raise UserError(
            f"{folder}: the study needs a baseline and controls {' and '.join(CONTROLS)}; "
            "set controls.names and run the setup stage (dvc repro setup)"
        )
    hook = baseline.cfg.hook_name
    own = {
        Member("", name, 0): sae
        for name, sae in saes.items()
        if sae.cfg.role in ("baseline", "comparison") and sae.cfg.hook_name == hook
    }
    found = own | dict(_members({"trained": baseline} | {kind: untrained[kind] for kind in CONTROLS}))
    contexts = reorder_evenly(
        token_contexts(
            lm.tokenizer,
            lm.separator_id,
            params.text,
            "core_eval",
            (LOSS_CONTEXTS + STATISTICS_CONTEXTS) * params.text.context_size,
        ),
        LOSS_CONTEXTS,
    )
    acts = HookActivations(lm, hook, contexts.tokens, params)
    rows = [member._asdict() | figures for member, figures in _measure(found, acts).items()]
    return round_significant(
        {
            "model": lm.name,
            "hook": hook,
            "d_in": baseline.cfg.d_in,
            "d_sae": baseline.cfg.d_sae,
            "context_size": params.text.context_size,
            "contexts": STATISTICS_CONTEXTS,
            "loss_contexts": LOSS_CONTEXTS,
            "rows": rows,
        }
    )


def _members(dictionaries: dict[str, SparseAutoencoder]) -> Iterator[tuple[Member, SparseAutoencoder]]:
    for key, source in dictionaries.items():
        for name, (cls, sizes) in MEMBERS.items():
            for size in sizes:
                cfg = source.cfg.replace(form=cls.form, architecture=name, options={cls.size_name: size})
                yield Member(key, name, size), cls(source.W_dec, source.b_dec, size, cfg)


@torch.no_grad()
def _measure(saes: dict[Member, SparseAutoencoder], acts: HookActivations) -> dict[Member, dict[str, Any]]:
    """L0, support and variance on the later contexts, loss recovered on the first."""
    named = {"/".join(map(str, member)): sae for member, sae in saes.items()}
    counts = {name: _Counts(sae, acts.lm.device) for name, sae in named.items()}
    losses: dict[str, float] = {}
    last = LOSS_CONTEXTS + STATISTICS_CONTEXTS
    with tqdm(total=len(named) * (1 + -(-STATISTICS_CONTEXTS // BATCH)), desc="pursuit study", dynamic_ncols=True) as bar:
        for start in range(LOSS_CONTEXTS, last, BATCH):
            batch = acts.pool.batch(range(start, min(start + BATCH, last)))
            mask = acts.lab_mask(batch)
            for name, z in encode_each(named, batch.acts, mask):
                counts[name].update(batch.acts, z, mask)
                bar.update()
        batch = acts.pool.batch(range(LOSS_CONTEXTS))
        loss = _Loss(acts, batch)
        for name, z in encode_each(named, batch.acts, loss.mask):
            losses[name] = loss.recovered(named[name].decode(z))
            bar.update()
    return {
        member: counts[name].figures() | {"loss_recovered": losses[name]} for member, name in zip(saes, named, strict=True)
    }


class _Counts:
    """Running statistics of one SAE."""

    def __init__(self, sae: SparseAutoencoder, device: torch.device) -> None:
        self.sae = sae
        self.stats = ReconstructionStats(sae.cfg.d_in, sae.cfg.d_sae, device)
        self.support = self.interpolating = self.sequences = 0

    def update(self, x: Tensor, z: Tensor, mask: Tensor) -> None:
        self.stats.update(self.sae.target(x), self.sae.decode(z), z, mask)
        support_B, limit_B = (z != 0).any(dim=1).sum(-1), mask.sum(1).clamp(max=self.sae.cfg.d_in)
        self.support += int(support_B.sum())
        self.interpolating += 0 if self.sae.per_token else int((support_B >= limit_B).sum())
        self.sequences += len(mask)

    def figures(self) -> dict[str, Any]:
        values = self.stats.metrics()
        return {
            "l0": values["l0"],
            "variance_explained": values["variance_explained"],
            "support": self.support / self.sequences,
            "interpolating_fraction": self.interpolating / self.sequences,
        }


class _Loss:
    """Loss recovered over zero-ablation at the tokens that count, as the core evaluation has it."""

    def __init__(self, acts: HookActivations, batch: Batch) -> None:
        self.lm, self.hook, self.batch, self.mask = acts.lm, acts.hook, batch, acts.lab_mask(batch)
        self.predictions = CleanPredictions(self.lm.resume(self.hook, batch.acts, batch.tokens), batch.tokens)
        self.clean = float(self.predictions.ce[self.mask[:, :-1]].double().mean())
        self.zero = self._patched(torch.zeros_like(batch.acts))

    def recovered(self, x_hat: Tensor) -> float:
        return (self.zero - self._patched(x_hat)) / (self.zero - self.clean)

    def _patched(self, x_hat: Tensor) -> float:
        edited = torch.where(self.mask[..., None], x_hat.to(self.batch.acts.dtype), self.batch.acts)
        ce, _ = self.predictions.compare(self.lm.resume(self.hook, edited, self.batch.tokens))
        return float(ce[self.mask[:, :-1]].double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw-only", action="store_true", help="images and tables from the numbers there are")
    if not parser.parse_args().draw_only:
        params = load_params()
        lm = load_language_model(params.model.name, params.model.device, params.model.torch_dtype)
        write_json(FOLDER / "study.json", study(PREPARED, lm, params))
    for path in pursuit_page.draw(FOLDER):
        print(path)
    pursuit_page.write_tables(PAGE, FOLDER)


if __name__ == "__main__":
    run_main(main)
