"""A place's share of the activation stream: shuffled rows in a bounded buffer, normalised, and their principal components.

A place is a hook, the two hooks of a transcoder, or all of a crosscoder or cross-layer transcoder (`Train.place_of`). What a
linear code of n components explains of what is to be reconstructed is the reference for an SAE; across layers there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params, TokenMask
from sae_research.config.recipes import ARROW, PLUS, hooks_at
from sae_research.lm import LanguageModel, median_activation_norm, token_mask
from sae_research.lm.hooks import check_pair, parse_hook
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.text.tokens import StoredContexts


class StreamingPCA:
    """Mean and covariance of rows seen in batches; float64 sums over float32 products."""

    def __init__(self, d_in: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64; its sums stay in float32
        wide = torch.float32 if str(device).startswith("mps") else torch.float64
        self.n = 0
        self.sum_D = torch.zeros(d_in, dtype=wide, device=device)
        self.products_DD = torch.zeros(d_in, d_in, dtype=wide, device=device)

    @torch.no_grad()
    def update(self, x_ND: Tensor) -> None:
        """Add float32 rows, on the device the sums are on: nothing here waits for it."""
        self.n += len(x_ND)
        self.sum_D += x_ND.sum(0)
        self.products_DD += x_ND.T @ x_ND

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D], float64 on the CPU."""
        mean_D = self.sum_D.cpu().double() / self.n
        return mean_D, self.products_DD.cpu().double() / self.n - torch.outer(mean_D, mean_D)

    def components(self) -> tuple[Tensor, Tensor]:
        """Mean [D] and orthonormal rows [D, D], most variance first, float32."""
        mean_D, covariance_DD = self.moments()
        _, vectors_DD = torch.linalg.eigh(covariance_DD)
        return mean_D.float(), vectors_DD.flip(1).T.contiguous().float()


def pca_variance_explained(pca: StreamingPCA, x_ND: Tensor, numbers: tuple[int, ...]) -> dict[int, float]:
    """For each n: `1 - |x - x_hat|^2 / |x - mean(x)|^2` over rows, x_hat from n components.

    Numbers above d_in are left out. Same units as the rows that `pca` saw.
    """
    mean_D, rows_DD = pca.components()
    x_ND = x_ND.cpu().float()
    total = (x_ND - x_ND.mean(0)).square().sum(dtype=torch.float64)
    centred_ND = x_ND - mean_D
    # The rows are orthonormal, so the residual's square is the square less that of the coefficients.
    squares_D = (centred_ND @ rows_DD.T).square().sum(0, dtype=torch.float64)
    residual = centred_ND.square().sum(dtype=torch.float64)
    return {n: float(1 - (residual - squares_D[:n].sum()) / total) for n in numbers if n <= len(mean_D)}


PCA_EVERY = 4
"""Only every so many batches are added to PCA, which costs as much as a small SAE otherwise."""
_COUNTS = ("tokens_read", "rows_read", "rows_served", "held", "cursor", "served_of_order")


class Calibration(NamedTuple):
    """What is measured once, on the first chunk of the stream."""

    median_norm: float
    """Median activation norm of tokens neither special nor first, model units: what the norm rule compares
    with."""
    scale: float
    """Factor to normalised activations: `scale^2 * mean |x|^2 = 1` over counted tokens (the convention of
    dictionary_learning, whose L1 coefficients therefore carry over)."""
    mean_norm: float
    """Mean norm of the chunk's counted activations, model units."""
    further: Sequence[Sequence[float]] = ()
    """(median norm, factor) of what a transcoder writes, or at further hooks of several; the first two fields are then
    those of the first hook, and `mean_norm` of all that is read."""

    @property
    def median_norms(self) -> list[float]:
        """What the norm rule compares with, hook by hook."""
        return [self.median_norm, *(median for median, _ in self.further)]

    @property
    def scales(self) -> list[float]:
        """Factors to normalised activations, hook by hook."""
        return [self.scale, *(scale for _, scale in self.further)]


class StreamBatch(NamedTuple):
    acts: Tensor
    """Normalised activations of counted tokens [batch_size, d_in], float32; of a transcoder what it reads and beside it what
    it writes [batch_size, 2 d_in], of a crosscoder what it has at its hooks, side by side."""
    progress: float
    """Fraction of the run done at the middle of this batch: above 0, below 1, so no step has a zero rate."""


