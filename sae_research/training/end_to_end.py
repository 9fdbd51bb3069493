"""End-to-end fine-tuning: a finished SAE or transcoder learns from the model's predictions too, for a short while
(Karvonen 2025, arXiv 2503.17272).

    loss = mse + (mse / kl) * kl,     the ratio taken of the same step, without a gradient

`mse` is the mean over counted tokens of `|y - y_hat|^2`, y what the dictionary writes; `kl` the mean over them of
KL(clean || patched) of the next-token distributions, with `y_hat` in place of y where tokens count. The ratio keeps the two
terms alike in size, so that neither needs a coefficient.

Where the number of active latents is a setting (the TopK forms) all weights learn. In other forms a free encoder would
change L0 with nothing to hold it, so there the decoder, its bias and a skip learn alone: latents stay what they were, and
what they stand for is refined. `tensors` overrides that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.lm.pairs import PairedActivations, PairedBatch
from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.text.tokens import token_contexts
from sae_research.training.schedules import warmup_then_decay

HELD_OUT = 64
"""Contexts on which before and after are measured; they are not trained on."""
WARMUP, DECAY = 0.02, 0.5
"""Fractions of the run: most of it a decay, as the source ends its runs."""
DECODER = ("W_dec", "b_dec", "W_skip")
Tensors = Literal["auto", "all", "decoder"]


class Measured(NamedTuple):
    """Of a dictionary on the held-out contexts."""

    kl: float
    """Mean over counted tokens, in nats."""
    unexplained: float
    """`sum |y - y_hat|^2 / sum |y - mean(y)|^2` over counted tokens."""
    l0: float


class Result(NamedTuple):
    before: Measured
    after: Measured
    trained: list[str]
    """Names of the tensors that learned."""


def learnable(sae: SparseAutoencoder, tensors: Tensors = "auto") -> list[str]:
    """Names of the tensors that learn. Raises `UserError` for a form whose reconstruction has no weights to learn."""
    names = [name for name in (*sae.tensor_names, "W_skip") if isinstance(getattr(sae, name, None), Tensor)]
    fixed_number = "k" in sae.option_names and sae.per_token and "W_enc" in names
    if tensors == "decoder" or (tensors == "auto" and not fixed_number):
        names = [name for name in names if name in DECODER]
    if "W_enc" not in sae.tensor_names:
        raise UserError(f"{sae.form}: its encoder reads the decoder's rows, which fine-tuning would move under it")
    return names


def finetune(
    sae: SparseAutoencoder,
    lm: LanguageModel,
    params: Params,
    n_tokens: int,
    learning_rate: float,
    tensors: Tensors = "auto",
    say: Callable[[str], None] = print,
) -> Result:
    """Fine-tune `sae` in place on so many tokens of the training split, `model.llm_batch_size` contexts a step.

    learning_rate: Adam's at its highest, of weights in the model's units over sqrt of their mean square. Raises `UserError`
    where the text ends, the loss is not finite, or the form cannot learn.
    """
    if sae.cfg.is_crosscoder or sae.cfg.is_cross_layer:
        sae.cfg.check_one_hook("end-to-end fine-tuning")
    names = learnable(sae, tensors)
    size, held_out = params.model.llm_batch_size, HELD_OUT
    contexts = token_contexts(
        lm.tokenizer, lm.separator_id, params.text, "sae_train", n_tokens + held_out * params.text.context_size
    )
    texts = PairedActivations(lm, sae.cfg.hook_name, sae.cfg.hook_out, contexts.tokens, params, contexts.counted)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(params.random_seed)).tolist()
    held, shown = order[:held_out], order[held_out:]
    before = measure(sae, lm, texts, held, size)
    weights = {name: getattr(sae, name) for name in names}
    optimiser = torch.optim.Adam(
        [{"params": [tensor.requires_grad_()], "scale": _scale(tensor)} for tensor in weights.values()], eps=1e-10
    )
    steps = math.ceil(len(shown) / size)
    with tqdm(total=steps, desc="fine-tune", unit="step", dynamic_ncols=True) as bar:
        for step in range(steps):
            factor = learning_rate * warmup_then_decay(step / steps, WARMUP, DECAY)
            for group in optimiser.param_groups:
                group["lr"] = factor * group["scale"]
            mse, kl = _losses(sae, lm, texts.shown(shown[step * size : (step + 1) * size], resumed=True))
            if not (torch.isfinite(mse) and torch.isfinite(kl)):
                raise UserError(f"fine-tuning diverged at step {step} (mse {mse:.3g}, KL {kl:.3g}): lower --learning_rate")
            (mse + (mse / kl.clamp_min(1e-12)).detach() * kl).backward()
            optimiser.step()
            optimiser.zero_grad()
            bar.set_postfix(kl=f"{float(kl):.4f}", mse=f"{float(mse):.4g}")
            bar.update()
    for tensor in weights.values():
        tensor.requires_grad_(False)
    after = measure(sae, lm, texts, held, size)
    say(f"KL {before.kl:.4f} -> {after.kl:.4f}, L0 {before.l0:.1f} -> {after.l0:.1f}, on {len(held)} held-out contexts")
    return Result(before, after, names)


def _scale(tensor: Tensor) -> float:
    """Root mean square of a tensor's entries: a step of Adam moves an entry by the learning rate, whatever its size."""
    return max(float(tensor.detach().square().mean().sqrt()), 1e-8)


def _losses(sae: SparseAutoencoder, lm: LanguageModel, batch: PairedBatch) -> tuple[Tensor, Tensor]:
    """(mse, KL) of one batch, with gradients."""
    mask = batch.lab_mask
    target = sae.target(batch.acts, batch.written)
    y_hat = sae.reconstruct(batch.acts, mask)
    if not y_hat.requires_grad and torch.is_grad_enabled():
        raise UserError(f"{sae.form}: its reconstruction passes no gradient on")
    mse = (target - y_hat)[mask].square().sum(-1).mean()
    with torch.no_grad():
        clean = torch.log_softmax(lm.resume(sae.cfg.hook_out, batch.written, batch.tokens, rest=batch.rest).float(), -1)
    # what the target leaves out of the activations (a mean over dimensions) stays in the model
    written = batch.written + torch.where(mask[..., None], y_hat - target, 0.0)
    patched = torch.log_softmax(lm.resume(sae.cfg.hook_out, written, batch.tokens, rest=batch.rest).float(), -1)
    kl = torch.nn.functional.kl_div(patched[mask], clean[mask], reduction="none", log_target=True).sum(-1).mean()
    return mse, kl


@torch.no_grad()
def measure(
    sae: SparseAutoencoder, lm: LanguageModel, texts: PairedActivations, chosen: Sequence[int], size: int
) -> Measured:
    """KL, unexplained variance and L0 over contexts."""
    kl = error = active = 0.0
    counted, targets = 0, []
    for start in range(0, len(chosen), size):
        batch = texts.shown(list(chosen[start : start + size]), resumed=True)
        mse, found = _losses(sae, lm, batch)
        n = int(batch.lab_mask.sum())
        kl, error, counted = kl + float(found) * n, error + float(mse) * n, counted + n
        active += float((sae.encode(batch.acts, batch.lab_mask)[batch.lab_mask] != 0).sum())
        targets.append(sae.target(batch.acts, batch.written)[batch.lab_mask].double())
    all_targets = torch.cat(targets)
    variance = float((all_targets - all_targets.mean(0)).square().sum())
    return Measured(kl / counted, error / variance, active / counted)
