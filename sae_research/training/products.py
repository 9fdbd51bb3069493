"""Matrix products of an SAE in training, dense and sparse.

The dense ones run in the run's precision: bfloat16 halves what a product reads and, where processors have instructions for
it, takes a third to a half of the time. Parameters, sums and what comes out stay float32.

A ReLU or TopK SAE of width F trains with five [B, F] x [D] products a step; at L0 << F four of them mostly multiply zeros.
On the sparse path one dense product finds the active latents, a batch's `Support` in compressed sparse row (CSR) layout, and
decoding, its gradients and the encoder's gradients run over those entries only. Measured on 2 CPU cores at B 1024, D 576,
F 2304, L0 32: 2 ms for a sparse decode against 35 ms for the dense product.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function


def pass_dtype(wanted: str, device: torch.device) -> str:
    """Precision of a language model's pass: float32 where bfloat16 is wanted and the device only emulates it, which takes
    tens of times as long. Prints a line then."""
    if wanted != "bfloat16" or has_bfloat16(device):
        return wanted
    print(f"train.llm_dtype: bfloat16 is emulated on this {device.type} device; the model's pass stays float32", flush=True)
    return "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are any faster there: elsewhere they are emulated, and slow."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def product(left: Tensor, right: Tensor, bfloat16: bool) -> Tensor:
    """`left right`, with autograd."""
    return (left.bfloat16() @ right.bfloat16()).float() if bfloat16 else left @ right


def linear(read_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, bfloat16: bool) -> Tensor:
    """`read W^T + bias` [B, F], without a graph."""
    if bfloat16:
        out_BF = torch.nn.functional.linear(read_BD.bfloat16(), W_FD.bfloat16()).float()
        return out_BF if bias_F is None else out_BF.add_(bias_F)
    return torch.nn.functional.linear(read_BD, W_FD, bias_F)


class _Encode(Function):
    """`read W^T + bias` with `read = x - b_dec`, x being data.

    With g the gradient [B, F]: dW = g^T read, dbias = g^T 1, and db_dec = -(g^T 1) W. Plain autograd would multiply
    out g W [B, D] for the last, a fifth of all work, only to sum it over tokens.
    """

    generate_vmap_rule = True  # `training.stack` maps recipes over SAEs

    @staticmethod
    def forward(
        read_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, b_dec_D: Tensor | None, known_BF: Tensor | None, bfloat16: bool
    ) -> Tensor:
        return linear(read_BD, W_FD, bias_F, bfloat16) if known_BF is None else known_BF.view_as(known_BF)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        read_BD, W_FD, bias_F, b_dec_D, _, bfloat16 = inputs
        ctx.save_for_backward(read_BD, W_FD)
        ctx.bfloat16, ctx.has_bias, ctx.reads_b_dec = bfloat16, bias_F is not None, b_dec_D is not None

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        read_BD, W_FD = ctx.saved_tensors
        sum_F = grad_BF.sum(0) if ctx.has_bias or ctx.reads_b_dec else None
        return (
            None,
            product(grad_BF.T, read_BD, ctx.bfloat16),
            sum_F if ctx.has_bias else None,
            -(sum_F @ W_FD) if ctx.reads_b_dec else None,
            None,
            None,
        )


def encode(
    x_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, b_dec_D: Tensor | None, bfloat16: bool, known_BF: Tensor | None = None
) -> Tensor:
    """`(x - b_dec) W^T + bias` [B, F], or `x W^T + bias` without `b_dec_D`; gradients reach the parameters, not x.

    known_BF: the values, where they have been computed already.
    """
    read_BD = x_BD if b_dec_D is None else (x_BD - b_dec_D).detach()
    return _Encode.apply(read_BD, W_FD, bias_F, b_dec_D, known_BF, bfloat16)


# torch says once per process that CSR support is in beta. What is used of it is compared with dense autograd
# in tests/training/test_train_recipes.py, and the line would land in the middle of a progress bar.
warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")

MAX_DENSITY = 0.12
"""Above this fraction of active latents the dense products were measured to be faster."""


@dataclass(frozen=True)
class Support:
    """Which latents are active on which token: entries of a [B, F] matrix in CSR layout, N in all."""

    crow: Tensor
    """Where each token's entries start [B + 1]."""
    col: Tensor
    """Latent of each entry [N]; inside a token in any order, without repeats."""
    n_latents: int

    def matrix(self, values_N: Tensor) -> Tensor:
        """The sparse matrix [B, F] with these values."""
        return torch.sparse_csr_tensor(
            self.crow, self.col, values_N, (len(self.crow) - 1, self.n_latents), check_invariants=False
        )

    @cached_property
    def by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """The entries by latent: where each latent's start [F + 1], their tokens [N], their places in `col` [N].

        torch would sort them anew in every product with the transpose; scipy counts, once.
        """
        import scipy.sparse  # here: on a GPU nothing is sparse, and training needs torch alone

        shape = (len(self.crow) - 1, self.n_latents)
        places = np.arange(len(self.col))
        columns = scipy.sparse.csr_matrix((places, self.col.cpu().numpy(), self.crow.cpu().numpy()), shape=shape).tocsc()
        return tuple(
            torch.from_numpy(part.astype(np.int64)).to(self.col.device)  # type: ignore[return-value]
            for part in (columns.indptr, columns.indices, columns.data)
        )  # ty: ignore[invalid-explicit-return]

    def transposed(self, values_N: Tensor) -> Tensor:
        """Its transpose [F, B]."""
        start, token, place = self.by_latent
        return torch.sparse_csr_tensor(
            start, token, values_N[place], (self.n_latents, len(self.crow) - 1), check_invariants=False
        )


