"""The other model of a pair where no hub is at hand: a short finetune made here, a perturbed copy, how far both moved."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Text
from sae_research.config.transfer import OwnFinetune
from sae_research.lm import LanguageModel, load_language_model
from sae_research.lm.hooks import find_layers, parse_hook
from sae_research.lm.placement import in_parts, whole_state
from sae_research.runtime.cache import cache_dir, new_entry, prune, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import file_sha256, fingerprint, write_json
from sae_research.runtime.sources import sources_fingerprint
from sae_research.stats.predictions import CleanPredictions
from sae_research.text.corpus import text_fingerprint
from sae_research.transfer.text import TextSource, contexts, documents_of

SPLIT = "sae_train"
"""Text nothing is evaluated on."""
KEPT_GB = 3.0
"""Finetuned models kept in the cache, without the packaged one; the least recently used go first."""
PREFIX = "finetuned-"
WARMUP_STEPS = 3


def finetuned_model(
    base: LanguageModel, config: OwnFinetune, text: Text, hook: str, device: str, seed: int
) -> LanguageModel:
    """A finetune of the base model on one kind of text: made once, kept under `.cache/models` by everything it depends on.

    Cross-entropy on packed contexts, Adam without weight decay, a linear warm-up, gradients clipped at norm 1; the layers
    up to the hook are trained, for what lies above does not reach the SAE. Raises `UserError` when the text runs out or the
    loss is not finite.
    """
    key = fingerprint(
        [
            base.fingerprint,
            str(base.dtype),
            config.model_dump(exclude={"moved_tokens"}),
            text.model_dump(),
            text_fingerprint(text, SPLIT),
            hook,
            seed,
            sources_fingerprint(__name__),
        ]
    )[:24]
    folder = cache_dir("models") / f"{PREFIX}{key}"
    if not usable(folder):
        _make(base, config, text, hook, seed, folder)
    return load_language_model(str(folder), device, str(base.dtype).removeprefix("torch."))


def _make(base: LanguageModel, config: OwnFinetune, text: Text, hook: str, seed: int, folder: Path) -> None:
    model = _copy(base)
    train(model, _rows(base, config, text), config, _trained_layers(hook), seed)
    with new_entry(folder) as temporary:
        model.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)
        weights = {path.name: file_sha256(path) for path in sorted(temporary.glob("*.safetensors"))}
        write_json(temporary / "fingerprint.json", {"fingerprint": fingerprint(weights), "base": base.fingerprint})
    others = [path for path in folder.parent.iterdir() if not path.name.startswith(PREFIX)]
    prune(folder.parent, KEPT_GB + sum(_size(path) for path in others) / 1e9, keep=[folder, *others])


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _trained_layers(hook: str) -> int:
    """Those up to the hook: what lies above does not reach the SAE."""
    layer, kind = parse_hook(hook)
    return max(1, layer + (kind != "hook_resid_pre"))


def _rows(base: LanguageModel, config: OwnFinetune, text: Text) -> Iterator[list[int]]:
    """Contexts of the chosen source, over again where there are fewer than the steps need."""
    texts = documents_of(TextSource(text, SPLIT, own=False, kind=config.source), base.tokenizer)
    found = list(
        islice(contexts(base.tokenizer, base.separator_id, texts, text.context_size), config.steps * config.batch_size)
    )
    if not found:
        kind = "" if config.source is None else f" of the source {config.source!r} (transfer.own_finetune.source)"
        raise UserError(
            f"transfer: {text.dataset} has no context of {text.context_size} tokens{kind} in the split {SPLIT}; "
            "give more text or a smaller transfer.context_size"
        )
    for number in range(config.steps * config.batch_size):
        yield found[number % len(found)]


def train(model: Any, rows: Iterator[list[int]], config: OwnFinetune, n_layers: int, seed: int) -> list[float]:
    """Train the first `n_layers` layers of a Hugging Face decoder in place; returns the loss of every step."""
    layers = find_layers(model, model.config.get_text_config().num_hidden_layers)
    chosen = [parameter for layer in layers[:n_layers] for parameter in layer.parameters()]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(chosen, lr=config.learning_rate)
    losses = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        for step in tqdm(range(config.steps), desc="finetuning the base model", unit="step", dynamic_ncols=True):
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
            tokens = torch.tensor(list(islice(rows, config.batch_size)), device=chosen[0].device)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            losses.append(float(loss.detach()))
            if not torch.isfinite(loss):
                raise UserError(f"transfer.own_finetune: the loss at step {step + 1} is not finite; lower its learning_rate")
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(chosen, 1.0)
            optimiser.step()
    model.requires_grad_(False)
    return losses


def _copy(base: LanguageModel) -> Any:
    """The model's own weights to change. Raises `UserError` where they are in parts or quantised."""
    if in_parts(base.model) or getattr(base.model, "is_quantized", False):
        raise UserError(
            "transfer: weights are changed on one device and as they were stored: name a transfer.finetuned_model, or set "
            "model.placement: one and model.quantization: null"
        )
    return copy.deepcopy(base.model)


