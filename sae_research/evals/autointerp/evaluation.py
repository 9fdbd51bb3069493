"""Autointerp: can a language model explain a latent from windows of text, and then tell by that explanation which other
windows the latent fires in?

After SAE Bench 0.6.0 (sae_bench/evals/autointerp/main.py), with any OpenAI-compatible endpoint as the judge. One judge's
answers serve both definitions. SAE Bench's score takes random windows for inactive even where the latent fires in them. Ours
(`lab_v1`) counts every window as what it is, adds the balanced score (chance is 0.5), and leaves out answers that name no
window or none that exists. Windows are those of `token_mask`; signed codes are ranked by absolute value.

Windows are kept by SAE, answers by the content of the question: a run that was cut off continues without paying twice.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.autointerp import judge, windows
from sae_research.evals.autointerp.client import Budget, ChatClient, check_budget
from sae_research.evals.autointerp.judge import FAILED, SCORED, UNPARSABLE, Sheet, make_sheets
from sae_research.evals.autointerp.windows import Windows, collect_windows
from sae_research.evals.harness import Scores, by_read_hook, infos_of
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.stats.intervals import interval, ratio
from sae_research.text.tokens import token_contexts

_NOT_A_NUMBER = -1.0
"""SAE Bench's own mark, in its block only: JSON has no NaN."""


def result(
    name: str, info: SAEInfo, chosen: Windows, records: list[dict[str, Any]], lm: LanguageModel, params: Params
) -> dict[str, Any]:
    """A validated `AutoInterpEvalOutput` as plain data. At least one record must be scored.

    The unstructured block holds SAE Bench's record per latent, under the latent's number, and ours in `lab_v1`.
    """
    bench = [record["score_sae_bench"] for record in records if "score_sae_bench" in record]
    deviation = _deviation(bench)
    latents = {str(record["latent"]): _as_sae_bench(record) for record in records if "score_sae_bench" in record}
    plain = harness.output(
        "autointerp",
        name,
        info,
        config=_config(lm, params),
        metrics={
            "autointerp": {
                "autointerp_score": statistics.fmean(bench),
                "autointerp_std_dev": _NOT_A_NUMBER if deviation is None else deviation,
            }
        },
        unstructured={**latents, harness.LAB: _lab(chosen, records, params)},
        sae_bench="autointerp:AutoInterpEvalOutput",
    )
    # SAE Bench's config fills in the number of latents named, and then refuses to read what it wrote
    plain["eval_config"] |= {"n_latents": _config(lm, params)["n_latents"]}
    return plain


def _as_sae_bench(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "latent": record["latent"],
        "explanation": record["explanation"],
        "predictions": record["predictions"],
        "correct seqs": record["active_sae_bench"],
        "score": record["score_sae_bench"],
    }


def _lab(chosen: Windows, records: list[dict[str, Any]], params: Params) -> dict[str, Any]:
    scores = [record["score"] for record in records if record["state"] == SCORED]
    balanced = [record["balanced_score"] for record in records if "balanced_score" in record]
    states = Counter(record["state"] for record in records)
    figures = {
        "autointerp_score": statistics.fmean(scores),
        "autointerp_std": _deviation(scores),
        "autointerp_balanced_score": statistics.fmean(balanced) if balanced else None,
        "latents_scored": states[SCORED],
        "latents_unparsable": states[UNPARSABLE],
        "latents_failed": states[FAILED],
        "answers_cut_off": sum(record["cut_off"] for record in records),
    }
    intervals = {
        "autointerp_score": interval(ratio(scores), params.random_seed),
        "autointerp_balanced_score": interval(ratio(balanced), params.random_seed),
    }
    return {
        "metrics": {key: value for key, value in figures.items() if value is not None},
        "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
        "judge": params.autointerp.model,
        "alive_latents": chosen.alive,
        "passed_over": chosen.passed_over,
        "prompt_tokens": sum(record["prompt_tokens"] for record in records),
        "completion_tokens": sum(record["completion_tokens"] for record in records),
        "latents": records,
    }


