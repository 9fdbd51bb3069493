"""Do a crosscoder's latents matter to the finetuned model? Latents of each kind are ablated in its stream, and what that
changes of its predictions is set against ablations of the same size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from sae_research.saes import SparseAutoencoder
from sae_research.stats.predictions import CleanPredictions, total
from sae_research.transfer.crosscoder import LatentSums, MatchedRows, latent_frame, matched, summary, trained
from sae_research.transfer.loading import Pair
from sae_research.transfer.losses import Runs
from sae_research.transfer.table import as_tsv
from sae_research.transfer.text import TextSource, token_bar

ENDS = ("base_end", "finetuned_end")
"""The latents of the smallest and of the largest share, whatever that is: classes of one model may be empty."""
GROUPS = ("base_only", "shared", "finetuned_only", *ENDS)
NEAREST = 8
"""A control is drawn from so many shared latents of the nearest size."""


class Check(NamedTuple):
    """One latent to ablate, and what it is compared with."""

    latent: int
    matched: int | None
    """A shared latent that writes about as much into the finetuned model on the same text."""
    direction: Tensor
    """A random direction as long as the latent's decoder [d_hook]."""


def crosscoder_report(pair: Pair, limit: float, progress: str | None = None) -> dict[str, Any]:
    """{`result`: everything as JSON, `table`: all latents as text}. limit: largest norm at the SAE's hook that is no
    outlier."""
    config, params = pair.params.transfer.crosscoder, pair.params
    assert config is not None
    sae = trained(pair, limit, progress)
    sums = LatentSums(sae)
    for found in matched(pair, limit, config.held_out_tokens, pair.source, params.transfer.batch_size):
        sums.update(found.rows)
    frame = latent_frame(sums)
    setting = {key: value for key, value in config.model_dump().items() if value is not None}
    result = {"setting": setting, **summary(sums, frame), "ablations": ablations(pair, sae, frame, limit)}
    return {"result": result, "table": as_tsv(frame)}


def own_text(pair: Pair) -> TextSource:
    """The finetune's own kind of text, where the stage made it; else the text at hand. Held out."""
    config = pair.params.transfer
    made_here = config.finetuned_model is None and not pair.source.own
    return pair.source._replace(kind=config.own_finetune.source) if made_here else pair.source


@torch.no_grad()
def ablations(pair: Pair, sae: SparseAutoencoder, frame: pd.DataFrame, limit: float) -> dict[str, Any]:
    """KL(finetuned || finetuned without a latent's contribution `f W_dec` to its stream), in nats a counted token, on the
    finetune's own text; `kl_matched` of a random shared latent of about equal contribution, `kl_direction` of equal
    activations on the same tokens along a random direction as long as the decoder. Means over a group's latents, and each.

    Of a group also what `Patches` gives. frame: of `latent_frame`. Only latents that fire on this text are taken: of a class
    those that contribute most."""
    config, params = pair.params.transfer.crosscoder, pair.params
    assert config is not None
    source = own_text(pair)

    def text(label: str | None) -> Iterator[MatchedRows]:
        size = params.transfer.patched_batch_size
        with token_bar(config.checked_tokens, label) as bar:
            for found in matched(pair, limit, config.checked_tokens, source, size):
                yield found
                bar.update(found.batch.n_tokens)

    energy = sum((sae.encode(found.rows[None])[0].double().square().sum(0).cpu() for found in text(None)), torch.zeros(1))
    energy = energy * sae.W_dec.chunk(2, dim=1)[1].double().square().sum(1).cpu()
    groups = chosen(frame, energy, config.checked)
    checks = _checks(sae, frame, energy, groups, params.random_seed)
    sums: dict[int, Tensor] = {latent: torch.zeros(3, dtype=torch.float64) for latent in checks}
    patches = Patches(pair, sae, groups, checks)
    tokens = 0
    for found in text("crosscoder: ablations"):
        tokens += len(found.index[1])
        runs, z = _runs(pair, found), sae.encode(found.rows[None])[0]
        _add(sae, runs, found, z, checks, sums)
        patches.add(runs, found, z)
    rows = {latent: _row(latent, frame, checks[latent], sums[latent] / max(tokens, 1)) for latent in checks}
    return {
        "text": source.kind or "the text at hand",
        "tokens": tokens,
        **patches.clean(tokens),
        "groups": {
            name: _group([rows[latent] for latent in latents]) | patches.of(name, tokens) for name, latents in groups.items()
        },
        "latents": [rows[latent] for latent in sorted(rows)],
    }


