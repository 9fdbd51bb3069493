"""The 113 binary tasks of the package `sae_probes`: their texts, both splits, and one vector per text.

SAE Bench's split draws rows at random, so that copies of a text land on either side (28 % of all rows have a copy). Ours
puts every distinct text where the project's one split puts it, drops texts whose copies disagree on the label and near
copies that would stand on either side (`text.near_copies`), and takes as many of either class.

The vector is the activation, and every SAE's latents, at the text's last token: the very last one in SAE Bench's definition,
the last one inside `token_mask` in ours. SAE Bench cuts that token's activation out and encodes it alone, which only a
per-token encoder survives. Here the whole text is encoded, so that encoders over sequences work as well; for those, masked
tokens are hidden in both definitions, since SAE Bench has none.

For per-token encoders nothing but the last tokens' activations is kept. Whole texts are kept (in the memory-mapped cache)
only where an SAE reads sequences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor

from sae_research.config.evaluation_params import SparseProbingSaeProbes
from sae_research.config.params import Params, TokenMask
from sae_research.lm import Batch, LanguageModel, token_mask
from sae_research.lm.activations import HookActivations
from sae_research.runtime.cache import cache_dir, new_entry, prune, usable
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import fingerprint
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.text.packaged import packaged_folder, packaged_version
from sae_research.text.split import out_of_place, split_of_hash, text_hash
from sae_research.text.tasks import TEST, TRAIN, TaskUnavailable

SAE_BENCH_MAX_TEXTS, SAE_BENCH_MAX_TRAIN, SAE_BENCH_TEST = 5000, 1024, 100
MIN_TRAIN, MIN_TEST = 16, 8
"""Texts of either class below which a task is skipped."""


class Split(NamedTuple):
    """Which texts a probe is fitted on and scored on, as indices into `ProbeTask.texts`, and their classes (0 or 1)."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


class ProbeTask(NamedTuple):
    name: str
    texts: list[str]
    """Distinct texts of both splits, as they stand in the package."""
    sae_bench: Split
    lab: Split
    notes: dict[str, Any]
    """JSON-able: sizes, what was dropped, and how much of SAE Bench's test set has its copy in train."""


@cache
def task_names() -> tuple[str, ...]:
    """The names of all tasks in the package's order, `5_hist_fig_ismale` first."""
    master = pd.read_csv(
        packaged_folder().parent / "probing_datasets_MASTER.csv.zst",
        compression="zstd",
        usecols=["Data type", "Dataset save name"],
    )  # ty: ignore[no-matching-overload]
    files = master.loc[master["Data type"] == "Binary Classification", "Dataset save name"]
    return tuple(file.rpartition("/")[2].partition(".")[0] for file in files)


def chosen_names(config: SparseProbingSaeProbes) -> list[str]:
    """The tasks that `dataset_names` asks for. Raises `UserError` for a name the package does not carry."""
    known = task_names()
    if config.dataset_names == "all":
        return list(known)
    for name in config.dataset_names:
        if name not in known:
            raise UserError(
                f"sparse_probing_sae_probes.dataset_names: sae-probes {packaged_version()} has no binary task "
                f"{name!r}{did_you_mean(name, known)}"
            )
    return list(dict.fromkeys(config.dataset_names))


def load_probe_task(name: str, config: SparseProbingSaeProbes, seed: int) -> ProbeTask:
    """A packaged task. Raises `TaskUnavailable` where it has one class or too few texts."""
    frame = read_rows(name)
    return make_task(name, frame["prompt"].tolist(), frame["target"].tolist(), config, seed)


def read_rows(name: str) -> pd.DataFrame:
    """Columns `prompt` and `target` of a packaged task, texts exactly as they stand there: the last token is what counts."""
    return pd.read_csv(
        packaged_folder() / f"{name}.csv.zst", compression="zstd", usecols=["prompt", "target"], dtype={"prompt": str}
    ).dropna()  # ty: ignore[no-matching-overload]


