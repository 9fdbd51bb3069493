"""Which latents carry a metric: gradient attribution with the error term, or integrated gradients, checked by ablation.

At a hook the model's activation of a token that counts is `x = sum_f z_f d_f + b_dec + error`. With g the gradient of the
metric with respect to x in the unedited model, the share of latent f is `z_f <d_f, g>` and that of the error `<error, g>`;
the reconstruction's shares, the error's and the bias's add up to `<x, g>`. (The error term leaves the model's outputs, and
so g, as they are: one backward pass serves any number of SAEs at any number of hooks, whatever their encoders are.)

`ablate` sets latents to zero and runs the model again, with and without the SAE's error term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import check_lab_latents, check_positions, run_with_saes, zeroed
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder


class AblationRow(NamedTuple):
    """One run, read at the prompt's last position."""

    run: str
    """`plain`; `with error term` or `reconstruction alone`, whole or with `- latent F`."""
    error_term: bool | None
    latents: list[int]
    """Set to zero."""
    answer_logit: float
    answer_log_probability: float
    """Nats. A logit alone says little: an edit may raise all of them."""
    answer_probability: float
    answer_rank: int
    """0 is the likeliest."""
    answer_logit_change: float
    """Against the same run with no latent set to zero."""
    answer_log_probability_change: float
    """Likewise."""
    kl: float
    """KL(run with no latent set to zero || this run) at the last position, nats."""
    top: str
    """The likeliest next token."""


def ablate(
    analysis: AnalysisContext,
    prompt: str,
    latents: Sequence[int],
    answer: str | None = None,
    positions: Sequence[int] | None = None,
    each: bool = True,
) -> list[AblationRow]:
    """Set latents to zero, one by one (`each`) and all together, at all positions or some (0 is the separator in front).

    answer: one token; by default the plain run's likeliest. Raises `UserError` for a latent or position that is not
    there, and an answer of several tokens.
    """
    name, sae = analysis.only
    check_lab_latents(sae, latents)
    tokens = analysis.tokens(prompt)
    positions = check_positions(positions, tokens)
    plain = analysis.lm.logits(tokens)[0, -1].float()
    wanted = int(plain.argmax()) if answer is None else analysis.token(answer)
    groups = [[latent] for latent in latents] if each else []
    if len(latents) > 1 or not each:
        groups.append(list(latents))
    rows = [_row(analysis, "plain", None, [], plain, plain, wanted)]
    for error_term, label in ((True, "with error term"), (False, "reconstruction alone")):
        whole = run_with_saes(analysis, tokens, error_term).logits[0, -1].float()
        rows.append(_row(analysis, label, error_term, [], whole, plain, wanted))
        for group in groups:
            logits = run_with_saes(analysis, tokens, error_term, {name: zeroed(group, positions)}).logits[0, -1].float()
            rows.append(_row(analysis, f"{label} - {_named(group)}", error_term, group, logits, whole, wanted))
    return rows


def _named(latents: Sequence[int]) -> str:
    return f"latent {latents[0]}" if len(latents) == 1 else f"latents {', '.join(map(str, latents))}"


def _row(
    analysis: AnalysisContext,
    run: str,
    error_term: bool | None,
    latents: list[int],
    logits: Tensor,
    reference: Tensor,
    wanted: int,
) -> AblationRow:
    log_p, log_r = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    top = analysis.lm.tokenizer.decode([int(logits.argmax())])
    return AblationRow(
        run,
        error_term,
        latents,
        float(logits[wanted]),
        float(log_p[wanted]),
        float(log_p[wanted].exp()),
        int((logits > logits[wanted]).sum()),
        float(logits[wanted] - reference[wanted]),
        float(log_p[wanted] - log_r[wanted]),
        max(0.0, float((log_r.exp() * (log_r - log_p)).sum())),
        top,
    )


Metric = Callable[[Tensor], Tensor]
"""From logits [batch, seq, vocab] to one number per sequence [batch]."""

ABLATION_BATCH = 16


class SAEShares(NamedTuple):
    """Shares of one SAE's parts in the metric. seq counts the separator in front."""

    activations: Tensor
    """Of the latents [seq, d_sae]."""
    latents: Tensor
    """`z_f <d_f, g>` [seq, d_sae]."""
    error: Tensor
    """`<error, g>` [seq]."""
    bias: Tensor
    """`<b_dec, g>` [seq]; what masked tokens' own activations contribute stands here as well."""
    total: float
    """`sum <x, g>` of the gradient; with integrated gradients metric(x) - metric(b_dec), measured by two runs."""

    @property
    def reconstruction(self) -> Tensor:
        """What the latents together contribute [seq]."""
        return self.latents.sum(1)

    @property
    def explained(self) -> float:
        """What all shares add up to: `total`, up to rounding and the steps of integrated gradients."""
        return float((self.reconstruction + self.error + self.bias).sum())


