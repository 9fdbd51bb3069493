"""What an analysis works on: a language model and SAEs from anywhere, checked to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.analysis.collect import LatentStats, collect_stats, is_collected, store_folder
from sae_research.config.params import Params
from sae_research.lm import LanguageModel, load_configured, token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import FAULTS
from sae_research.saes.sources import check_fits, fill_in, open_sae, sae_name


@dataclass
class AnalysisContext:
    """A language model with SAEs in it: what every function of `sae_research.analysis` takes.

    analysis = AnalysisContext.open(["downloaded_saes/standard"])
    analysis = AnalysisContext.of({"mine": my_sae}, lm, params)      # any objects with encode and decode
    """

    lm: LanguageModel
    saes: dict[str, SparseAutoencoder]
    params: Params
    _stats: dict[str, LatentStats] = field(default_factory=dict)

    @classmethod
    def open(
        cls, references: str | Sequence[str], params: Params | None = None, lm: LanguageModel | None = None
    ) -> AnalysisContext:
        """SAEs as `open_sae` takes them, called after their folders or releases; two of one name are numbered."""
        saes: dict[str, str] = {}
        for one in [references] if isinstance(references, str) else references:
            name = sae_name(one)
            saes[name if name not in saes else f"{name}_{sum(other.startswith(name) for other in saes) + 1}"] = one
        return cls.of(saes, lm, params)

    @classmethod
    def of(
        cls,
        saes: Mapping[str, Any],
        lm: LanguageModel | None = None,
        params: Params | None = None,
        hook: str | None = None,
    ) -> AnalysisContext:
        """SAEs by name, each as `open_sae` takes it; objects in memory are taken as they are now: after a change to one,
        make a new one. lm: by default the model that `params` names. hook: where an SAE that does not say so itself belongs.

        Raises `UserError` for an SAE that is not there or does not fit the model."""
        params = params or Params()
        if not saes:
            raise UserError("an analysis needs at least one SAE")
        # files first: the model takes longer
        opened = {name: open_sae(sae) if isinstance(sae, (str, Path)) else sae for name, sae in saes.items()}
        lm = lm or load_configured(params.model)
        adapted = {name: open_sae(sae, lm, hook) for name, sae in opened.items()}
        for name, sae in adapted.items():
            fill_in(sae, lm.name, hook or params.train.hook_name)
            check_fits(name, sae, lm, params.model.same_as)
            if sae.cfg.is_crosscoder:
                sae.cfg.check_one_hook("the analysis of latents")
            sae.to(lm.device)
        return cls(lm, adapted, params)

    @property
    def only(self) -> tuple[str, SparseAutoencoder]:
        """The one SAE. Raises `UserError` where there are several."""
        if len(self.saes) > 1:
            raise UserError(f"this works on one SAE at a time, not on {', '.join(self.saes)}")
        return next(iter(self.saes.items()))

    def one_hook_each(self) -> dict[str, SparseAutoencoder]:
        """SAEs by the hook they replace. Raises `UserError` when two would replace the same activations."""
        by_hook: dict[str, SparseAutoencoder] = {}
        names: dict[str, str] = {}
        for name, sae in self.saes.items():
            hook = sae.cfg.hook_name
            if hook in by_hook:
                raise UserError(f"{names[hook]} and {name} both replace {hook}: give one SAE for each hook")
            by_hook[hook], names[hook] = sae, name
        return by_hook

    def stats(self, name: str, progress: bool = False) -> LatentStats:
        """Statistics of an SAE's latents, from the cache or collected now, with those of its hook's other SAEs."""
        if name not in self._stats:
            hook = self.saes[name].cfg.hook_name
            group = {other: sae for other, sae in self.saes.items() if sae.cfg.hook_name == hook}
            try:
                self._stats |= collect_stats(group, self.lm, self.params, progress)
            except FAULTS:
                if len(group) == 1:
                    raise
                # one of them fails, this one perhaps not
                self._stats |= collect_stats({name: self.saes[name]}, self.lm, self.params, progress)
        return self._stats[name]

    def stats_at_hand(self, name: str) -> LatentStats | None:
        """The same where they were collected before; None where that pass is still to come."""
        if name not in self._stats and is_collected(store_folder(self.saes[name], self.lm, self.params)):
            self.stats(name)
        return self._stats.get(name)

    def tokens(self, prompt: str) -> Tensor:
        """Ids of a prompt, the document separator in front as in all text here [1, seq]. Raises `UserError` for an empty
        prompt."""
        ids = self.lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("the prompt is empty")
        return torch.tensor([[self.lm.separator_id, *ids]], device=self.lm.device)

    def token(self, text: str) -> int:
        """The id of a text that is one token. Raises `UserError` for any other, with the tokens it falls into."""
        ids = self.lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            parts = " + ".join(repr(self.lm.tokenizer.decode([i])) for i in ids) or "nothing"
            raise UserError(f"{text!r} is not one token of {self.lm.name} but {parts}; mind the leading space")
        return ids[0]

    def mask(self, tokens: Tensor, acts: Tensor, counted: Tensor | None = None) -> Tensor:
        """Which tokens count, by `token_mask` of the parameters. counted: as `Contexts.counted`. bool [batch, seq]"""
        return token_mask(self.lm, tokens, acts, self.params.token_mask, counted=counted)