def chosen(frame: pd.DataFrame, energy: Tensor, number: int) -> dict[str, list[int]]:
    """By group the latents to check. energy: what each writes into the finetuned model, summed squares [d_sae]."""
    fires = frame[(energy > 0).numpy() & frame.finetuned_share.notna()].assign(energy=energy[energy > 0].numpy())
    found = {}
    for name in GROUPS:
        if name in ENDS:
            part = fires.sort_values(["finetuned_share", "latent"], ascending=[name == "base_end", True])
        else:
            part = fires[fires["class"] == name].sort_values(["energy", "latent"], ascending=[False, True])
        found[name] = [int(latent) for latent in part.latent.head(number)]
    return found


def _checks(
    sae: SparseAutoencoder, frame: pd.DataFrame, energy: Tensor, groups: dict[str, list[int]], seed: int
) -> dict[int, Check]:
    generator = torch.Generator().manual_seed(seed)
    latents = sorted({latent for group in groups.values() for latent in group})
    free = (torch.tensor((frame["class"] == "shared").to_numpy()) & (energy > 0)).nonzero()[:, 0]
    decoders, checks = sae.W_dec.chunk(2, dim=1)[1], {}
    for latent in latents:
        others = free[free != latent]
        nearest = (energy[others].log() - energy[latent].log()).abs().argsort(stable=True)[:NEAREST]
        drawn = others[nearest[torch.randint(len(nearest), (1,), generator=generator)]] if len(nearest) else None
        direction = torch.nn.functional.normalize(torch.randn(decoders.shape[1], generator=generator), dim=0)
        direction = direction.to(decoders) * decoders[latent].norm()
        checks[latent] = Check(latent, None if drawn is None else int(drawn), direction)
    return checks


def _runs(pair: Pair, found: MatchedRows) -> Runs:
    """The finetuned model on a batch; the tokens that count are those that both models read."""
    lm, tokens, acts = pair.finetuned, found.batch.finetuned.tokens, found.acts["finetuned"]
    counted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    counted.view(-1)[found.index[1]] = True
    clean = CleanPredictions(lm.resume(pair.hook, acts, tokens), tokens)
    return Runs(lm, pair.hook, tokens, acts, clean, counted, counted)


def _add(
    sae: SparseAutoencoder,
    runs: Runs,
    found: MatchedRows,
    z: Tensor,
    checks: dict[int, Check],
    sums: dict[int, Tensor],
) -> None:
    """The sums of KL over tokens that count: of each latent, of its matched latent, along its random direction."""
    decoders = sae.W_dec.chunk(2, dim=1)[1]
    for latent, check in checks.items():
        edits = [(latent, decoders[latent]), (latent, check.direction)]
        if check.matched is not None:
            edits.insert(1, (check.matched, decoders[check.matched]))
        else:
            sums[latent][1] = torch.nan
        places = (0, 2) if check.matched is None else (0, 1, 2)
        for place, (which, direction) in zip(places, edits, strict=True):
            sums[latent][place] += _kl_without(runs, found.index[1], z[:, which], direction)