class Attribution(NamedTuple):
    metric: float
    tokens: list[str]
    saes: dict[str, SAEShares]
    hooks: dict[str, Tensor]
    """`<x, g>` of every token at plain hook points [seq]."""
    steps: int
    """Of integrated gradients; 0 for the plain gradient."""


# --- metrics -----------------------------------------------------------------------------------


def logit_difference(answer: int, against: int, position: int = -1) -> Metric:
    """Logit of one token less that of another."""
    return lambda logits: logits[:, position, answer] - logits[:, position, against]


def log_probability(answer: int, position: int = -1) -> Metric:
    """Log-probability of a token, in nats."""
    return lambda logits: logits[:, position].float().log_softmax(-1)[:, answer]


def prompt_metric(analysis: AnalysisContext, answer: str | None, against: str | None, tokens: Tensor) -> Metric:
    """The metric that two texts of one token each ask for; by default the log-probability of the likeliest next token."""
    if answer is None:
        if against is not None:
            raise UserError("--against needs --answer")
        return log_probability(int(analysis.lm.logits(tokens)[0, -1].argmax()))
    wanted = analysis.token(answer)
    return log_probability(wanted) if against is None else logit_difference(wanted, analysis.token(against))


# --- attribution -------------------------------------------------------------------------------


def attribute(
    analysis: AnalysisContext, prompt: str, metric: Metric | None = None, hooks: Sequence[str] = (), steps: int = 0
) -> Attribution:
    """Shares of every latent of every SAE, of errors, biases and plain hook points in a metric of the logits.

    metric: default the log-probability of the likeliest next token. steps: of integrated gradients; 0 takes the gradient
    at the prompt itself. Raises `UserError` for an empty prompt, a metric that is not one number per sequence or
    does not depend on the hooks.
    """
    tokens = analysis.tokens(prompt)
    metric = metric or prompt_metric(analysis, None, None, tokens)
    for sae in analysis.saes.values():
        sae.cfg.check_one_hook("attribution")
    by_hook = list(dict.fromkeys([sae.cfg.hook_name for sae in analysis.saes.values()] + list(hooks)))
    value, acts, found = gradients(analysis, tokens, metric, by_hook)
    shares = {}
    for name, sae in analysis.saes.items():
        x = acts[sae.cfg.hook_name]
        mask = analysis.mask(tokens, x)
        with torch.no_grad():
            z = sae.encode(x, mask)
        if steps:
            shares[name] = _integrated(analysis, sae, tokens, x, z, mask, metric, steps)
        else:
            g = found[sae.cfg.hook_name]
            shares[name] = _shares(sae, x, z, mask, g, float((x * g).sum()))
    plain = {hook: (acts[hook] * found[hook]).sum(-1)[0].cpu() for hook in hooks}
    return Attribution(value, [analysis.lm.tokenizer.decode([i]) for i in tokens[0].tolist()], shares, plain, steps)


def gradients(
    analysis: AnalysisContext, tokens: Tensor, metric: Metric, hooks: Sequence[str]
) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """(metric, activations, gradients) at hooks [1, seq, d_in] of the unedited model, from one pass."""
    taken: dict[str, Tensor] = {}

    def take(hook: str) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            taken[hook] = x if x.requires_grad else x.detach().requires_grad_()
            return taken[hook]

        return edit

    with torch.enable_grad():
        value = _measured(metric, analysis.lm.edited_logits(tokens, {hook: take(hook) for hook in hooks}))
        found = torch.autograd.grad(value.sum(), [taken[hook] for hook in hooks], allow_unused=True)
    for hook, g in zip(hooks, found, strict=True):
        if g is None:
            raise UserError(f"the metric does not depend on {hook}")
    return (
        float(value.detach()[0]),
        {hook: taken[hook].detach().float() for hook in hooks},
        {hook: g.float() for hook, g in zip(hooks, found, strict=True)},
    )


def _measured(metric: Metric, logits: Tensor) -> Tensor:
    value = metric(logits)
    if value.shape != logits.shape[:1]:
        raise UserError(
            f"a metric gives one number per sequence, shape ({len(logits)},); this one gave {tuple(value.shape)}"
        )
    if not torch.isfinite(value).all():
        raise UserError("the metric is NaN or infinite on this prompt")
    return value


@torch.no_grad()
def _shares(sae: SparseAutoencoder, x: Tensor, z: Tensor, mask: Tensor, g: Tensor, total: float) -> SAEShares:
    kept = mask[..., None]
    error = (x - sae.decode(z)) * kept
    bias = torch.where(kept, sae.b_dec.to(x.dtype), x)
    latents = z * (g @ sae.W_dec.T.to(g.dtype))
    return SAEShares(z[0].cpu(), latents[0].cpu(), (error * g).sum(-1)[0].cpu(), (bias * g).sum(-1)[0].cpu(), total)


