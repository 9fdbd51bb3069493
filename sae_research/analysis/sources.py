"""What an analysis works on: a language model and SAEs from anywhere, checked to belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.analysis.stats import LatentStats, collect_stats, is_collected, store_folder
from sae_research.errors import UserError
from sae_research.lm import LanguageModel, load_language_model, token_mask
from sae_research.params import Params
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.files import CONFIG_FILE
from sae_research.saes.sae_lens import from_sae_lens
from sae_research.setup.fits import check_fits, fill_in
from sae_research.setup.sources import read_folder, read_release
from sae_research.store import fingerprint, slugify

PREPARED, TRAINED = Path("downloaded_saes"), Path("trained_saes")
RELEASE_PREFIX = "sae_lens:"


def open_sae(reference: str) -> tuple[str, SparseAutoencoder]:
    """(name, SAE) of what a user may write: a folder, a name in downloaded_saes/ or trained_saes/, or
    `sae_lens:RELEASE:ID`. Raises `UserError` when it is nowhere."""
    if reference.startswith(RELEASE_PREFIX):
        release, _, sae_id = reference.removeprefix(RELEASE_PREFIX).partition(":")
        if not sae_id:
            raise UserError(f"--sae {reference}: write sae_lens:RELEASE:ID; `analyze saes --search TEXT` lists them")
        return slugify(f"{release}_{sae_id}"), read_release(release, sae_id)
    for folder in (Path(reference), PREPARED / reference, TRAINED / reference):
        if folder.is_dir():
            return slugify(folder.resolve().name), read_folder(folder)
    known = ", ".join(local_names()) or "none yet"
    raise UserError(f"--sae {reference}: no such folder, nor a name in {PREPARED}/ or {TRAINED}/ (there: {known}); releases "
                    "are written sae_lens:RELEASE:ID")


def local_names() -> list[str]:
    """Names of the SAEs that the pipeline wrote."""
    return sorted({path.parent.name for root in (PREPARED, TRAINED) for path in root.glob(f"*/{CONFIG_FILE}")})


@dataclass
class Lab:
    """A language model with SAEs in it: what every function of `sae_research.analysis` takes.

        lab = Lab.open(["downloaded_saes/standard"])
        lab = Lab.of({"mine": my_sae}, lm, params)      # any objects with encode and decode
    """

    lm: LanguageModel
    saes: dict[str, SparseAutoencoder]
    params: Params
    _stats: dict[str, LatentStats] = field(default_factory=dict)

    @classmethod
    def open(cls, references: str | Sequence[str], params: Params | None = None, lm: LanguageModel | None = None) -> Lab:
        """Read SAEs (what `open_sae` takes) and load the model that `params` names. Raises `UserError` for one that does
        not fit the model."""
        params = params or Params()
        opened = [open_sae(one) for one in ([references] if isinstance(references, str) else references)]
        lm = lm or load_language_model(params.model.name, params.model.device, params.model.torch_dtype)
        saes: dict[str, SparseAutoencoder] = {}
        for name, sae in opened:
            unique = name if name not in saes else f"{name}_{sum(other.startswith(name) for other in saes) + 1}"
            saes[unique] = sae
        return cls.of(saes, lm, params)

    @classmethod
    def of(cls, saes: Mapping[str, Any], lm: LanguageModel, params: Params | None = None, hook: str | None = None) -> Lab:
        """SAEs that are in memory: ours, SAELens', or any object with `encode` and `decode`. hook: where an SAE that does
        not say so itself belongs."""
        params = params or Params()
        if not saes:
            raise UserError("an analysis needs at least one SAE")
        adapted = {name: adapt(sae, lm, hook) for name, sae in saes.items()}
        for name, sae in adapted.items():
            fill_in(sae, lm.name, hook or params.train.hook_name)
            check_fits(name, sae, lm)
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
            self._stats |= collect_stats(group, self.lm, self.params, progress)
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

    def mask(self, tokens: Tensor, acts: Tensor) -> Tensor:
        """Which tokens count, by `token_mask` of the parameters. bool [batch, seq]"""
        return token_mask(self.lm, tokens, acts, self.params.token_mask)


# --- objects of other libraries ----------------------------------------------------------------

def adapt(sae: Any, lm: LanguageModel, hook: str | None = None) -> SparseAutoencoder:
    """Any object with `encode` and `decode` as an SAE of this project. Raises `UserError` for one without."""
    if isinstance(sae, SparseAutoencoder):
        return sae
    if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
        raise UserError(f"{type(sae).__name__} has no encode and decode")
    if type(sae).__module__.startswith("sae_lens"):
        try:
            return from_sae_lens(sae)
        except UserError:
            scaled = (getattr(sae.cfg, "normalize_activations", None) or "none") != "none"
            if scaled or hasattr(sae.cfg, "d_out"):
                raise  # its decoder rescales by what its encoder last saw, or writes elsewhere than it reads (transcoders)
            metadata = sae.cfg.metadata  # an architecture that this project lacks runs as it is
            hook = metadata.hook_name or hook
            return ForeignSAE.around(sae, lm.d_in(hook or ""), hook or "", metadata.model_name or "")
    if hook is None:
        raise UserError(f"{type(sae).__name__} does not say which hook it reads: give hook=, e.g. blocks.8.hook_resid_post")
    return ForeignSAE.around(sae, lm.d_in(hook), hook)


class ForeignSAE(SparseAutoencoder):
    """Another library's SAE behind this project's contract. Whether its latents depend on other tokens, and whether its
    decoder is affine, is found by trying."""

    form = "foreign"
    tensor_names = ("W_dec", "b_dec")

    def __init__(self, cfg: SAEConfig, inner: Any, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.inner = inner

    @classmethod
    @torch.no_grad()
    def around(cls, inner: Any, d_in: int, hook_name: str, model_name: str = "") -> ForeignSAE:
        """Wrap `inner`. Raises `UserError` when its shapes are not [batch, seq, d_in] -> [batch, seq, d_sae] and back, or
        its decoder is not affine."""
        tensor = next(iter(inner.parameters()), None) if isinstance(inner, torch.nn.Module) else None
        device = torch.device("cpu") if tensor is None else tensor.device
        x = torch.randn(1, 6, d_in, generator=torch.Generator().manual_seed(0)).to(device)
        z = inner.encode(x)
        d_sae = z.shape[-1]
        b_dec = inner.decode(torch.zeros(1, 1, d_sae, device=device))[0, 0]
        W_dec = torch.cat([inner.decode(rows[None].to(device))[0] - b_dec for rows in torch.eye(d_sae).split(1024)])
        if z.shape != (1, 6, d_sae) or W_dec.shape != (d_sae, d_in):
            raise UserError(f"{type(inner).__name__}: encode gives {tuple(z.shape)} and decode rows {tuple(W_dec.shape)} "
                            f"for activations {tuple(x.shape)}")
        if not torch.allclose(inner.decode(z), z @ W_dec + b_dec, atol=1e-3, rtol=1e-3):
            raise UserError(f"{type(inner).__name__}: its decoder is not affine, so a latent has no direction of its own")
        sae = cls(SAEConfig(form="foreign", d_in=d_in, d_sae=d_sae, hook_name=hook_name, model_name=model_name), inner,
                  W_dec=W_dec, b_dec=b_dec)
        # set on the object: these are this SAE's properties, not the class's
        sae.causal = torch.allclose(inner.encode(x[:, :3]), z[:, :3], atol=1e-4)  # type: ignore[misc]
        alone = torch.cat([inner.encode(x[:, i:i + 1]) for i in range(6)], 1)
        sae.per_token = torch.allclose(alone, z, atol=1e-4)  # type: ignore[misc]
        sae.signed = bool((z < 0).any())  # type: ignore[misc]
        return sae

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(self.inner.encode(x.to(self.W_dec.dtype)), mask)

    def decode(self, z: Tensor) -> Tensor:
        return self.inner.decode(z)

    def weights_fingerprint(self) -> str:
        """Over all the inner object's tensors, where it has any to show."""
        state = self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}
        probe = self.inner.encode(torch.randn(1, 8, self.cfg.d_in, generator=torch.Generator().manual_seed(1)).to(
            self.W_dec.device))
        return fingerprint([super().weights_fingerprint(), type(self.inner).__qualname__, repr(probe.sum(-1).tolist()),
                            {name: [tuple(t.shape), repr(float(t.double().sum()))] for name, t in state.items()}])
