"""The subspace a set of latents spans in use: principal components of what they reconstruct together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sae_research.analysis.store import LatentStats, check_latents
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder

Grouping = Callable[[str], str | None]
"""From a token's text to its group; None leaves it ungrouped."""

OTHER = "other"
MAX_POINTS = 200_000


class Subspace(NamedTuple):
    """Every token on which at least one of the latents fires."""

    coordinates: np.ndarray
    """On the principal components, largest first [points, components]."""
    variance_ratio: np.ndarray
    """Fraction of the variance of the reconstructions on each component [components]."""
    group: list[str]
    """[points]"""
    token: list[str]
    """[points]"""
    place: np.ndarray
    """(context, position) of each point [points, 2]."""
    context: list[str]
    """Some tokens around each point, as text [points]."""
    components: np.ndarray
    """Unit directions [components, d_in]."""


def by_word(groups: Mapping[str, Sequence[str]] | Sequence[str]) -> Grouping:
    """Group tokens by their stripped text, case aside: a list of words is a group each, a mapping names groups of words."""
    named = groups if isinstance(groups, Mapping) else {word: [word] for word in groups}
    lookup = {word.strip().lower(): name for name, words in named.items() for word in words}
    return lambda token: lookup.get(token.strip().lower())


def subspace(
    stats: LatentStats,
    sae: SparseAutoencoder,
    latents: Sequence[int],
    grouping: Grouping | None = None,
    n_components: int = 3,
    buffer: int = 5,
) -> Subspace:
    """PCA of `sum over chosen latents of z_f d_f` at the tokens of the store where any of them fires; no pass of the model.

    grouping: default by token text. Raises `UserError` for a latent that is not there, and where fewer points than
    components + 1 fire.
    """
    from sklearn.decomposition import PCA

    check_latents(latents, sae.cfg.d_sae)
    if stats.about["sae"]["fingerprint"] != sae.weights_fingerprint():
        raise UserError(f"the statistics in {stats.folder} are of another SAE ({stats.about['sae']['name']})")
    numbers, z_NL = firing_together(stats, latents)
    if len(numbers) <= n_components or len(latents) < n_components:
        raise UserError(
            f"{len(latents)} latents fire on {len(numbers)} tokens together: too few for {n_components} "
            "components; name more latents or raise analysis.tokens"
        )
    rows = sae.W_dec[list(latents)].detach().float().cpu().numpy()
    pca = PCA(n_components, svd_solver="full", random_state=0).fit(z_NL @ rows)
    # the sign of a component is arbitrary: the largest entry of each is made positive
    signs = np.sign(pca.components_[np.arange(n_components), np.abs(pca.components_).argmax(1)])
    place = np.stack(np.divmod(numbers, stats.context_size), axis=1)
    tokens = stats.strings(stats.token_ids[place[:, 0], place[:, 1]])
    named = grouping or (lambda token: token.strip() or OTHER)
    return Subspace(
        pca.transform(z_NL @ rows) * signs,
        pca.explained_variance_ratio_,
        [named(token) or OTHER for token in tokens],
        tokens,
        place,
        [around(stats, int(c), int(p), buffer) for c, p in place],
        pca.components_ * signs[:, None],
    )


def firing_together(stats: LatentStats, latents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(token numbers [n], activations [n, latents]) of all tokens on which any of the latents fires. Raises `UserError`
    beyond `MAX_POINTS`."""
    found = [stats.activations(latent) for latent in latents]
    numbers = np.unique(np.concatenate([tokens for tokens, _ in found]))
    if len(numbers) > MAX_POINTS:
        raise UserError(f"these latents fire on {len(numbers):,} tokens, more than {MAX_POINTS:,}: leave out dense ones")
    z_NL = np.zeros((len(numbers), len(latents)), np.float32)
    for column, (tokens, values) in enumerate(found):
        z_NL[np.searchsorted(numbers, tokens), column] = values
    return numbers, z_NL


def around(stats: LatentStats, context: int, position: int, buffer: int) -> str:
    """A token with `buffer` tokens on either side, as text."""
    ids = stats.token_ids[context, max(0, position - buffer) : position + buffer + 1]
    return "".join(stats.strings(ids))
