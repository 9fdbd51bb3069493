"""One prompt with and without SAEs: what the model predicts, which latents fire, and what editing them changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.store import check_latents
from sae_research.lm.generate import unembedding
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder

LatentEdit = Callable[[Tensor], Tensor]
"""From activations of latents [batch, seq, d_sae] to those that take their place."""


class Internals(NamedTuple):
    """What an SAE did in one run. All [batch, seq, ...] in the model's units."""

    input: Tensor
    """Activations of the model at the hook [batch, seq, d_in]."""
    pre: Tensor | None
    """`(x - b_dec) W_enc + b_enc`, before the nonlinearity; None for encoders without such a map."""
    post: Tensor
    """Activations of the latents [batch, seq, d_sae], before any edit."""
    reconstruction: Tensor
    """[batch, seq, d_in], of the unedited latents."""
    error: Tensor
    """input - reconstruction; zero where a token does not count."""
    output: Tensor
    """What the model went on with [batch, seq, d_in]."""
    mask: Tensor
    """Which tokens count [batch, seq]; the others keep the model's own activations."""


class Run(NamedTuple):
    """A run with SAEs in place."""

    logits: Tensor
    """[batch, seq, vocab]"""
    saes: dict[str, Internals]
    """By SAE name."""


@torch.no_grad()
def run_with_saes(
    analysis: AnalysisContext, tokens: Tensor, error_term: bool = True, edits: Mapping[str, LatentEdit] | None = None
) -> Run:
    """Run the model with every SAE of the analysis in place.

    error_term: add what each SAE leaves unexplained, so that an unedited run equals the plain one. edits: by SAE name.
    Tokens that do not count (`token_mask`) keep the model's own activations. An SAE later in the model reads what the
    earlier ones left. Raises `UserError` when two SAEs share a hook, or a hook did not fire exactly once.
    """
    edits = edits or {}
    unknown = set(edits) - set(analysis.saes)
    if unknown:
        raise UserError(f"no SAE {', '.join(sorted(unknown))}; there are {', '.join(analysis.saes)}")
    seen: dict[str, Internals] = {}
    hooked = {
        hook: _replacement(analysis, tokens, name, sae, error_term, edits.get(name), seen)
        for (hook, sae), name in zip(analysis.one_hook_each().items(), analysis.saes, strict=True)
    }
    logits = analysis.lm.edited_logits(tokens, hooked)
    return Run(logits, {name: seen[name] for name in analysis.saes})


def _replacement(
    analysis: AnalysisContext,
    tokens: Tensor,
    name: str,
    sae: SparseAutoencoder,
    error_term: bool,
    edit: LatentEdit | None,
    seen: dict[str, Internals],
) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        x = x.float()
        mask = analysis.mask(tokens, x)
        found = inspect_sae(sae, x, mask)
        x_hat = found.reconstruction
        if edit is not None:
            edited = sae.keep(edit(found.post.clone()), mask)
            x_hat = x_hat + (sae.decode(edited) - sae.decode(found.post))
        output = torch.where(mask[..., None], x_hat + found.error if error_term else x_hat, x)
        seen[name] = found._replace(output=output)
        return output

    return replace


@torch.no_grad()
def inspect_sae(sae: SparseAutoencoder, x: Tensor, mask: Tensor) -> Internals:
    """Everything inside an SAE on activations x [batch, seq, d_in]; `output` is the reconstruction where tokens count."""
    sae.cfg.check_one_hook("a run with the reconstruction in place")
    z = sae.encode(x, mask)
    x_hat = sae.decode(z).to(x.dtype)
    return Internals(
        x, pre_activations(sae, x), z, x_hat, (x - x_hat) * mask[..., None], torch.where(mask[..., None], x_hat, x), mask
    )


def pre_activations(sae: SparseAutoencoder, x: Tensor) -> Tensor | None:
    """`(x - b_dec) W_enc + b_enc` [batch, seq, d_sae]; None where an SAE encodes otherwise."""
    if not {"W_enc", "b_enc"} <= set(sae.tensor_names):
        return None
    W_enc, b_enc = sae.encoder_weights()
    return sae.centred(x) @ W_enc + b_enc


def zeroed(latents: Sequence[int], positions: Sequence[int] | None = None) -> LatentEdit:
    """An edit that sets latents to zero, at all positions or some."""
    chosen = torch.tensor(list(latents))

    def edit(z: Tensor) -> Tensor:
        where = slice(None) if positions is None else torch.tensor(list(positions), device=z.device)[:, None]
        z[:, where, chosen.to(z.device)] = 0
        return z

    return edit