def make_task(
    name: str, texts: Sequence[str], targets: Sequence[Any], config: SparseProbingSaeProbes, seed: int
) -> ProbeTask:
    """Both splits of labelled texts. The class that sorts last is the positive one, as in SAE Bench.

    Raises `TaskUnavailable` for one class, more than two, or too few texts.
    """
    classes, labels = np.unique(np.asarray(targets[:SAE_BENCH_MAX_TEXTS]), return_inverse=True)
    if len(classes) != 2:
        raise TaskUnavailable(f"a binary task needs two classes, found {', '.join(map(str, classes[:5])) or 'none'}")
    rows = TaskRows(list(texts[:SAE_BENCH_MAX_TEXTS]), labels, seed)
    train, test = sae_bench_split(labels, kept := rows.of_sae_bench(config.max_texts), seed)
    lab_train, lab_test = (
        rows.of_lab(part, size, least)
        for part, size, least in (
            (TRAIN, config.probe_train_set_size, MIN_TRAIN),
            (TEST, config.probe_test_set_size, MIN_TEST),
        )
    )
    index_of: dict[str, int] = {}
    numbers = [
        np.array([index_of.setdefault(rows.texts[row], len(index_of)) for row in part])
        for part in (train, test, lab_train, lab_test)
    ]
    in_train = {rows.hashes[row] for row in train}
    notes = {
        "positive_class": str(classes[1]),
        "rows": len(labels),
        "rows_in_sae_bench_split": len(kept),
        "texts": len(index_of),
        "conflicting_dropped": len(rows.conflicting),
        "near_copies_dropped": len(rows.crossing),
        "sae_bench_test_texts_with_copy_in_train": sum(rows.hashes[row] in in_train for row in test),
        "sizes": {"sae_bench": [len(train), len(test)], "lab_v1": [len(lab_train), len(lab_test)]},
    }
    return ProbeTask(
        name,
        list(index_of),
        Split(numbers[0], labels[train], numbers[1], labels[test]),
        Split(numbers[2], labels[lab_train], numbers[3], labels[lab_test]),
        notes,
    )


