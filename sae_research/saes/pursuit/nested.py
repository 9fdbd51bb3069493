"""Least squares of sequences on the CPU: nested supports share one factorisation, and sequences go to threads.

The support of a smaller k lies inside that of a larger one. With its atoms first, its Gram matrix is the leading block of
the larger one's, so is its Cholesky factor, and the products with it that are solved forwards are the leading rows: for all
k together one gathering of Gram entries, one product with the tokens, one factor. Only the solution backwards differs.

Each fit runs on one thread, whatever torch is told, so that its numbers do not depend on how many sequences run at a time.
Matrices of some hundred unknowns gain nothing from several threads, which then wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sae_research.runtime.numba_cache import numba

Item = TypeVar("Item")
Found = TypeVar("Found")


def one_thread_each(work: Callable[[Item], Found], items: Sequence[Item]) -> list[Found]:
    """`work` on every item, in as many threads at a time as torch uses, inside each of which torch uses one."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [work(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, items))
    finally:
        torch.set_num_threads(threads)  # what a thread is told holds for those that start later, too


def order_of(supports: Iterable[Tensor]) -> tuple[Tensor, list[int]] | None:
    """Atoms of the last support, those of earlier ones first, and how many each support has; None where a support does
    not hold the one before it."""
    order, sizes = None, []
    for support in supports:
        new = support if order is None else support[~torch.isin(support, order)]
        order = new if order is None else torch.cat([order, new])
        if len(order) != len(support):
            return None
        sizes.append(len(support))
    return None if order is None else (order, sizes)


def solve(gram_FF: Tensor, order_U: Tensor, sizes: Sequence[int], rhs_TU: Tensor, least: float) -> list[Tensor | None]:
    """For each size the solution `z` [tokens, size] of `z gram = rhs` on the first atoms of `order_U`.

    None where the smallest pivot of Cholesky's factor is below `least` times its largest, or there is no factor.
    gram_FF: of all atoms, in the precision to solve in, which is that of rhs_TU.
    """
    gram_UU = torch.from_numpy(_gathered(gram_FF.numpy(), order_U.numpy()))
    factor_UU, failed = torch.linalg.cholesky_ex(gram_UU.mT)  # symmetric, and in the order that LAPACK wants
    pivots_U = factor_UU.diagonal()
    whole = int(failed) - 1 if int(failed) else len(order_U)  # leading unknowns that have a factor
    good = [0 < n <= whole and bool(pivots_U[:n].min() >= least * pivots_U[:n].max()) for n in sizes]
    largest = max((n for n, ok in zip(sizes, good, strict=True) if ok), default=0)
    forward_UT = torch.linalg.solve_triangular(factor_UU[:largest, :largest], rhs_TU[:, :largest].mT, upper=False)
    return [
        torch.linalg.solve_triangular(factor_UU[:n, :n].mT, forward_UT[:n], upper=True).mT if ok else None
        for n, ok in zip(sizes, good, strict=True)
    ]


@numba.njit(nogil=True)
def _gathered(table, index):
    """`table[index][:, index]` of a symmetric table, each pair of entries read once."""
    found = np.empty((len(index), len(index)), table.dtype)
    for i in range(len(index)):
        row = table[index[i]]
        for j in range(i + 1):
            found[i, j] = row[index[j]]
    for i in range(len(index)):
        for j in range(i):
            found[j, i] = found[i, j]
    return found