def _deviation(values: list[float]) -> float | None:
    """Standard deviation with n - 1, None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _config(lm: LanguageModel, params: Params) -> dict[str, Any]:
    config = params.autointerp
    shared = (
        "dead_latent_threshold",
        "buffer",
        "act_threshold_frac",
        "total_tokens",
        "max_tokens_in_explanation",
        "use_demos_in_explanation",
        "n_top_ex_for_generation",
        "n_iw_sampled_ex_for_generation",
        "n_top_ex_for_scoring",
        "n_random_ex_for_scoring",
        "n_iw_sampled_ex_for_scoring",
    )
    named = config.override_latents
    return {
        **{key: getattr(config, key) for key in shared},
        "model_name": lm.name,
        "n_latents": config.n_latents if named is None else None,
        "override_latents": named,
        "random_seed": params.random_seed,
        "dataset_name": params.text.dataset,
        "llm_context_size": params.text.context_size,
        "llm_batch_size": params.model.llm_batch_size,
        "llm_dtype": params.model.torch_dtype,
        "no_overlap": True,
        "scoring": True,
    }


_SELECTION = (
    "override_latents",
    "n_latents",
    "dead_latent_threshold",
    "buffer",
    "n_top_ex_for_generation",
    "n_iw_sampled_ex_for_generation",
    "n_top_ex_for_scoring",
    "n_iw_sampled_ex_for_scoring",
    "n_random_ex_for_scoring",
)
"""The parameters that windows depend on."""


def evaluate(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `AutoInterpEvalOutput` in plain data.

    The estimated cost is shown before anything is asked. Raises `UserError` when no endpoint is given, the estimate
    exceeds a limit, or, after everything that could be scored was yielded, when the endpoint gave out or left more than
    `max_failed_fraction` of the latents unanswered.
    """
    config = params.autointerp
    client = ChatClient(config, "autointerp")
    if params.text.context_size <= 2 * config.buffer:
        raise UserError(
            f"autointerp.buffer {config.buffer} leaves no window in contexts of {params.text.context_size} "
            "tokens; lower it or raise text.context_size"
        )
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", config.total_tokens)
    guard, tokens = Guard(stage.skip), contexts.tokens
    found = {
        name: chosen
        for name, chosen in find_windows(saes, lm, params, tokens, guard, contexts.counted).items()
        if _usable(name, chosen, params, stage)
    }
    if not found:
        return
    _announce_cost(found, tokens, lm, params, client, stage)
    counts, infos = Counter(), infos_of(saes)
    for name in (name for name in saes if name in found):
        records = _judged(name, make_sheets(found[name], tokens, lm, config, params.random_seed), client, params)
        counts.update(_state_counts(name, records, stage))
        if any(record["state"] == SCORED for record in records):
            with guard.on(name):
                yield name, result(name, infos[name], found[name], records, lm, params)
        else:
            reasons = Counter(record["why"] for record in records).most_common(1)
            stage.skip(name, f"none of its {len(records)} latents could be scored: {reasons[0][0]}")
    _conclude(counts, client, params)


# --- windows ---------------------------------------------------------------------------------


def find_windows(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    params: Params,
    tokens: Tensor,
    guard: Guard | None = None,
    counted: Tensor | None = None,
) -> dict[str, Windows]:
    """Every SAE's windows, kept in the result cache; one model pass per hook. tokens: [contexts, context size]; counted: as
    `Contexts.counted`. Without a `guard` an SAE that fails raises its error."""
    config, found = params.autointerp, {}
    for members in by_read_hook(saes):
        keys = members.keys(lm, _inputs(params, tokens, counted), windows.__name__, __name__)
        scores = Scores("autointerp_windows", members, keys, guard or Guard(None))
        acts = HookActivations(lm, members.hook, tokens, params, counted)

        def score(family: Family, acts: HookActivations = acts) -> Iterator[tuple[str, Any]]:
            for name, chosen in collect_windows(family, acts, config, params.random_seed).items():
                yield name, chosen.to_plain()

        with scores.progress("windows") as bar:
            scores.fill(score, bar)
        found |= {name: Windows.from_plain(plain, config) for name, plain in scores.left().items()}
    return found