def sae_bench_split(labels: np.ndarray, kept: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The train and test rows that sae-probes draws from the rows `kept`: at most 1024, and all others but one.

    The calls of the generator follow its `get_train_test_indices`. Raises `TaskUnavailable` for too few rows.
    """
    n_train = min(len(kept) - SAE_BENCH_TEST, SAE_BENCH_MAX_TRAIN)
    n_test = len(kept) - n_train - 1
    rows_of = {label: np.flatnonzero(labels[kept] == label) for label in (1, 0)}
    need = {1: -(-n_train // 2) + -(-n_test // 2), 0: n_train // 2 + n_test // 2}
    if n_train < 2 * MIN_TRAIN or any(len(rows_of[label]) < need[label] for label in need):
        raise TaskUnavailable(
            f"SAE Bench's split needs {SAE_BENCH_TEST + 2 * MIN_TRAIN} texts, half of either class; found "
            f"{len(rows_of[1])} and {len(rows_of[0])}"
        )
    generator = np.random.RandomState(seed)

    def draw(rows: dict[int, np.ndarray], size: int) -> dict[int, np.ndarray]:
        sizes = {1: -(-size // 2), 0: size // 2}
        return {label: generator.choice(rows[label], size=sizes[label], replace=False) for label in (1, 0)}

    train = draw(rows_of, n_train)
    test = draw({label: np.setdiff1d(rows_of[label], train[label]) for label in (1, 0)}, n_test)
    return tuple(kept[generator.permutation(np.concatenate([part[1], part[0]]))] for part in (train, test))


class TaskRows:
    """The rows of one task, ordered by a hash that the seed changes and in which copies stand together."""

    def __init__(self, texts: list[str], labels: np.ndarray, seed: int) -> None:
        self.texts, self.labels = texts, labels
        self.hashes = [text_hash(text) for text in texts]
        self.splits = [split_of_hash(digest) for digest in self.hashes]
        # texts of the probing splits first: both definitions then read mostly the same, and no SAE was trained on them
        keys = [
            (split not in (TRAIN, TEST), hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest(), row)
            for row, (split, digest) in enumerate(zip(self.splits, self.hashes, strict=True))
        ]
        self.order = [row for *_, row in sorted(keys)]
        label_of: dict[str, int] = {}
        self.conflicting = {
            digest for digest, label in zip(self.hashes, labels, strict=True) if label_of.setdefault(digest, label) != label
        }
        probed = {
            self.hashes[row]: row
            for row in reversed(range(len(texts)))  # of copies the first, as `of_lab` takes
            if self.splits[row] in (TRAIN, TEST) and self.hashes[row] not in self.conflicting
        }
        wrong = out_of_place([texts[row] for row in probed.values()], [self.splits[row] for row in probed.values()])
        self.crossing = {digest for digest, left_out in zip(probed, wrong, strict=True) if left_out}

    def of_sae_bench(self, most: int | None) -> np.ndarray:
        """All rows in the file's order, or the first `most` by hash, half of either class, copies and all."""
        if most is None or most >= len(self.texts):
            return np.arange(len(self.texts))
        taken = [[row for row in self.order if self.labels[row] == label][: most // 2] for label in (0, 1)]
        return np.sort(np.concatenate(taken))

    def of_lab(self, part: str, size: int, least: int) -> np.ndarray:
        """One row for each distinct text of a split, as many of either class, at most `size`, in an order without
        meaning. Raises `TaskUnavailable` where a class has fewer than `least`."""
        rows: dict[int, list[int]] = {0: [], 1: []}
        seen = self.conflicting | self.crossing
        for row in self.order:
            digest = self.hashes[row]
            if self.splits[row] == part and digest not in seen:
                seen.add(digest)
                rows[int(self.labels[row])].append(row)
        each = min(size // 2, *(len(members) for members in rows.values()))
        if each < least:
            raise TaskUnavailable(
                f"our split needs {least} distinct {part} texts of either class; found "
                f"{len(rows[0])} and {len(rows[1])}, sizes asked for {size // 2}"
            )
        place = {row: i for i, row in enumerate(self.order)}
        # interleaved, so that any stretch of it holds both classes alike: validation takes the last ones
        return np.array(
            [row for pair in zip(rows[0][:each], rows[1][:each], strict=True) for row in sorted(pair, key=place.__getitem__)]
        )


_FILE = "last_tokens.npy"
_ENCODE_AT_ONCE = 1024
"""Texts whose last tokens are encoded together."""
_TOKENS_PER_PASS_ON_CPU = 1024
"""Tokens of one pass of the model on a CPU, which gains nothing from more; elsewhere as many as `llm_batch_size` texts
of full length hold."""


def tokenise(lm: LanguageModel, texts: Sequence[str], context_length: int) -> list[Tensor]:
    """Ids of every text: the separator (BOS), then its last `context_length - 1` tokens, as sae-probes truncates."""
    encoded = lm.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [torch.tensor([lm.separator_id, *ids[-(context_length - 1) :]]) for ids in encoded]


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
        padded = torch.nn.utils.rnn.pad_sequence(
            [tokens[i] for i in chosen], batch_first=True, padding_value=lm.separator_id
        ).to(lm.device)
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
        key = fingerprint(
            [
                "last token",
                self.lm.fingerprint,
                self.hook,
                str(self.lm.dtype),
                self.lm.device.type,
                torch.__version__,
                self.norm.key,
                self.params.token_mask.model_dump(),
                fingerprint([ids.tolist() for ids in self.tokens]),
            ]
        )[:32]
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
            yield (
                name,
                Vectors(*(torch.from_numpy(matrix[index.numpy()].toarray()) for matrix in self._sequence_latents[1][name])),
            )

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
            z_lab = z_bench = z[: len(index)]
            if len(other) or not counts.all():
                z_lab = z_bench * counts[:, None]
                z_lab[other] = z[len(index) :]
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
