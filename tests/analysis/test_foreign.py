"""Objects of other libraries in memory: what they are is found on the model's own activations, and nothing stale is read."""

from __future__ import annotations

import copy
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evaluate import evaluate
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes.foreign import ForeignSAE, adapt
from sae_research.saes.forms import StandardSAE
from sae_research.saes.identity import Unidentified, identity
from sae_research.saes.pursuit.encoders import IHTPSAE
from tests.helpers.evals_saes import config, dictionary, standard

HOOK, D = "blocks.1.hook_resid_post", 32
SCALE = 1.0


class Plain(torch.nn.Module):
    """A user's module with a threshold that is a plain attribute."""

    def __init__(self, threshold: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(dictionary().to(dtype))
        self.b = torch.nn.Parameter(torch.full((D,), 0.1, dtype=dtype))
        self.threshold = threshold

    def encode(self, x: Tensor) -> Tensor:
        z = (x - self.b) @ self.W.T
        return z * (z > self.threshold)

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W + self.b


class Tokens(Plain):
    """Wants [tokens, d_in], as many training loops write it."""

    def encode(self, x: Tensor) -> Tensor:
        n, d = x.shape
        return super().encode(x).reshape(n, -1)

    def decode(self, z: Tensor) -> Tensor:
        n, _ = z.shape
        return super().decode(z)


class Sequence(Plain):
    """Sees the sequence, but only where activations are as large as the model's."""

    def encode(self, x: Tensor) -> Tensor:
        z = super().encode(x)
        return z * (z > z.mean(dim=1, keepdim=True) + self.threshold)


class Signed(Plain):
    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.W.T
        return z * (z.abs() > self.threshold)


class GlobalScale(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * SCALE


class OfOurs(StandardSAE):
    """A user's class over this project's, with an attribute that no option names."""

    threshold = 0.0

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = super().encode(x, mask)
        return z * (z > self.threshold)


@pytest.fixture(scope="module")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), device="cpu")


@pytest.fixture
def params(tiny_inputs: Path, in_project: Path) -> Params:
    return Params.model_validate(
        {
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu"},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "core_eval": {
                "batch_size_prompts": 3,
                "n_eval_reconstruction_batches": 1,
                "n_eval_sparsity_variance_batches": 1,
            },
        }
    )


def figures(sae: Any, lm: LanguageModel, params: Params) -> dict[str, float]:
    return evaluate({"mine": sae}, lm, params, hook=HOOK)["mine"]["core"]


