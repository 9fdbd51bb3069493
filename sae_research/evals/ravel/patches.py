"""Running base prompts with the entity's token patched: what masks are learnt through and scored on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.evals.pool import HookActivations
from sae_research.evals.ravel.known import Known, answer_text, by_length
from sae_research.evals.ravel.pairs import Pair
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each


class PromptActivations(HookActivations):
    """The known prompts at one hook, and where their entities stand."""

    def __init__(self, lm: LanguageModel, hook: str, known: Sequence[Known], params: Params) -> None:
        super().__init__(lm, hook, [one.prompt.tokens for one in known], params)
        self.known = known
        self.position = torch.tensor([one.prompt.position for one in known], device=lm.device)
        self.first = torch.tensor([one.first for one in known], device=lm.device)
        self.entity = torch.zeros(len(known), self.d_in, device=lm.device)
        """Activations of the entities' last tokens [prompts, d_in]."""
        counts = torch.zeros(len(known), dtype=torch.bool)
        for batch in self.batches():
            rows, at = torch.arange(len(batch.index)), self.position[batch.index]
            self.entity[batch.index] = batch.acts[rows, at]
            counts[batch.index] = self.lab_mask(batch)[rows, at].cpu()
        self.usable: list[int] = counts.nonzero()[:, 0].tolist()
        """Prompts whose entity token counts: a masked one has no latents to patch."""

    def length(self, pair: Pair) -> int:
        """Tokens of a pair's base prompt."""
        return len(self.known[pair.base].prompt.ids)

    @torch.no_grad()
    def entity_latents(self, saes: dict[str, SparseAutoencoder]) -> dict[str, Latents]:
        """Every SAE's latents of the entity tokens; whole prompts are encoded, for encoders that read sequences."""
        latents = {name: Latents(len(self.known), sae.cfg.d_sae, self.lm.device) for name, sae in saes.items()}
        for batch in self.batches():
            rows, at = torch.arange(len(batch.index)), self.position[batch.index]
            for name, z in encode_each(saes, batch.acts, self.lab_mask(batch)):
                latents[name].put(batch.index.tolist(), z[rows, at])
        return latents

    def loss(self, rows: Sequence[Pair], patched: Tensor) -> Tensor:
        """Cross-entropy of every pair's target answer's first token [pairs], with `patched` [pairs, d_in] in place of
        the bases' entity tokens. Differentiable in `patched`."""
        bases = [pair.base for pair in rows]
        batch = self.pool.batch(bases)
        index = torch.arange(len(bases), device=self.lm.device)
        acts = batch.acts.index_put((index, self.position[bases]), patched.to(batch.acts.dtype))
        last, which = (batch.real.sum(1) - 1).unique(return_inverse=True)
        logits = self.lm.resume(self.hook, acts, batch.tokens, last)[index, which]
        targets = self.first[[pair.target for pair in rows]]
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")

    def answers(self, rows: Sequence[Pair], patched: Tensor) -> list[str]:
        """Greedy answers to the bases with `patched` [pairs, d_in] in place of their entity tokens."""
        texts = [""] * len(rows)
        for chosen in by_length([self.length(pair) for pair in rows], self.params):
            bases = [rows[i].base for i in chosen]
            tokens = torch.stack([self.known[base].prompt.tokens for base in bases])
            index, at = torch.arange(len(bases), device=self.lm.device), self.position[bases]
            values = patched[chosen]

            def edit(acts: Tensor, index: Tensor = index, at: Tensor = at, values: Tensor = values) -> Tensor:
                return acts.index_put((index, at), values.to(acts.dtype))

            generated = self.lm.generate(tokens, self.params.ravel.n_generated_tokens, self.hook, edit)
            for i, ids in zip(chosen, generated.tolist(), strict=True):
                texts[i] = answer_text(self.lm, ids)
        return texts


class Latents:
    """Latents of one token per prompt, non-zero ones only: [prompts, d_sae] of a wide SAE would not fit."""

    def __init__(self, n_prompts: int, d_sae: int, device: torch.device) -> None:
        self.d_sae, self.device = d_sae, device
        self._kept: list[tuple[Tensor, Tensor]] = [(torch.zeros(0, dtype=torch.long), torch.zeros(0))] * n_prompts

    def put(self, rows: Sequence[int], z: Tensor) -> None:
        """Keep z [len(rows), d_sae]."""
        for row, values in zip(rows, z, strict=True):
            active = values.nonzero()[:, 0]
            self._kept[row] = active, values[active]

    def __getitem__(self, rows: Sequence[int]) -> Tensor:
        """[len(rows), d_sae]"""
        z = torch.zeros(len(rows), self.d_sae, device=self.device)
        kept = [self._kept[row] for row in rows]
        counts = torch.tensor([len(active) for active, _ in kept], device=self.device)
        which = torch.arange(len(rows), device=self.device).repeat_interleave(counts)
        z[which, torch.cat([active for active, _ in kept])] = torch.cat([values for _, values in kept]).to(z.dtype)
        return z


class Swap(NamedTuple):
    """One SAE's patches: latents of base and source mixed by a mask, decoded."""

    sae: SparseAutoencoder
    latents: Latents
    group: PromptActivations

    def patched(self, pairs: Sequence[Pair], mask: Tensor, keeps_error: Tensor) -> Tensor:
        """Activations [pairs, d_in] in which mask [pairs, d_sae] says how much of each latent is the source's.

        Where keeps_error [pairs] is True, what the SAE leaves unexplained of the base stays: then an empty mask
        changes nothing. Elsewhere the reconstruction alone stands there, as in SAE Bench.
        """
        bases = [pair.base for pair in pairs]
        base, source = self.latents[bases], self.latents[[pair.source for pair in pairs]]
        with torch.no_grad():
            error = self.group.entity[bases] - self._decode(base)
        return self._decode(base + mask * (source - base)) + error * keeps_error[:, None]

    def _decode(self, z: Tensor) -> Tensor:
        return self.sae.decode(z.to(self.sae.W_dec.dtype)[:, None])[:, 0].float()