def fixed_support(col_BK: Tensor, n_latents: int) -> Support:
    """The support of k latents a token, given as indices [B, k]."""
    n_tokens, k = col_BK.shape
    crow = torch.arange(0, n_tokens * k + 1, k, device=col_BK.device)
    return Support(crow, col_BK.flatten(), n_latents)


def support_of(active_BF: Tensor) -> Support:
    """The support of a boolean matrix on the CPU, by numpy: three times as fast as torch's conversion."""
    n_tokens, n_latents = active_BF.shape
    flat_N = np.flatnonzero(active_BF.numpy())
    crow = np.searchsorted(flat_N, np.arange(n_tokens + 1) * n_latents)
    col_N = flat_N - np.repeat(np.arange(n_tokens) * n_latents, np.diff(crow))
    return Support(torch.from_numpy(crow), torch.from_numpy(col_N), n_latents)


def products_at(support: Support, left_BD: Tensor, right_FD: Tensor) -> Tensor:
    """The entries of `left right^T` at the support [N]."""
    entries = support.matrix(left_BD.new_zeros(len(support.col)))
    return torch.sparse.sampled_addmm(entries, left_BD, right_FD.T, beta=0.0).values()


class _SparseEncode(Function):
    """Pre-activations `(x - b_dec) W_enc^T + b_enc` at the support, whose values are known already.

    With g the gradient at the entries and G its sparse [B, F] matrix: dW_enc = G^T (x - b_dec), db_enc = G^T
    1, and, x being data, all that is needed of the input's gradient is its sum: db_dec = -db_enc W_enc.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values_N: Tensor,
        centred_BD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor | None,
        support: Support,
    ) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(centred_BD, W_enc_FD)
        ctx.reads_b_dec = b_dec_D is not None
        return values_N.view_as(values_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        centred_BD, W_enc_FD = ctx.saved_tensors
        grad_N = grad_N.contiguous()
        grad_W_FD = ctx.support.transposed(grad_N) @ centred_BD
        grad_b_F = torch.zeros(len(W_enc_FD), dtype=grad_N.dtype, device=grad_N.device)
        grad_b_F.index_add_(0, ctx.support.col, grad_N)
        grad_b_dec_D = -(grad_b_F @ W_enc_FD) if ctx.reads_b_dec else None
        return None, None, grad_W_FD, grad_b_F, grad_b_dec_D, None


class _Decode(Function):
    """`Z W_dec`, Z sparse; with G the output's gradient: dW_dec = Z^T G, dZ = G W_dec^T at the entries."""

    @staticmethod
    def forward(ctx: Any, values_N: Tensor, W_dec_FD: Tensor, support: Support) -> Tensor:
        ctx.support = support
        ctx.save_for_backward(values_N, W_dec_FD)
        return support.matrix(values_N) @ W_dec_FD

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        values_N, W_dec_FD = ctx.saved_tensors
        grad_BD = grad_BD.contiguous()
        grad_W_FD = ctx.support.transposed(values_N) @ grad_BD
        return products_at(ctx.support, grad_BD, W_dec_FD), grad_W_FD, None


def encode_at(
    support: Support, values_N: Tensor, centred_BD: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, b_dec_D: Tensor | None
) -> Tensor:
    """Pre-activations at the support [N], tied to the encoder's parameters for the backward pass.

    values_N: their values, taken from the dense product. centred_BD: what the encoder read, without a graph of its own:
    `x - b_dec`, or x itself where `b_dec_D` is None.
    """
    return _SparseEncode.apply(values_N, centred_BD, W_enc_FD, b_enc_F, b_dec_D, support)


def decode_at(support: Support, values_N: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Sum of the decoder rows of the support, weighted by `values_N` [N]. Returns [B, D]."""
    return _Decode.apply(values_N, W_dec_FD, support)
