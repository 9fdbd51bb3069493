"""Do latents matter to a model? Each is ablated in its stream, and what that changes of its predictions is set against
ablations of the same size; and a group of latents writes in the base model's stream what it writes in the finetuned one.

`Latents` are those of a crosscoder of both models here, those of either model's own SAE in `transfer.separate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_research.saes import SparseAutoencoder
from sae_research.stats.intervals import Ratio, interval
from sae_research.stats.predictions import CleanPredictions
from sae_research.transfer.crosscoder import LatentSums, MatchedRows, latent_frame, matched, summary
from sae_research.transfer.loading import MODELS, Pair
from sae_research.transfer.losses import Runs
from sae_research.transfer.table import as_tsv
from sae_research.transfer.text import TextSource, token_bar

ENDS = ("base_end", "finetuned_end")
"""The latents of the smallest and of the largest share, whatever that is: classes of one model may be empty."""
GROUPS = ("base_only", "shared", "finetuned_only", *ENDS)
NEAREST = 8
"""A control is drawn from so many latents of the nearest size."""

Groups = Mapping[str, list[int]]
"""Latents to check, by what they have in common."""


class Latents:
    """Latents that write into both models' streams at the hook. This class: a crosscoder's, with one activation for both."""

    own = "finetuned"
    """The model in which they are ablated ..."""
    other: str | None = None
    """... and the one in which they are ablated besides, as they are active there."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        base, finetuned = sae.W_dec.chunk(2, dim=1)
        self.decoders = {"base": base, "finetuned": finetuned}
        """By model [d_sae, d_hook]."""
        self.difference = finetuned - base

    def activations(self, found: MatchedRows) -> dict[str, Tensor]:
        """By model, of the matched tokens [n, d_sae]."""
        return dict.fromkeys(MODELS, self.sae.encode(found.rows[None])[0])

    def change(self, z: Mapping[str, Tensor], latents: list[int]) -> Tensor:
        """What they write in the finetuned model less what they write in the base model [n, d_hook]."""
        return z["finetuned"][:, latents] @ self.difference[latents]


class Check(NamedTuple):
    """One latent to ablate, and what it is compared with."""

    latent: int
    matched: int | None
    """A control latent that writes about as much into the same model on the same text."""
    direction: Tensor
    """A random direction as long as the latent's decoder [d_hook]."""


def crosscoder_report(pair: Pair, sae: SparseAutoencoder, limit: float, progress: str | None = None) -> dict[str, Any]:
    """{`result`: everything as JSON, `table`: all latents as text}. sae: of `crosscoder.trained`; limit: largest norm at the
    SAE's hook that is no outlier."""
    config, params = pair.params.transfer.crosscoder, pair.params
    assert config is not None
    sums = LatentSums(sae)
    for found in matched(pair, limit, config.held_out_tokens, pair.source, params.transfer.batch_size):
        sums.update(found.rows)
    frame = latent_frame(sums)
    setting = {key: value for key, value in config.model_dump().items() if value is not None}
    result = {"setting": setting, **summary(sums, frame), "ablations": ablations(pair, sae, frame, limit, progress)}
    return {"result": result, "table": as_tsv(frame)}


def own_text(pair: Pair) -> TextSource:
    """The finetune's own kind of text, where the stage made it; else the text at hand. Held out."""
    config = pair.params.transfer
    made_here = config.finetuned_model is None and not pair.source.own
    return pair.source._replace(kind=config.own_finetune.source) if made_here else pair.source


def ablations(
    pair: Pair, sae: SparseAutoencoder, frame: pd.DataFrame, limit: float, progress: str | None = None
) -> dict[str, Any]:
    """What `measured` gives of the crosscoder's latents of every group of `chosen`, with a random shared latent as the
    control of each. frame: of `latent_frame`."""
    config = pair.params.transfer.crosscoder
    assert config is not None
    text = CheckedText(pair, limit, config.checked_tokens)
    choose = partial(chosen, frame, number=config.checked)
    return ablated(Latents(sae), text, choose, (frame["class"] == "shared").to_numpy(), partial(_about, frame), progress)


