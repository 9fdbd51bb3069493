"""One vector per text: the activations, and every SAE's latents, at the text's last token.

SAE Bench's definition reads the very last token; ours the last one inside `token_mask`. Stock cuts that token's
activation out and encodes it alone, which only a per-token encoder survives. Here the whole text is encoded, so that
encoders over sequences work as well; for those, masked tokens are hidden in both definitions, as stock has none.

For per-token encoders nothing but the last tokens' activations is kept. Whole texts are kept (in the memory-mapped cache)
only where an SAE reads sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sae_research.cached_files import new_entry, usable
from sae_research.evals.pool import HookActivations
from sae_research.lm import Batch, LanguageModel, token_mask
from sae_research.params import Params, TokenMask
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.store import fingerprint
from sae_research.store_cache import cache_dir, prune

_FILE = "last_tokens.npy"
_ENCODE_AT_ONCE = 1024
"""Texts whose last tokens are encoded together."""
_TOKENS_PER_PASS_ON_CPU = 1024
"""Tokens of one pass of the model on a CPU, which gains nothing from more; elsewhere as many as `llm_batch_size` texts
of full length hold."""


def tokenise(lm: LanguageModel, texts: Sequence[str], context_length: int) -> list[Tensor]:
    """Ids of every text: the separator (BOS), then its last `context_length - 1` tokens, as sae-probes truncates."""
    encoded = lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [torch.tensor([lm.separator_id, *ids[-(context_length - 1):]]) for ids in encoded]


class TypicalNorm:
    """Median activation norm at one hook over the tokens of some texts: what the mask's outlier rule compares with.

    One for all texts of an evaluation, so that no mask depends on how texts are grouped.
    """

    def __init__(self, lm: LanguageModel, hook: str, sample: Sequence[Tensor], params: Params) -> None:
        self.lm, self.hook, self.sample, self.params = lm, hook, list(sample), params

    @cached_property
    def median(self) -> float:
        norms = []
        for batch in passes(self.lm, self.hook, self.sample, self.params):
            ordinary = token_mask(self.lm, batch.tokens, batch.acts, TokenMask(outlier_norm_multiple=None)) & batch.real
            norms.append(batch.acts[ordinary].norm(dim=-1))
        return float(torch.cat(norms).median())

    @cached_property
    def key(self) -> str:
        """Of what the median is taken over; computing it takes no model."""
        return fingerprint([ids.tolist() for ids in self.sample])


def passes(lm: LanguageModel, hook: str, tokens: Sequence[Tensor], params: Params) -> Iterator[Batch]:
    """The model's activations of texts [each 1-D], nothing kept. Texts of like length run together, and passes are of
    equal work rather than of equal numbers of texts."""
    budget = params.model.llm_batch_size * params.sparse_probing_sae_probes.context_length
    if lm.device.type == "cpu":
        budget = min(budget, _TOKENS_PER_PASS_ON_CPU)
    order = sorted(range(len(tokens)), key=lambda i: (len(tokens[i]), i))
    start = 0
    while start < len(order):
        end = start + 1
        while end < len(order) and (end + 1 - start) * len(tokens[order[end]]) <= budget:
            end += 1
        chosen = order[start:end]
        padded = torch.nn.utils.rnn.pad_sequence([tokens[i] for i in chosen], batch_first=True,
                                                 padding_value=lm.separator_id).to(lm.device)
        lengths = torch.tensor([len(tokens[i]) for i in chosen], device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        yield Batch(torch.tensor(chosen), padded, real, lm.activations(padded, hook).float())
        start = end


class Vectors(NamedTuple):
    """One vector per text in both definitions [texts, d], float32 on the CPU."""

    sae_bench: Tensor
    lab: Tensor
    """Zero where no token counts."""


class LastTokens:
    """The last tokens of some texts at one hook, for raw probes and for any SAE."""

    def __init__(self, tokens: Sequence[Tensor], norm: TypicalNorm, params: Params, whole: bool) -> None:
        """tokens: ids of every text. whole: keep whole texts, which encoders over sequences need; else only their last
        tokens."""
        self.lm, self.hook, self.tokens, self.norm, self.params = norm.lm, norm.hook, list(tokens), norm, params
        self.whole = whole
        self.raw, self._counts = self._last_tokens()
        self._sequence_latents: tuple[tuple[str, ...], dict[str, tuple[sparse.csr_matrix, ...]]] = ((), {})

    # --- activations ---

    @cached_property
    def _texts(self) -> HookActivations:
        return HookActivations(self.lm, self.hook, self.tokens, self.params)

    def _last_tokens(self) -> tuple[Vectors, Tensor]:
        """Activations at the last tokens, and which texts have a token that counts [texts]; from the cache if there."""
        caching, root = self.params.activation_caching, cache_dir("activations")
        key = fingerprint(["last token", self.lm.fingerprint, self.hook, str(self.lm.dtype), self.lm.device.type,
                           torch.__version__, self.norm.key, self.params.token_mask.model_dump(),
                           fingerprint([ids.tolist() for ids in self.tokens])])[:32]
        entry = root / key
        if caching.enabled and usable(entry):
            stored = torch.from_numpy(np.load(entry / _FILE, allow_pickle=False))
            return Vectors(stored[0, :, :-1], stored[1, :, :-1]), stored[1, :, -1] > 0
        found = torch.zeros(2, len(self.tokens), self.lm.d_in(self.hook) + 1)  # the last column says whether one counts
        for batch in self._batches():
            rows = torch.arange(len(batch.index))
            last, counted, any_counted = self._positions(batch)
            found[0, batch.index, :-1] = batch.acts[rows, last].cpu()
            found[1, batch.index, :-1] = (batch.acts[rows, counted] * any_counted[:, None]).cpu()
            found[1, batch.index, -1] = any_counted.float().cpu()
        if caching.enabled:
            with new_entry(entry) as folder:
                np.save(folder / _FILE, found.numpy(), allow_pickle=False)
            prune(root, caching.max_gb, keep=[entry])
        return Vectors(found[0, :, :-1], found[1, :, :-1]), found[1, :, -1] > 0

    def _batches(self) -> Iterator[Batch]:
        return self._texts.batches() if self.whole else passes(self.lm, self.hook, self.tokens, self.params)

    def _mask(self, batch: Batch) -> Tensor:
        return token_mask(self.lm, batch.tokens, batch.acts, self.params.token_mask, self.norm.median) & batch.real

    def _positions(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Position of every text's last token, of the last that counts, and whether any counts [batch]."""
        place = torch.arange(batch.real.shape[1], device=batch.real.device)
        mask = self._mask(batch)
        return (place * batch.real).amax(1), (place * mask).amax(1), mask.any(1)

    # --- latents ---

    @torch.no_grad()
    def latents(self, saes: dict[str, SparseAutoencoder], index: Tensor) -> Iterator[tuple[str, Vectors]]:
        """(name, latents of the texts `index`) for SAEs of one family, which encode together."""
        if all(sae.per_token for sae in saes.values()):
            yield from self._per_token(saes, index)
            return
        if self._sequence_latents[0] != tuple(saes):
            self._sequence_latents = tuple(saes), self._over_sequences(saes)
        for name in saes:
            yield name, Vectors(*(torch.from_numpy(matrix[index.numpy()].toarray())
                                  for matrix in self._sequence_latents[1][name]))

    def _per_token(self, saes: dict[str, SparseAutoencoder], index: Tensor) -> Iterator[tuple[str, Vectors]]:
        """One encoding serves both definitions where they read the same token."""
        bench, lab = self.raw.sae_bench[index], self.raw.lab[index]
        counts = self._counts[index]
        other = ((bench != lab).any(dim=1) & counts).nonzero()[:, 0]
        x = torch.cat([bench, lab[other]])
        parts: dict[str, list[Tensor]] = {name: [] for name in saes}
        for chunk in x.split(_ENCODE_AT_ONCE):
            # every token a sequence of its own
            for name, z in encode_each(saes, chunk[:, None].to(self.lm.device), None):
                parts[name].append(z[:, 0].float().cpu())
        for name, found in parts.items():
            z = torch.cat(found)
            z_lab = z_bench = z[:len(index)]
            if len(other) or not counts.all():
                z_lab = z_bench * counts[:, None]
                z_lab[other] = z[len(index):]
            yield name, Vectors(z_bench, z_lab)

    def _over_sequences(self, saes: dict[str, SparseAutoencoder]) -> dict[str, tuple[sparse.csr_matrix, ...]]:
        """Latents of all texts in both definitions, as sparse rows: a sequence is encoded once, whatever reads it."""
        rows: list[int] = []
        parts: dict[str, tuple[list[sparse.csr_matrix], ...]] = {name: ([], []) for name in saes}
        for batch in self._texts.batches():
            mask = self._mask(batch)
            last, counted, any_counted = self._positions(batch)
            at = torch.arange(len(batch.index), device=mask.device)
            rows += batch.index.tolist()
            for name, z in encode_each(saes, batch.acts, mask):
                bench, lab = z[at, last], z[at, counted] * any_counted[:, None]
                for part, values in zip(parts[name], (bench, lab), strict=True):
                    part.append(sparse.csr_matrix(values.float().cpu().numpy()))
        back = np.argsort(rows)
        return {name: tuple(sparse.vstack(part, format="csr")[back] for part in both) for name, both in parts.items()}