def check_positions(positions: Sequence[int] | None, tokens: Tensor) -> list[int] | None:
    """Positions counted from the front. Raises `UserError` for one outside the prompt."""
    if positions is None:
        return None
    length = tokens.shape[1]
    for position in positions:
        if not -length <= position < length:
            raise UserError(f"position {position}: the prompt has positions 0 (the separator in front) to {length - 1}")
    return [position % length for position in positions]


def check_lab_latents(sae: SparseAutoencoder, latents: Sequence[int]) -> None:
    """Raises `UserError` for no latents, or one that the SAE does not have."""
    if not latents:
        raise UserError("name at least one latent")
    check_latents(latents, sae.cfg.d_sae)


CHUNK_LATENTS = 512


class NextToken(NamedTuple):
    """One row of a next-token table, at the prompt's last position."""

    token: str
    logit: dict[str, float]
    """By run: `plain`, `error_term`, `reconstruction`."""
    log_probability: dict[str, float]
    """Nats."""
    probability: dict[str, float]
    rank: dict[str, int]
    """0 is the likeliest."""


class ActiveLatent(NamedTuple):
    """A latent that fires on a token."""

    position: int
    token: str
    latent: int
    activation: float
    share_of_max: float | None
    """Of the largest activation in the statistics; None without them."""


class PromptRuns(NamedTuple):
    """What `run_prompt` found."""

    tokens: list[str]
    """The prompt's tokens, the separator in front."""
    next_tokens: list[NextToken]
    answer: NextToken | None
    kl: dict[str, float]
    """KL(plain || run) of the last position's prediction, nats."""
    cross_entropy: dict[str, float]
    """Mean over the prompt's tokens, nats."""
    saes: dict[str, Internals]
    """Inside each SAE, in the run without error terms."""


def run_prompt(analysis: AnalysisContext, prompt: str, answer: str | None = None, n_tokens: int = 10) -> PromptRuns:
    """Run a prompt plain, with all SAEs and their error terms, and with their reconstructions alone.

    Raises `UserError` for an empty prompt, an answer that is not one token, two SAEs at one hook.
    """
    tokens = analysis.tokens(prompt)
    wanted = None if answer is None else analysis.token(answer)
    patched = run_with_saes(analysis, tokens, error_term=False)
    logits = {
        "plain": analysis.lm.logits(tokens),
        "error_term": run_with_saes(analysis, tokens).logits,
        "reconstruction": patched.logits,
    }
    log_p = {name: value[0].float().log_softmax(-1) for name, value in logits.items()}
    last = {name: value[-1] for name, value in log_p.items()}
    order = {name: value.argsort(descending=True).argsort() for name, value in last.items()}

    def row(token: int) -> NextToken:
        return NextToken(
            analysis.lm.tokenizer.decode([token]),
            {name: float(value[0, -1, token]) for name, value in logits.items()},
            {name: float(value[token]) for name, value in last.items()},
            {name: float(value[token].exp()) for name, value in last.items()},
            {name: int(value[token]) for name, value in order.items()},
        )

    shown = dict.fromkeys(token for value in last.values() for token in value.topk(n_tokens).indices.tolist())
    ranked = sorted(shown, key=lambda token: -float(last["plain"][token]))
    plain = last["plain"]
    return PromptRuns(
        [analysis.lm.tokenizer.decode([i]) for i in tokens[0].tolist()],
        [row(token) for token in ranked],
        None if wanted is None else row(wanted),
        {name: max(0.0, float((plain.exp() * (plain - value)).sum())) for name, value in last.items()},
        {name: float(-value[:-1].gather(1, tokens[0, 1:, None]).mean()) for name, value in log_p.items()},
        patched.saes,
    )


def top_latents(
    analysis: AnalysisContext, name: str, internals: Internals, tokens: Sequence[str], k: int = 5
) -> list[ActiveLatent]:
    """The k latents of largest absolute activation on every token, strongest first."""
    stats = analysis.stats_at_hand(name)
    found = []
    z = internals.post[0]
    for position, token in enumerate(tokens):
        values = z[position]
        for latent in values.abs().topk(min(k, len(values))).indices.tolist():
            value = float(values[latent])
            if value:
                share = None if stats is None else value / max(float(stats.max[latent]), 1e-12)
                found.append(ActiveLatent(position, token, latent, value, share))
    return found