def chosen(frame: pd.DataFrame, energy: Tensor, number: int) -> dict[str, list[int]]:
    """By group the latents to check: those that fire on the text, of a class those that contribute most. energy: what each
    writes into the finetuned model, summed squares [d_sae]."""
    fires = frame[(energy > 0).numpy() & frame.finetuned_share.notna()].assign(energy=energy[energy > 0].numpy())
    found = {}
    for name in GROUPS:
        if name in ENDS:
            part = fires.sort_values(["finetuned_share", "latent"], ascending=[name == "base_end", True])
        else:
            part = fires[fires["class"] == name].sort_values(["energy", "latent"], ascending=[False, True])
        found[name] = [int(latent) for latent in part.latent.head(number)]
    return found


def _about(frame: pd.DataFrame, latent: int) -> dict[str, Any]:
    row = frame.iloc[latent]
    found = {"class": row["class"], "finetuned_share": float(row.finetuned_share), "density": float(row.density)}
    found |= {key: float(row[key]) for key in ("nu_error", "nu_reconstruction") if pd.notna(row[key])}
    return found | ({"verdict": row.verdict} if row.verdict else {})


# --- any latents -----------------------------------------------------------------------------


class CheckedText(NamedTuple):
    """The text that latents are ablated on: the finetune's own."""

    pair: Pair
    limit: float
    tokens: int

    def batches(self, label: str | None = None) -> Iterator[MatchedRows]:
        """label: of a progress bar; none is shown without."""
        with token_bar(self.tokens, label) as bar:
            size = self.pair.params.transfer.patched_batch_size
            for found in matched(self.pair, self.limit, self.tokens, own_text(self.pair), size):
                yield found
                bar.update(found.batch.n_tokens)


def ablated(
    latents: Latents,
    text: CheckedText,
    choose: Callable[[Tensor], Groups],
    controls: np.ndarray,
    about: Callable[[int], dict[str, Any]],
    progress: str | None = None,
) -> dict[str, Any]:
    """What `measured` gives. choose: the groups, from the latents' `energies`; controls: latents that may be the control of
    one, bool [d_sae]."""
    energy = energies(latents, text)
    groups = choose(energy)
    checks = checks_of(latents, torch.tensor(controls), energy, groups, text.pair.params.random_seed)
    return measured(latents, text, groups, checks, about, progress)


@torch.no_grad()
def energies(latents: Latents, text: CheckedText) -> Tensor:
    """What each latent writes into its own model on the text: sums of squares [d_sae], on the CPU."""
    squares = (latents.activations(found)[latents.own].double().square().sum(0).cpu() for found in text.batches())
    return sum(squares, torch.zeros(1)) * latents.decoders[latents.own].double().square().sum(1).cpu()