def _kl_without(runs: Runs, index: Tensor, activations: Tensor, direction: Tensor) -> float:
    """Sum of KL(clean || without `activations` [n] times `direction` [d_hook] at the flat positions `index` [n]) over tokens
    that count. Contexts in which nothing is taken out do not run."""
    width = runs.tokens.shape[1]
    rows = torch.unique(index[activations != 0] // width)
    if not len(rows):
        return 0.0
    put = runs.acts.clone()
    put.view(-1, put.shape[-1])[index] -= activations[:, None].to(put) * direction.to(put)
    part = runs.part(rows)
    _, kl = part.run(put[rows], part.counted)
    return total(kl, part.counted)


class Patches:
    """Does a group of latents carry the finetune? The base model's stream gets what they write in the finetuned model in
    place of what they write in its own, `sum f (W_dec_finetuned - W_dec_base)`, all of the group together.

    `kl_base`: KL(finetuned || base) without that, `kl_patched_base` with it, `kl_patched_base_matched` with the latents
    matched to the group's instead; nats a counted token. Only where both models read the same ids and predict the same ones.
    """

    def __init__(self, pair: Pair, sae: SparseAutoencoder, groups: dict[str, list[int]], checks: dict[int, Check]) -> None:
        self.pair, self.groups = pair, {name: latents for name, latents in groups.items() if latents}
        self.possible = not pair.source.own and pair.base.vocab_size == pair.finetuned.vocab_size
        base, finetuned = sae.W_dec.chunk(2, dim=1)
        self.difference = finetuned - base
        self.matched = {
            name: sorted({other for latent in latents if (other := checks[latent].matched) is not None})
            for name, latents in self.groups.items()
        }
        self.base, self.sums = 0.0, {name: [0.0, 0.0] for name in self.groups}

    def add(self, runs: Runs, found: MatchedRows, z: Tensor) -> None:
        """z: latents of the matched tokens [n, d_sae]."""
        if not self.possible:
            return
        self.base += self._kl(runs, found, z, [])
        for name, latents in self.groups.items():
            for place, patched in enumerate((latents, self.matched[name])):
                self.sums[name][place] += self._kl(runs, found, z, patched)

    def _kl(self, runs: Runs, found: MatchedRows, z: Tensor, latents: list[int]) -> float:
        put = found.acts["base"].clone()
        put.view(-1, put.shape[-1])[found.index[0]] += (z[:, latents] @ self.difference[latents]).to(put)
        return total(runs.clean.compare(self.pair.base.resume(self.pair.hook, put, runs.tokens))[1], runs.counted)

    def clean(self, tokens: int) -> dict[str, float]:
        """`kl_base`, where it is defined."""
        return {"kl_base": self.base / max(tokens, 1)} if self.possible else {}

    def of(self, name: str, tokens: int) -> dict[str, float]:
        """The values of a group; nothing for one without latents."""
        if not self.possible or name not in self.groups:
            return {}
        found = {"kl_patched_base": self.sums[name][0] / max(tokens, 1)}
        return found | ({"kl_patched_base_matched": self.sums[name][1] / max(tokens, 1)} if self.matched[name] else {})


def _row(latent: int, frame: pd.DataFrame, check: Check, kl: Tensor) -> dict[str, Any]:
    row = frame.iloc[latent]
    found: dict[str, Any] = {
        "latent": latent,
        "class": row["class"],
        "finetuned_share": float(row.finetuned_share),
        "density": float(row.density),
        "kl": float(kl[0]),
        "kl_direction": float(kl[2]),
    }
    if check.matched is not None:
        found |= {"kl_matched": float(kl[1]), "matched_latent": check.matched}
    for key in ("nu_error", "nu_reconstruction"):
        if pd.notna(row[key]):
            found[key] = float(row[key])
    return found | ({"verdict": row.verdict} if row.verdict else {})


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"latents": [row["latent"] for row in rows]}
    for key in ("finetuned_share", "kl", "kl_matched", "kl_direction"):
        values = [row[key] for row in rows if key in row]
        if values:
            found[key] = sum(values) / len(values)
    if rows:
        found["above_direction"] = sum(row["kl"] > row["kl_direction"] for row in rows)
        if all("kl_matched" in row for row in rows):
            found["above_matched"] = sum(row["kl"] > row["kl_matched"] for row in rows)
    return found