def _integrated(
    analysis: AnalysisContext,
    sae: SparseAutoencoder,
    tokens: Tensor,
    x: Tensor,
    z: Tensor,
    mask: Tensor,
    metric: Metric,
    steps: int,
) -> SAEShares:
    """The same with the mean gradient along the path from b_dec to x; the bias has no share, for the path starts there."""
    hook, kept = sae.cfg.hook_name, mask[..., None]
    start = torch.where(kept, sae.b_dec.to(x.dtype), x)
    g = torch.zeros_like(x)
    for share, weight in _path(steps):
        at = (start + share * (x - start)).requires_grad_()
        with torch.enable_grad():
            value = _measured(metric, analysis.lm.resume(hook, at, tokens))
            g += weight * torch.autograd.grad(value.sum(), at)[0]
    ends = [float(_measured(metric, analysis.lm.resume(hook, end, tokens))) for end in (start, x)]
    found = _shares(sae, x, z, mask, g, ends[1] - ends[0])
    return found._replace(bias=torch.zeros_like(found.bias))


def _path(steps: int) -> list[tuple[float, float]]:
    """(where on the path, weight) of every step. Gauss-Legendre in t with the place t^3: near b_dec activations are small
    and norms bend the model most."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    t = (nodes + 1) / 2
    return [(float(at**3), float(w / 2 * 3 * at**2)) for at, w in zip(t, weights, strict=True)]


# --- the check against real ablations ----------------------------------------------------------


class AblationCheck(NamedTuple):
    """Attribution against what ablating really does."""

    latents: np.ndarray
    attributed: np.ndarray
    """Shares summed over positions."""
    measured: np.ndarray
    """metric - metric without the latent (error term kept)."""
    correlation: float | None
    """Pearson; None where one side does not vary."""
    sign_agreement: float


@torch.no_grad()
def check_by_ablation(
    analysis: AnalysisContext,
    name: str,
    prompt: str,
    attribution: Attribution,
    metric: Metric | None = None,
    n_latents: int = 30,
    seed: int = 0,
) -> AblationCheck:
    """Ablate the latents of largest shares (half of `n_latents`) and random others that fire, each alone, at all positions
    and with the error term kept; compare. Raises `UserError` when fewer than three latents fire."""
    sae, tokens = analysis.saes[name], analysis.tokens(prompt)
    metric = metric or prompt_metric(analysis, None, None, tokens)
    shares = attribution.saes[name]
    summed = shares.latents.sum(0).numpy()
    firing = np.flatnonzero((shares.activations != 0).any(0).numpy())
    if len(firing) < 3:
        raise UserError(f"only {len(firing)} latents fire on this prompt: too few to correlate")
    order = firing[np.argsort(-np.abs(summed[firing]), kind="stable")]
    best, rest = order[: (n_latents + 1) // 2], order[(n_latents + 1) // 2 :]
    drawn = np.random.default_rng(seed).permutation(rest)[: n_latents - len(best)]
    chosen = np.concatenate([best, np.sort(drawn)])
    hook = sae.cfg.hook_name
    x = analysis.lm.activations(tokens, hook).float()
    base = float(_measured(metric, analysis.lm.logits(tokens)))
    z = shares.activations.to(x.device)
    measured = []
    for part in np.array_split(chosen, -(-len(chosen) // ABLATION_BATCH)):
        rows = torch.from_numpy(part).to(x.device)
        without = x - z.T[rows][:, :, None] * sae.W_dec[rows][:, None, :]
        measured.append(
            base - _measured(metric, analysis.lm.resume(hook, without, tokens.expand(len(rows), -1))).cpu().numpy()
        )
    effect, estimate = np.concatenate(measured), summed[chosen]
    varied = min(np.ptp(effect), np.ptp(estimate)) > 0
    return AblationCheck(
        chosen,
        estimate,
        effect,
        float(np.corrcoef(estimate, effect)[0, 1]) if varied else None,
        float(np.mean(np.sign(estimate) == np.sign(effect))),
    )


def long_table(attribution: Attribution, least: float = 0.0) -> list[dict[str, object]]:
    """One row for each SAE, position and latent with a share (also the error and the bias), largest magnitude first."""
    rows: list[dict[str, object]] = []
    for name, shares in attribution.saes.items():
        for position, latent in zip(*np.nonzero(shares.latents.abs().numpy() > least), strict=True):
            rows.append(
                {
                    "sae": name,
                    "position": int(position),
                    "token": attribution.tokens[position],
                    "part": "latent",
                    "latent": int(latent),
                    "activation": float(shares.activations[position, latent]),
                    "share": float(shares.latents[position, latent]),
                }
            )
        for part, values in (("error", shares.error), ("bias", shares.bias)):
            rows += [
                {
                    "sae": name,
                    "position": position,
                    "token": token,
                    "part": part,
                    "latent": None,
                    "activation": None,
                    "share": float(value),
                }
                for position, (token, value) in enumerate(zip(attribution.tokens, values, strict=True))
            ]
    return sorted(rows, key=lambda row: (-abs(float(row["share"])), str(row["sae"]), int(row["position"])))  # type: ignore