def checks_of(latents: Latents, controls: Tensor, energy: Tensor, groups: Groups, seed: int) -> dict[int, Check]:
    """By latent what it is compared with. controls: latents that may serve as such, bool [d_sae], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    wanted = sorted({latent for group in groups.values() for latent in group})
    free = (controls & (energy > 0)).nonzero()[:, 0]
    decoders, checks = latents.decoders[latents.own], {}
    for latent in wanted:
        others = free[free != latent]
        nearest = (energy[others].log() - energy[latent].log()).abs().argsort(stable=True)[:NEAREST]
        drawn = others[nearest[torch.randint(len(nearest), (1,), generator=generator)]] if len(nearest) else None
        direction = torch.nn.functional.normalize(torch.randn(decoders.shape[1], generator=generator), dim=0)
        direction = direction.to(decoders) * decoders[latent].norm()
        checks[latent] = Check(latent, None if drawn is None else int(drawn), direction)
    return checks


@torch.no_grad()
def measured(
    latents: Latents,
    text: CheckedText,
    groups: Groups,
    checks: Mapping[int, Check],
    about: Callable[[int], dict[str, Any]],
    progress: str | None,
) -> dict[str, Any]:
    """KL(model || model without a latent's contribution `f W_dec` to its stream), in nats a counted token of the latent's
    own model; `kl_matched` of the control latent, `kl_direction` of equal activations on the same tokens along the random
    direction, `kl_other` of the latent in `Latents.other`. Means over a group's latents, and each.

    Of a group also what `Patches` gives. Differences within a group have intervals over contexts, where these are enough:
    `over_matched` = kl - kl_matched, `over_direction`, `patch_gain` = kl_base - kl_patched_base, and
    `patch_gain_over_matched` = kl_patched_base_matched - kl_patched_base. about: what else to say of a latent.
    """
    sums = Sums()
    patches = Patches(text.pair, latents, groups, checks)
    models = [model for model in (latents.own, latents.other) if model is not None]
    for found in text.batches(progress and f"{progress}: ablations"):
        runs = {model: _runs(text.pair, found, model) for model in dict.fromkeys([*models, "finetuned"])}
        z = latents.activations(found)
        for model in models:
            sums.add(("tokens", model), runs[model].counted.sum(1))
        _add(latents, runs, found, z, checks, sums)
        patches.add(runs["finetuned"], found, z, sums)
    tokens = float(sums[("tokens", latents.own)].sum())
    rows = {latent: _row(latents, check, about(latent), sums) for latent, check in checks.items()}
    seed = text.pair.params.random_seed
    return {
        "text": own_text(text.pair).kind or "the text at hand",
        "tokens": int(tokens),
        "contexts": len(sums[("tokens", latents.own)]),
        **patches.clean(sums),
        "groups": {
            name: _group([rows[latent] for latent in group])
            | _differences(latents, [checks[latent] for latent in group], sums, seed)
            | patches.of(name, sums, seed)
            for name, group in groups.items()
        },
        "latents": [rows[latent] for latent in sorted(rows)],
    }


class Sums:
    """Sums over tokens by context, of anything that is added under a key."""

    def __init__(self) -> None:
        self.parts: dict[Any, list[np.ndarray]] = {}

    def add(self, key: Any, by_context: Tensor) -> None:
        self.parts.setdefault(key, []).append(by_context.cpu().double().numpy())

    def __getitem__(self, key: Any) -> np.ndarray:
        return np.concatenate(self.parts[key]) if key in self.parts else np.zeros(0)

    def mean(self, key: Any, tokens: Any) -> float:
        """Sum over tokens over their number; 0 without any."""
        return float(self[key].sum()) / max(float(self[tokens].sum()), 1.0)


def _runs(pair: Pair, found: MatchedRows, model: str) -> Runs:
    """One model on a batch; the tokens that count are those that both models read."""
    lm, tokens, acts = pair.models[model], found.batch.sides[model].tokens, found.acts[model]
    counted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    counted.view(-1)[found.index[MODELS.index(model)]] = True
    clean = CleanPredictions(lm.resume(pair.hook, acts, tokens), tokens)
    return Runs(lm, pair.hook, tokens, acts, clean, counted, counted)


def _add(
    latents: Latents,
    runs: Mapping[str, Runs],
    found: MatchedRows,
    z: Mapping[str, Tensor],
    checks: Mapping[int, Check],
    sums: Sums,
) -> None:
    """The sums of KL over tokens that count: of each latent, of its control, along its random direction, and of the latent
    in the other model."""
    for latent, check in checks.items():
        edits = [("kl", latents.own, latent, None), ("kl_direction", latents.own, latent, check.direction)]
        if check.matched is not None:
            edits.append(("kl_matched", latents.own, check.matched, None))
        if latents.other is not None:
            edits.append(("kl_other", latents.other, latent, None))
        for key, model, which, direction in edits:
            along = latents.decoders[model][which] if direction is None else direction
            index = found.index[MODELS.index(model)]
            sums.add((key, latent), _kl_without(runs[model], index, z[model][:, which], along))


def _kl_without(runs: Runs, index: Tensor, activations: Tensor, direction: Tensor) -> Tensor:
    """By context the sum of KL(clean || without `activations` [n] times `direction` [d_hook] at the flat positions `index`
    [n]) over tokens that count. Contexts in which nothing is taken out do not run."""
    n_contexts, width = runs.tokens.shape
    found = torch.zeros(n_contexts, dtype=torch.float64)
    rows = torch.unique(index[activations != 0] // width)
    if not len(rows):
        return found
    put = runs.acts.clone()
    put.view(-1, put.shape[-1])[index] -= activations[:, None].to(put) * direction.to(put)
    part = runs.part(rows)
    _, kl = part.run(put[rows], part.counted)
    found[rows.cpu()] = by_context(kl, part.counted)
    return found


def by_context(values: Tensor, mask: Tensor) -> Tensor:
    """Sums [batch] over the positions where the mask [batch, seq] holds, float64 on the CPU."""
    return torch.where(mask, values, torch.zeros((), device=values.device, dtype=values.dtype)).cpu().double().sum(1)


class Patches:
    """Does a group of latents carry the finetune? The base model's stream gets what they write in the finetuned model in
    place of what they write in its own (`Latents.change`), all of the group together.

    `kl_base`: KL(finetuned || base) without that, `kl_patched_base` with it, `kl_patched_base_matched` with the latents
    matched to the group's instead; nats a counted token. Only where both models read the same ids and predict the same ones.
    """

    def __init__(self, pair: Pair, latents: Latents, groups: Groups, checks: Mapping[int, Check]) -> None:
        self.pair, self.latents = pair, latents
        self.groups = {name: group for name, group in groups.items() if group}
        self.possible = not pair.source.own and pair.base.vocab_size == pair.finetuned.vocab_size
        self.matched = {
            name: sorted({other for latent in group if (other := checks[latent].matched) is not None})
            for name, group in self.groups.items()
        }

    def add(self, runs: Runs, found: MatchedRows, z: Mapping[str, Tensor], sums: Sums) -> None:
        """runs: the finetuned model's; z: as `Latents.activations`."""
        if not self.possible:
            return
        sums.add("patched tokens", runs.counted.sum(1))
        sums.add("kl_base", self._kl(runs, found, z, []))
        for name, group in self.groups.items():
            sums.add(("kl_patched_base", name), self._kl(runs, found, z, group))
            if self.matched[name]:
                sums.add(("kl_patched_base_matched", name), self._kl(runs, found, z, self.matched[name]))

    def _kl(self, runs: Runs, found: MatchedRows, z: Mapping[str, Tensor], group: list[int]) -> Tensor:
        put = found.acts["base"].clone()
        put.view(-1, put.shape[-1])[found.index[0]] += self.latents.change(z, group).to(put)
        return by_context(runs.clean.compare(self.pair.base.resume(self.pair.hook, put, runs.tokens))[1], runs.counted)

    def clean(self, sums: Sums) -> dict[str, float]:
        """`kl_base`, where it is defined."""
        return {"kl_base": sums.mean("kl_base", "patched tokens")} if self.possible else {}

    def of(self, name: str, sums: Sums, seed: int) -> dict[str, Any]:
        """The values of a group; nothing for one without latents."""
        if not self.possible or name not in self.groups:
            return {}
        tokens, own, control = sums["patched tokens"], ("kl_patched_base", name), ("kl_patched_base_matched", name)
        found: dict[str, Any] = {"kl_patched_base": sums.mean(own, "patched tokens")}
        found["patch_gain"] = _bounded(sums["kl_base"] - sums[own], tokens, seed)
        if self.matched[name]:
            found["kl_patched_base_matched"] = sums.mean(control, "patched tokens")
            found["patch_gain_over_matched"] = _bounded(sums[control] - sums[own], tokens, seed)
        return found


def _bounded(numerator: np.ndarray, tokens: np.ndarray, seed: int) -> dict[str, float]:
    """{value, low, high} of a mean over tokens; bounds only where there are contexts enough."""
    figure = Ratio(numerator[tokens > 0], tokens[tokens > 0])
    bounds = interval(figure, seed)
    return {"value": figure.value} | ({} if bounds is None else {"low": bounds[0], "high": bounds[1]})


def _row(latents: Latents, check: Check, about: dict[str, Any], sums: Sums) -> dict[str, Any]:
    found = {"latent": check.latent, **about}
    keys = {"kl": latents.own, "kl_direction": latents.own, "kl_matched": latents.own, "kl_other": latents.other}
    for key, model in keys.items():
        if (key, check.latent) in sums.parts:
            found[key] = sums.mean((key, check.latent), ("tokens", model))
    return found | ({} if check.matched is None else {"matched_latent": check.matched})


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"latents": [row["latent"] for row in rows]}
    for key in ("finetuned_share", "match", "kl", "kl_matched", "kl_direction", "kl_other"):
        values = [row[key] for row in rows if key in row]
        if values:
            found[key] = sum(values) / len(values)
    if rows:
        found["above_direction"] = sum(row["kl"] > row["kl_direction"] for row in rows)
        if all("kl_matched" in row for row in rows):
            found["above_matched"] = sum(row["kl"] > row["kl_matched"] for row in rows)
    return found


def _differences(latents: Latents, group: list[Check], sums: Sums, seed: int) -> dict[str, Any]:
    """Paired differences of a group's mean KL from its controls'."""
    tokens, found = sums[("tokens", latents.own)], {}
    for name, control in (("over_matched", "kl_matched"), ("over_direction", "kl_direction")):
        if group and all((control, check.latent) in sums.parts for check in group):
            each = [sums[("kl", check.latent)] - sums[(control, check.latent)] for check in group]
            found[name] = _bounded(np.mean(each, axis=0), tokens, seed)
    return found
