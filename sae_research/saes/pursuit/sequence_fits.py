"""Least squares of sequences on the CPU, in threads.

Each fit runs on one thread, whatever torch is told, so that its numbers depend neither on how many sequences run at a time
nor on which other k are asked for: an interrupted run ends in the same bytes. (Supports of several k are nested, and one
factorisation could serve them all; its last digits would depend on which they are.) Matrices of some hundred unknowns gain
nothing from several threads, which then wait for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

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


def solve_on_support(gram_FF: Tensor, support_U: Tensor, rhs_TU: Tensor, least: float) -> Tensor | None:
    """`z` [tokens, support] of `z gram = rhs` on the atoms `support_U`, by Cholesky.

    None where the smallest pivot is below `least` times the largest, or there is no factor. gram_FF: of all atoms, in the
    precision to solve in, which is that of rhs_TU.
    """
    gram_UU = gram_FF[support_U[:, None], support_U]
    factor_UU, failed = torch.linalg.cholesky_ex(gram_UU.mT)  # symmetric, and in the order that LAPACK wants
    pivots_U = factor_UU.diagonal()
    if int(failed) or not bool(pivots_U.min() >= least * pivots_U.max()):
        return None
    forward_UT = torch.linalg.solve_triangular(factor_UU, rhs_TU.mT, upper=False)
    return torch.linalg.solve_triangular(factor_UU.mT, forward_UT, upper=True).mT