class HookBuffer:
    """One hook's activations, shuffled: each counted token once, deterministic from `params.random_seed`. Of several
    hooks the activations lie side by side, and a token counts where it does at all of them.

    It knows nothing of other hooks, so that an SAE's batches are those of a run with its hook alone. Which tokens
    count is decided by this hook's own norms. How many tokens that rule drops is only known at the end, so progress is
    measured against an estimate: tokens kept so far plus the rest of the text at the same rate. It is exact once the
    last chunk is read.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        params: Params,
        tokens: Tensor | StoredContexts,
        chunk_tokens: int,
        device: torch.device,
    ) -> None:
        self.lm, self.hook, self.params, self.device = lm, hook, params, device
        self.hooks = hooks_at(hook)
        self.d_hook, self.n_tokens = lm.d_in(self.hooks[0]), tokens.numel()
        self.width = self.d_hook * len(self.hooks)
        """Of a row."""
        self.d_in = self.width // 2 if ARROW in hook else self.width
        """What a dictionary reads of a row, and what it writes."""
        _check_hooks(lm, hook)
        self.tokens_read = self.rows_read = self.rows_served = self.held = 0
        self.order: Tensor | None = None
        """The permutation of the rows held that is being served: `cursor` of `served_of_order` rows so far."""
        self.cursor = self.served_of_order = 0
        self.generator = torch.Generator().manual_seed(int(fingerprint([params.random_seed, "stream"])[:12], 16))
        self.full = max(params.train.buffer_tokens, 2 * params.train.batch_size)
        # In the model's precision: half the memory in bfloat16, and nothing is lost.
        self.bank = torch.empty(self.full + chunk_tokens, self.width, dtype=lm.dtype, device=device)
        # of all layers together it would take longer than the training
        self.pca = StreamingPCA(0 if ARROW in hook and PLUS in hook else self.d_in, device)
        self.follow_pca = True
        self.calibration: Calibration

    @property
    def fraction_kept(self) -> float:
        """Fraction of the tokens read so far that count."""
        return self.rows_read / max(1, self.tokens_read)

    @property
    def expected_rows(self) -> float:
        """Counted tokens of the whole run, as far as can be told by now."""
        return self.rows_read + self.fraction_kept * (self.n_tokens - self.tokens_read)

    def calibrate(self, tokens: Tensor, acts: Tensor, counted: Tensor | None = None) -> Tensor:
        """Measure on the first chunk, of which `counted` as in `feed`; returns its counted activations, normalised
        [n, d_in], to start SAEs from.

        Raises `UserError` when no token counts or the hook gives zeros there.
        """
        tokens = tokens.to(acts.device)
        if not token_mask(self.lm, tokens, acts, TokenMask(outlier_norm_multiple=None), counted=counted).any():
            raise UserError("train.tokens: no token of the first contexts counts; give more text or longer contexts")
        sides = acts.split(self.d_hook, dim=-1)
        medians = [median_activation_norm(self.lm, tokens, side, counted) for side in sides]
        kept = counted_at(self.lm, tokens, sides, self.params.token_mask, medians, counted)
        rows = acts[kept].to(self.device).float()
        scales = [self._scale(hook, own) for hook, own in zip(self.hooks, rows.split(self.d_hook, dim=1), strict=True)]
        norm = float(rows[:, : self.d_in].norm(dim=1).mean())
        further = list(zip(medians[1:], scales[1:], strict=True))
        self.calibration = Calibration(medians[0], scales[0], norm, further)
        return self._normalised(rows)

    @staticmethod
    def _scale(hook: str, rows: Tensor) -> float:
        mean_square = float(rows.square().sum(1).mean())
        if not 0 < mean_square < float("inf"):
            raise UserError(
                f"{hook}: the mean squared activation norm is {mean_square}; the model's activations "
                "are damaged (try train.llm_dtype: float32)"
            )
        return mean_square**-0.5

    def _normalised(self, rows: Tensor) -> Tensor:
        """float32 rows in the model's units, normalised in place."""
        for side, scale in zip(rows.split(self.d_hook, dim=1), self.calibration.scales, strict=True):
            side.mul_(scale)
        return rows

    def sample(self, n: int) -> Tensor:
        """Up to `n` rows that lie in the buffer, as they come, what is read of them in the model's units [n, d_in], float32.
        Changes nothing here."""
        return self.bank[: min(n, self.held), : self.d_in].float()

    def written(self, rows: Tensor) -> Tensor:
        """What is to be reconstructed of rows in the model's units [n, width], normalised [n, d_in]."""
        sides = rows[:, -self.d_in :].split(self.d_hook, dim=1)
        scales = self.calibration.scales[-len(sides) :]
        return side_by_side([side * scale for side, scale in zip(sides, scales, strict=True)])

    def feed(self, tokens: Tensor, acts: Tensor, of_roles: Tensor | None = None) -> None:
        """Take in a chunk: tokens [n, context_size], activations [n, context_size, d_in] in the model's units, and where
        tokens of `text.roles` stand, bool [n, context_size]; None: everywhere."""
        self.take(tokens.numel(), self.counted(tokens, acts, of_roles))

    def counted(self, tokens: Tensor, acts: Tensor, of_roles: Tensor | None = None) -> Tensor:
        """Activations of the tokens that count [rows, d_in], of a chunk as in `feed`. Changes nothing here."""
        tokens = tokens.to(acts.device)
        sides, rule = acts.split(self.d_hook, dim=-1), self.params.token_mask
        return acts[counted_at(self.lm, tokens, sides, rule, self.calibration.median_norms, of_roles)]

    def take(self, n_tokens: int, rows: Tensor) -> None:
        """Take in a chunk of `n_tokens` whose counted activations are `rows`."""
        self.tokens_read += n_tokens
        self.rows_read += len(rows)
        self.bank[self.held : self.held + len(rows)] = rows.to(self.device)
        self.held += len(rows)
        if self.held >= self.full:
            self._shuffle(self.held // 2)

    def finish(self) -> None:
        """No more chunks: serve what is left, in whole batches. Raises `UserError` if that never made a batch."""
        self._shuffle(self.held)
        if self.rows_served + self.served_of_order == 0:
            raise UserError(
                f"train.tokens: only {self.rows_read:,} of {self.tokens_read:,} tokens count, fewer than "
                f"one batch of {self.params.train.batch_size:,}; raise train.tokens or lower train.batch_size"
            )

    def next_batch(self) -> StreamBatch | None:
        """The next batch, or None when more must be fed first."""
        size = self.params.train.batch_size
        while self.order is not None and self.cursor >= self.served_of_order:
            rest = self.bank[self.order[self.served_of_order :]]
            self.held, self.order = len(rest), None
            self.bank[: self.held] = rest
            if self.held >= self.full:  # a chunk larger than the buffer: there would be no room for the next
                self._shuffle(self.held // 2)
        if self.order is None:
            return None
        acts = self._normalised(self.bank[self.order[self.cursor : self.cursor + size]].float())
        if self.follow_pca and len(self.pca.sum_D) and self.rows_served // size % PCA_EVERY == 0:
            self.pca.update(acts[:, -self.d_in :])
        progress = (self.rows_served + size / 2) / self.expected_rows
        self.cursor += size
        self.rows_served += size
        return StreamBatch(acts, progress)

    def _shuffle(self, serve: int) -> None:
        """Draw a new order of all rows held, the first `serve` of which will be served, in whole batches."""
        size = self.params.train.batch_size
        self.order = torch.randperm(self.held, generator=self.generator).to(self.device)
        self.served_of_order, self.cursor = serve // size * size, 0

    # --- checkpoints ---

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` goes on exactly here."""
        values = {key: getattr(self, key) for key in _COUNTS}
        values |= {"calibration": self.calibration._asdict(), "pca_n": self.pca.n, "serving": self.order is not None}
        tensors = {
            "bank": self.bank[: self.held],
            "generator": self.generator.get_state(),
            "pca_sum_D": self.pca.sum_D,
            "pca_products_DD": self.pca.products_DD,
        }
        return values, tensors if self.order is None else {**tensors, "order": self.order}

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for key in _COUNTS:
            setattr(self, key, values[key])
        self.calibration = Calibration(**values["calibration"])
        self.bank[: self.held] = tensors["bank"].to(self.device)
        self.order = tensors["order"].to(self.device) if values["serving"] else None
        self.generator.set_state(tensors["generator"])
        self.pca.n = values["pca_n"]
        self.pca.sum_D.copy_(tensors["pca_sum_D"])
        self.pca.products_DD.copy_(tensors["pca_products_DD"])


def _check_hooks(lm: LanguageModel, place: str) -> None:
    """Raises `UserError` for two hooks that are no transcoder's, or hooks of several widths."""
    hooks, key = hooks_at(place), "hook_out" if ARROW in place else "hook_names"
    if ARROW in place:
        key += "s" if PLUS in place else ""
        try:
            for read, written in zip(hooks[: len(hooks) // 2], hooks[len(hooks) // 2 :], strict=True):
                check_pair(read, written)
            layers = [parse_hook(hook)[0] for hook in hooks[: len(hooks) // 2]]
            if any(later <= earlier for earlier, later in pairwise(layers)):
                raise UserError(f"a cross-layer transcoder's hooks stand in the order of their layers, one a layer: {place}")
        except UserError as error:
            raise UserError(f"train.saes: {key}: {error}") from None
    for hook in hooks[1:]:
        if lm.d_in(hook) != lm.d_in(hooks[0]):
            raise UserError(
                f"train.saes: {key}: {hooks[0]} has {lm.d_in(hooks[0])} dimensions, {hook} {lm.d_in(hook)}; only equal ones"
            )


def side_by_side(acts: Sequence[Tensor]) -> Tensor:
    """Activations at several hooks as one tensor [..., n d_hook]; of one hook as they are."""
    return acts[0] if len(acts) == 1 else torch.cat([*acts], dim=-1)


def counted_at(
    lm: LanguageModel,
    tokens: Tensor,
    sides: Sequence[Tensor],
    rule: TokenMask,
    medians: Sequence[float],
    counted: Tensor | None,
) -> Tensor:
    """Where tokens count at every hook, bool [n, context_size]. sides: activations by hook [n, context_size, d_in]."""
    masks = [token_mask(lm, tokens, acts, rule, median, counted) for acts, median in zip(sides, medians, strict=True)]
    kept = masks[0]
    for mask in masks[1:]:
        kept = kept & mask
    return kept