# --- search ------------------------------------------------------------------------------------


class FoundLatent(NamedTuple):
    latent: int
    score: float
    tokens: list[str]
    """What it fires on in the prompt, or the tokens it promotes most."""


def search_by_prompt(analysis: AnalysisContext, prompt: str, k: int = 10) -> list[FoundLatent]:
    """Latents that a prompt activates most, by their largest activation relative to their largest in the statistics, so
    that latents strong everywhere do not crowd out those that mean this text."""
    name, sae = analysis.only
    stats = analysis.stats(name)
    tokens = analysis.tokens(prompt)
    acts = analysis.lm.activations(tokens, sae.cfg.hook_name).float()
    z = sae.encode(acts, analysis.mask(tokens, acts))[0].abs().cpu()
    largest, position = z.max(0)
    scale = np.maximum(np.abs(stats.max), np.abs(stats.min))
    score = np.where(scale > 0, largest.numpy() / np.maximum(scale, 1e-12), 0)
    best = [int(i) for i in np.argsort(-score, kind="stable")[:k] if score[i] > 0]
    return [FoundLatent(i, float(score[i]), [analysis.lm.tokenizer.decode([int(tokens[0, position[i]])])]) for i in best]


def search_by_promoted(analysis: AnalysisContext, texts: Sequence[str], k: int = 10) -> list[FoundLatent]:
    """Latents whose directions raise some tokens' logits most: the mean over them of the logit less that of all tokens, in
    standard deviations over the vocabulary."""
    if not texts:
        raise UserError("name at least one token, with its leading space: ' Paris'")
    _, sae = analysis.only
    wanted = torch.tensor([analysis.token(text) for text in texts])
    score = torch.cat([_standardised(part)[:, wanted].mean(1) for part in _logit_parts(analysis, sae, range(sae.cfg.d_sae))])
    best = score.topk(min(k, len(score))).indices.tolist()
    promoted = promoted_tokens(analysis, sae, best, 5)
    return [
        FoundLatent(i, float(score[i]), [token for token, _ in row.raised]) for i, row in zip(best, promoted, strict=True)
    ]


class Promoted(NamedTuple):
    """What a latent's direction does to the next token, to first order and without the layers between."""

    raised: list[tuple[str, float]]
    """(token, logit of a unit activation less the mean over the vocabulary), largest first."""
    lowered: list[tuple[str, float]]
    """Smallest first."""
    raised_ids: list[int]


def promoted_tokens(
    analysis: AnalysisContext, sae: SparseAutoencoder, latents: Sequence[int], k: int = 10
) -> list[Promoted]:
    """Tokens that latents raise and lower: `W_dec W_U` with the final norm's gain folded in, as a logit lens does."""
    names = analysis.lm.tokenizer
    rows: list[Promoted] = []
    for part in _logit_parts(analysis, sae, latents):
        sides = [(part - part.mean(1, keepdim=True)).topk(k, largest=largest) for largest in (True, False)]
        for values_up, tokens_up, values_down, tokens_down in zip(
            sides[0].values, sides[0].indices, sides[1].values, sides[1].indices, strict=True
        ):
            rows.append(
                Promoted(
                    [(names.decode([t]), v) for t, v in zip(tokens_up.tolist(), values_up.tolist(), strict=True)],
                    [(names.decode([t]), v) for t, v in zip(tokens_down.tolist(), values_down.tolist(), strict=True)],
                    tokens_up.tolist(),
                )
            )
    return rows


def direct_logits(analysis: AnalysisContext, sae: SparseAutoencoder, latents: Sequence[int]) -> Tensor:
    """Logits that a unit of each latent adds directly [len(latents), vocab], on the CPU."""
    return torch.cat(list(_logit_parts(analysis, sae, latents)))


@torch.no_grad()
def _logit_parts(analysis: AnalysisContext, sae: SparseAutoencoder, latents: Sequence[int]) -> Iterator[Tensor]:
    """Logits of latents, some at a time [n, vocab], on the CPU."""
    if sae.cfg.d_out != analysis.lm.d_model or not sae.cfg.in_stream:
        raise UserError(f"{sae.cfg.hook_out} is not in the residual stream: its latents promote no tokens directly")
    out = unembedding(analysis.lm)
    for part in torch.as_tensor(list(latents), device=sae.W_dec.device).split(CHUNK_LATENTS):
        yield out.logits(sae.W_dec[part]).cpu()


def _standardised(logits: Tensor) -> Tensor:
    return (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-12)