def _inputs(params: Params, tokens: Tensor, counted: Tensor | None) -> list[Any]:
    config = params.autointerp.model_dump()
    return [
        {key: config[key] for key in _SELECTION},
        params.token_mask.model_dump(),
        params.random_seed,
        fingerprint(tokens.tolist()),
        *([] if counted is None else [fingerprint(counted.tolist())]),
    ]


def _usable(name: str, chosen: Windows, params: Params, stage: StageFolder) -> bool:
    config = params.autointerp
    wanted = config.n_latents if config.override_latents is None else len(set(config.override_latents))
    if chosen.latents and len(chosen.latents) < wanted:
        print(
            f"{name}: {len(chosen.latents)} of {wanted} latents have windows enough ({chosen.alive} fire on more than "
            f"{config.dead_latent_threshold:g} tokens)",
            flush=True,
        )
    if not chosen.latents:
        n = windows.n_top(config) + windows.n_weighted(config)
        stage.skip(
            name,
            f"no latent to explain: {chosen.alive} fire on more than {config.dead_latent_threshold:g} tokens, "
            f"none has {n} windows; raise autointerp.total_tokens",
        )
    return bool(chosen.latents)


# --- the judge -------------------------------------------------------------------------------


def _announce_cost(
    found: dict[str, Windows], tokens: Tensor, lm: LanguageModel, params: Params, client: ChatClient, stage: StageFolder
) -> None:
    """Show what is about to be asked; raises `UserError` beyond the limits."""
    config, everything, new = params.autointerp, Budget(), Budget()
    for chosen in found.values():
        for sheet in make_sheets(chosen, tokens, lm, config, params.random_seed):
            whole, rest = judge.budgets(sheet, client, config)
            everything, new = (
                Budget(*map(sum, zip(total, part, strict=True))) for total, part in ((everything, whole), (new, rest))
            )
    stage.notes["judge"] = {"model": config.model, "base_url": config.base_url, "estimate": everything.words(config)}
    kept = everything.requests - new.requests
    print(
        f"autointerp asks {config.model} at {client.url}: {new.words(config)}"
        + (f"; {kept:,} more are answered already" if kept else ""),
        flush=True,
    )
    check_budget(new, config, "autointerp", "lower autointerp.n_latents")


def _judged(name: str, sheets: Iterator[Sheet], client: ChatClient, params: Params) -> list[dict[str, Any]]:
    """One record per latent, in the order of the latents."""
    listed = list(sheets)
    answered = client.in_order(lambda sheet: judge.judge(sheet, client, params.autointerp), listed)
    return list(tqdm(answered, total=len(listed), desc=f"judge {name}", unit="latent", dynamic_ncols=True))


def _state_counts(name: str, records: list[dict[str, Any]], stage: StageFolder) -> Counter[str]:
    """Number of latents by state; what went wrong is shown and noted with an instance."""
    counts = Counter(record["state"] for record in records)
    stage.notes.setdefault("latents", {})[name] = dict(sorted(counts.items()))
    for state in sorted(set(counts) - {SCORED}):
        why = next(record["why"] for record in records if record["state"] == state)
        line = f"{counts[state]} of {len(records)} latents {state}, e.g. {why}"
        stage.notes.setdefault("not_scored", {}).setdefault(name, []).append(line)
        print(f"{name}: {line}", flush=True)
    return counts


def _conclude(counts: Counter[str], client: ChatClient, params: Params) -> None:
    asked, failed = sum(counts.values()), counts[FAILED]
    kept = f"{failed} of {asked} latents got no answer; answers so far are kept: run again to ask only for the rest"
    if client.down is not None and failed:
        raise UserError(f"autointerp: {client.url} was given up: {client.down}; {kept}")
    if failed > params.autointerp.max_failed_fraction * asked:
        raise UserError(f"autointerp: {client.url} left too much unanswered: {kept}")
    if not counts[SCORED]:
        raise UserError(
            f"autointerp: none of {asked} latents could be scored: the answers of {params.autointerp.model} "
            "are no lists of examples; another model, or a larger autointerp.max_tokens_in_prediction, may do"
        )