@torch.no_grad()
def perturbed_model(base: LanguageModel, noise: float, hook: str, seed: int) -> LanguageModel:
    """The base model with Gaussian noise on every matrix of the layers up to the hook, `noise` times the matrix's own
    standard deviation: a model that an SAE of the base model should not serve."""
    model = _copy(base)
    generator = torch.Generator().manual_seed(seed)
    for layer in find_layers(model, base.n_layers)[: _trained_layers(hook)]:
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(drawn * parameter.std() * noise)
    return LanguageModel(model, base.tokenizer, f"{base.name} + noise", fingerprint([base.fingerprint, noise, hook, seed]))


def _parameters(lm: LanguageModel) -> dict[str, Tensor]:
    state = whole_state(lm.model)
    return {name: state[name] for name, _ in lm.model.named_parameters()}


@torch.no_grad()
def weights_moved(base: LanguageModel, other: LanguageModel) -> dict[str, Any]:
    """How far weights moved: |W' - W| / |W| over all tensors of one shape together, by layer, and which did not fit.

    Resized embeddings are compared over the rows that both have.
    """
    ours, theirs = _parameters(base), _parameters(other)
    by_group: dict[str, list[float]] = {}
    changed, total, other_shape = 0, 0, []
    for name in sorted(ours.keys() & theirs.keys()):
        one, two = ours[name].float(), theirs[name].float()
        if one.shape != two.shape:
            other_shape.append(name)
            if one.shape[1:] != two.shape[1:]:
                continue
            rows = min(len(one), len(two))
            one, two = one[:rows], two[:rows]
        parts = by_group.setdefault(_group(name), [0.0, 0.0])
        parts[0] += float((two - one).double().square().sum())
        parts[1] += float(one.double().square().sum())
        changed += int((one != two).any())
        total += 1
    sums = [sum(parts[i] for parts in by_group.values()) for i in (0, 1)]
    return {
        "relative_change": (sums[0] / max(sums[1], 1e-300)) ** 0.5,
        "tensors_changed": changed,
        "tensors": total,
        "other_shape": other_shape,
        "missing": sorted(ours.keys() ^ theirs.keys()),
        "by_layer": {group: (parts[0] / max(parts[1], 1e-300)) ** 0.5 for group, parts in by_group.items()},
    }


def _group(name: str) -> str:
    digits = [part for part in name.split(".") if part.isdigit()]
    return f"layer {digits[0]}" if digits else "embeddings and final norm"


@torch.no_grad()
def outputs_moved(base: LanguageModel, other: LanguageModel, rows: Tensor) -> dict[str, float] | None:
    """How far outputs moved on contexts [n, seq] both can read: both cross-entropies, KL(base || other) in nats, and the
    fraction of positions whose likeliest token is the same. None where the other vocabulary is the smaller."""
    if other.vocab_size < base.vocab_size:
        return None
    sums = torch.zeros(4, dtype=torch.float64)
    for tokens in rows.split(4):
        logits, others = base.logits(tokens), other.logits(tokens)[..., : base.vocab_size].contiguous()
        same = logits.argmax(-1) == others.argmax(-1)
        clean = CleanPredictions(logits, tokens.to(base.device))
        ce, kl = clean.compare(others)
        sums += torch.stack([clean.ce.sum(), ce.sum(), kl.sum(), same.sum()]).double().cpu()
    n_next, n = rows[:, 1:].numel(), rows.numel()
    return {
        "ce_base": float(sums[0] / n_next),
        "ce_other": float(sums[1] / n_next),
        "kl": float(sums[2] / n),
        "same_top_token": float(sums[3] / n),
    }