# --- nothing stale ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["plain", "ours", "function"])
def test_an_attribute_that_changes_changes_the_figures(
    lm: LanguageModel, params: Params, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = Plain()

    def made(threshold: float) -> Any:
        if make == "plain":
            inner.threshold = threshold
            return inner
        if make == "ours":
            W = dictionary()
            sae = OfOurs(None, W_enc=W.T.contiguous(), b_enc=torch.zeros(64), W_dec=W, b_dec=torch.zeros(D))
            sae.threshold = threshold
            return sae
        return SimpleNamespace(encode=lambda x: (x @ inner.W.T) * (x @ inner.W.T > threshold), decode=inner.decode)

    cached = [figures(made(threshold), lm, params)["l0"] for threshold in (0.0, 0.3, 0.6)]
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    assert cached == [figures(made(threshold), lm, params)["l0"] for threshold in (0.0, 0.3, 0.6)]
    assert cached[0] > cached[1] > cached[2]


def test_identity_knows_everything_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    first = identity(Plain(1.0))
    assert identity(Plain(1.0)) == first == identity(copy.deepcopy(Plain(1.0)))
    permuted, hooked, extra, patched, nested = (Plain(1.0) for _ in range(5))
    with torch.no_grad():
        permuted.W[[0, 1]] = permuted.W[[1, 0]]  # equal sums
    hooked.register_forward_hook(lambda *_: None)
    extra.mean = np.zeros(3)
    patched.encode = lambda x: x  # type: ignore[method-assign]
    nested.parts = [SimpleNamespace(k=1), {"a": (1, 2)}]
    others = [permuted, hooked, extra, patched, nested, Tokens(1.0), Plain(1.0).double(), Plain(1)]
    before = identity(GlobalScale())
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    others.append(GlobalScale())
    assert len({first, before, *map(identity, others)}) == len(others) + 2
    functions = [identity(lambda x, k=k: x * k) for k in (1, 2)] + [identity(lambda x: x + 1), identity(lambda x: x + 2)]
    assert len(set(functions)) == 4


def test_what_cannot_be_looked_into_is_never_kept(lm: LanguageModel, params: Params) -> None:
    sae = Plain()
    sae.lock = threading.Lock()
    with pytest.raises(Unidentified):
        identity(sae)
    one, other = (adapt(sae, lm, HOOK) for _ in range(2))
    assert one.weights_fingerprint() == one.weights_fingerprint() != other.weights_fingerprint()
    sae.threshold = 0.3
    assert figures(sae, lm, params)["l0"] == figures(Plain(0.3), lm, params)["l0"]


# --- what it is ------------------------------------------------------------------------------


def test_properties_are_those_at_the_model_s_own_scale(lm: LanguageModel) -> None:
    def of(sae: Any) -> tuple[bool, bool, bool]:
        wrapped = adapt(sae, lm, HOOK)
        return wrapped.per_token, wrapped.causal, wrapped.signed

    scale = float(lm.activations(torch.arange(32)[None], HOOK).abs().max())
    assert of(Plain(0.5 * scale)) == (True, True, False)
    assert of(Signed(0.3 * scale)) == (True, True, True)
    assert of(Sequence(0.1 * scale)) == (False, False, False)
    assert of(Plain(5 * scale)) == (True, True, False)  # silent here: told from larger activations
    assert of(Plain(1e9 * scale)) == (False, False, True)  # silent everywhere: nothing is ruled out
    said = Sequence()
    said.causal = True
    assert of(said) == (False, True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(lm: LanguageModel, params: Params, dtype: torch.dtype) -> None:
    mine, single = adapt(Plain(0.1, dtype), lm, HOOK), figures(Plain(0.1), lm, params)
    assert (mine.per_token, mine.causal, mine.signed) == (True, True, False)
    assert mine.W_dec.dtype == torch.float32 and torch.allclose(mine.W_dec, dictionary(), atol=5e-3)
    assert mine.encode(torch.randn(1, 2, D)).dtype == torch.float32
    assert figures(Plain(0.1, dtype), lm, params)["l0"] == pytest.approx(single["l0"], rel=0.02)


def test_rows_beside_a_large_bias_survive_half_precision(lm: LanguageModel) -> None:
    sae = Plain(0.1, torch.bfloat16)
    with torch.no_grad():
        sae.b += 100
    assert torch.allclose(adapt(sae, lm, HOOK).W_dec, dictionary(), atol=0.02)


def test_encoders_of_tokens_score_as_those_of_sequences(lm: LanguageModel, params: Params) -> None:
    assert figures(Tokens(0.1), lm, params) == figures(Plain(0.1), lm, params)
    assert adapt(Tokens(0.1), lm, HOOK).per_token


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encode": lambda x: (x, x)}, "encode returns a tuple, expected one tensor"),
        ({"encode": lambda x: x.numpy()}, "encode returns a ndarray"),
        ({"encode": lambda x: x @ torch.zeros(D + 1, 4)}, "encode fails on .*RuntimeError.*activations at blocks.1"),
        ({"encode": lambda x: x.sum(-1)}, "encode returns"),
        ({"encode": lambda x, y: x}, "encode fails on .*TypeError"),
        ({"decode": lambda z: torch.cat([z, z], dim=-1)}, "decode returns 64 dimensions, the model has 32"),
        ({"decode": lambda z: z.relu() ** 2}, "its decoder is not affine"),
        ({"decode": lambda z: None}, "decode returns a NoneType"),
    ],
)
def test_what_is_no_sae_is_one_line(lm: LanguageModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        adapt(SimpleNamespace(**{"encode": lambda x: x.relu(), "decode": lambda z: z, **change}), lm, HOOK)
    assert "\n" not in str(error.value)


# --- among others ----------------------------------------------------------------------------


def test_one_that_overflows_is_left_out_and_a_user_s_files_stay(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "core"
    (folder / "mine").mkdir(parents=True)
    for name in ("notes.txt", "mine/data.json", "old_eval_results.json"):
        (folder / name).write_text("{}")
    large = Plain(0.0, torch.float16)
    with torch.no_grad():
        large.W *= 6e4
    found = evaluate({"large": large, "good": Plain()}, lm, params, hook=HOOK, folder=tmp_path / "out")
    assert found["large"] == {} and found["good"]["core"]["l0"] > 1
    status = json.loads((folder / "_status.json").read_text())
    assert status["status"] == "ok" and "NaN or infin" in status["skipped"]["large"]
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "mine", "good_eval_results.json", "_status.json"}
    assert (folder / "mine" / "data.json").is_file()
    with pytest.raises(UserError, match="no SAE could be evaluated: large: "):
        evaluate({"large": large}, lm, params, hook=HOOK)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file stands where"):
        evaluate({"good": Plain()}, lm, params, hook=HOOK, folder=tmp_path / "file")


def test_a_wrapped_object_is_one_of_ours(lm: LanguageModel) -> None:
    assert isinstance(adapt(Plain(), lm, HOOK), ForeignSAE)


# --- objects that change, and that change what they are given ----------------------------------


def fresh(sae: Any, lm: LanguageModel, params: Params, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    with monkeypatch.context() as patch:
        patch.setenv("SAE_RESEARCH_NO_CACHE", "1")
        return figures(sae, lm, params)


@pytest.mark.parametrize("change", ["copy_", "data", "assigned"])
def test_a_dictionary_that_changes_changes_the_figures(
    lm: LanguageModel, params: Params, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pursuit encoders keep its Gram matrix; old correlations over new atoms are the figures of neither."""

    def made(seed: int) -> IHTPSAE:
        return IHTPSAE(dictionary(seed), torch.zeros(D), 2, config("ihtp", k=2))

    sae, other = made(0), dictionary(5)
    before = figures(sae, lm, params)
    if change == "copy_":
        sae.W_dec.copy_(other)
    elif change == "data":
        sae.W_dec.data = other
    else:
        sae.W_dec = other
    assert figures(sae, lm, params) == fresh(made(5), lm, params, monkeypatch) != before


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_method_of_ones_own_on_an_sae_of_ours_counts(
    lm: LanguageModel, params: Params, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = standard()
    figures(sae, lm, params)
    original, scale = getattr(sae, method), [1.5]
    setattr(sae, method, lambda values, *mask: original(values, *mask) * scale[0])
    for size in (1.5, 2.0):
        scale[0] = size
        assert figures(sae, lm, params) == fresh(sae, lm, params, monkeypatch)


class FromEnvironment(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x) * float(os.environ.get("SCALE", "1"))


class FromFile(Plain):
    def encode(self, x: Tensor) -> Tensor:
        with open("scale.txt") as file:
            return super().encode(x) * float(file.read())


class FromOwnModule(Plain):
    def encode(self, x: Tensor) -> Tensor:
        from tests.helpers.evals_saes import D as width

        return super().encode(x) * (1 if width else 0)


def test_what_reads_from_outside_has_no_identity() -> None:
    for inner in (FromEnvironment(), FromFile(), FromOwnModule()):
        with pytest.raises(Unidentified):
            identity(inner)
    assert identity(Plain()) == identity(Plain())


class InPlace(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x.mul_(0.5))

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.mul_(2.0))


class NotInPlace(Plain):
    def encode(self, x: Tensor) -> Tensor:
        return super().encode(x * 0.5)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z * 2.0)


class OursInPlace(StandardSAE):
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(x.mul_(0.5), mask)


def test_an_encoder_that_works_in_place_harms_nobody(lm: LanguageModel, params: Params) -> None:
    W = dictionary()
    ours = OursInPlace(None, W_enc=W.T.contiguous(), b_enc=torch.zeros(64), W_dec=W, b_dec=torch.zeros(D))
    found = evaluate(
        {"in_place": InPlace(), "ours": ours, "not_in_place": NotInPlace(), "plain": Plain()}, lm, params, hook=HOOK
    )
    alone = evaluate({"plain": Plain()}, lm, params, hook=HOOK)
    assert found["in_place"] == found["not_in_place"] and found["plain"] == alone["plain"]


def test_doubles_of_ours_are_cast_and_a_missing_attribute_is_one_line(lm: LanguageModel, params: Params) -> None:
    sae = standard().double()
    assert figures(sae, lm, params) == figures(standard(), lm, params) and sae.W_dec.dtype == torch.float64

    class OfArrays(Plain):
        def encode(self, x: Tensor) -> Tensor:
            return x.astype("float32")  # type: ignore[attr-defined]

    with pytest.raises(UserError, match="OfArrays.encode fails on .* AttributeError"):
        figures(OfArrays(), lm, params)
