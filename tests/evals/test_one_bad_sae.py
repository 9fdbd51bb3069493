"""In every evaluation an SAE that fails is listed with its reason, and the others keep their figures."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import autointerp, meta_sae, sae_probes, scr_tpp
from sae_research.evals.core import evaluation
from sae_research.evals.probing import Draw
from sae_research.evals.sparse_probing import evaluation as sparse_probing
from sae_research.evals.sparse_probing.redrawn import TrainDraws, redrawn_correct
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Guard
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE
from tests.fixtures import make_autointerp as fixture
from tests.helpers.evals_saes import MOVIE_REVIEWS, D, config, dictionary, standard


def made(
    cls: type[StandardSAE] = StandardSAE, d_sae: int = 64, scale: float = 1.0, bias: float = -0.5, seed: int = 1
) -> StandardSAE:
    W = dictionary(seed, d_sae)
    return cls(
        config("standard", d_sae),
        W_enc=W.T.contiguous() * scale,
        b_enc=torch.full((d_sae,), bias),
        W_dec=W,
        b_dec=torch.zeros(D),
    )


class WrongShape(StandardSAE):
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(x, mask)[..., :-1]


class NotANumberLater(StandardSAE):
    """NaN at one strong token only: some batches are fine."""

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.where(x[..., :1] > 1.2, torch.nan, super().encode(x, mask))


class Singular(StandardSAE):
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        raise np.linalg.LinAlgError("SVD did not converge")


class Defect(StandardSAE):
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return None + x  # type: ignore[operator]


class Fragile(IHTPSAE):
    """A member of a family that brings the family down."""

    @classmethod
    def encode_family(cls, members: Sequence[Any], x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        if any(member.k == 2 for member in members):
            raise UserError("no support of 2 latents exists")
        yield from super().encode_family(members, x, mask)


def fragile(k: int) -> Fragile:
    return Fragile(dictionary(2), torch.zeros(D), k, config("ihtp", k=k))


GOOD: dict[str, Callable[[], SparseAutoencoder]] = {"good": standard, "k1": lambda: fragile(1), "k3": lambda: fragile(3)}
BAD: dict[str, tuple[Callable[[], SparseAutoencoder], str]] = {
    "overflow": (lambda: made(scale=3e38), "encode returned NaN or infinity"),
    "half": (lambda: made(scale=6e4).half(), "encode returned NaN or infinity"),
    "later": (lambda: made(NotANumberLater), "encode returned NaN or infinity"),
    "shape": (lambda: made(WrongShape), "encode returned shape"),
    "singular": (lambda: made(Singular), "LinAlgError in encode: SVD did not converge"),
    "k2": (lambda: fragile(2), "no support of 2 latents exists"),
}


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    rows = [f"{label} text of words number {i},{label}" for label in ("cat", "dog", "cow") for i in range(160)]
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return str(path)


@pytest.fixture
def crossed(tmp_path: Path) -> str:
    rows = [f"{a} {b} text number {i},{a},{b}" for a in ("cat", "dog") for b in ("old", "new") for i in range(120)]
    path = tmp_path / "crossed.csv"
    path.write_text("\n".join(["text,label,second_label", *rows]) + "\n")
    return str(path)


def probing(tasks: str) -> dict[str, Any]:
    return {"dataset_names": [tasks], "context_length": 12}


def compared(evaluate: Any, lm: LanguageModel, params: Params, folder: Path, bad: dict[str, Any]) -> dict[str, str]:
    """What is skipped of good SAEs with bad ones among them; the good ones score as they do alone."""
    stage = StageFolder(folder)
    saes = {name: make() for name, make in GOOD.items()}
    found = dict(evaluate({**bad, **saes}, lm, params, stage))
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    try:
        alone = dict(evaluate(saes, lm, params, StageFolder(folder / "alone")))
    finally:
        del os.environ["SAE_RESEARCH_NO_CACHE"]
    assert {name: found[name] for name in saes} == alone
    assert not set(stage.skipped) & set(found)
    return stage.skipped


def test_core(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    bad = {name: make() for name, (make, _) in BAD.items()} | {"large": made(scale=1e25)}
    skipped = compared(evaluation.evaluate, lm, make_params(), tmp_path, bad)
    assert set(skipped) == set(bad)
    assert all(reason in skipped[name] for name, (_, reason) in BAD.items()), skipped
    assert "is NaN or infinite" in skipped["large"]
    with pytest.raises(UserError, match="NaN or infinity"):  # nowhere to list it
        list(evaluation.evaluate({"overflow": BAD["overflow"][0]()}, lm, make_params()))


def test_core_of_one_latent(lm: LanguageModel, make_params: Any) -> None:
    """It has no nearest neighbour, which SAE Bench's block says in its own way, and all other figures."""
    ((_, result),) = evaluation.evaluate({"one": made(d_sae=1)}, lm, make_params())
    (latent,) = result["eval_result_details"]
    assert latent["max_decoder_cosine_sim"] == latent["max_encoder_cosine_sim"] == -1
    assert result["eval_result_metrics"]["misc_metrics"]["average_max_decoder_cosine_sim"] == -1
    assert latent["encoder_decoder_cosine_sim"] == pytest.approx(1)


def test_sparse_probing(lm: LanguageModel, make_params: Any, tasks: str, tmp_path: Path) -> None:
    params = make_params(
        sparse_probing={**probing(tasks), "probe_train_set_size": 16, "probe_test_set_size": 8, "k_values": [1]}
    )
    bad = {name: BAD[name][0]() for name in ("later", "k2")} | {"dead": made(bias=-1e9)}
    skipped = compared(sparse_probing.evaluate, lm, params, tmp_path, bad)
    assert set(skipped) == set(bad) and re.fullmatch(r"it fires on none of the \d+ texts", skipped["dead"])


def test_latents_silent_on_one_task_know_nothing() -> None:
    """Not an error: the probe on all latents answers as the one on the best of them does."""
    task = Draw(torch.arange(8), torch.tensor([1.0, 0.0] * 4))
    correct = redrawn_correct(torch.zeros(8, 5), TrainDraws({"a": [task]}, 1.0, False), {"a": task}, [1])
    assert [correct[k]["a"].mean() for k in (1, None)] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["scr", "tpp"])
def test_scr_and_tpp(lm: LanguageModel, make_params: Any, tasks: str, crossed: str, tmp_path: Path, kind: str) -> None:
    section = {**probing(tasks if kind == "tpp" else crossed), "train_set_size": 16, "test_set_size": 16, "n_values": [2]}
    bad = {name: BAD[name][0]() for name in ("later", "k2")}
    evaluate = scr_tpp.evaluate_scr if kind == "scr" else scr_tpp.evaluate_tpp
    assert set(compared(evaluate, lm, make_params(**{kind: section}), tmp_path, bad)) == set(bad)


@pytest.mark.slow
def test_sae_probes(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    params = make_params(sparse_probing_sae_probes=MOVIE_REVIEWS)
    bad = {name: BAD[name][0]() for name in ("overflow", "k2")}
    assert set(compared(sae_probes.evaluate, lm, params, tmp_path, bad)) == set(bad)


def test_meta_sae(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    params = make_params(meta_sae={"train_steps": 3, "train_batch_size": 16})
    skipped = compared(meta_sae.evaluate, lm, params, tmp_path, {"one": made(d_sae=1)})
    assert skipped == {"one": "the rows of its decoder do not vary"}


def test_windows_of_autointerp(lm: LanguageModel, settings: Any) -> None:
    said: dict[str, str] = {}
    guard, params = Guard(said.__setitem__), settings()
    tokens = fixture.tokens_of(lm, params)
    found = autointerp.find_windows({"later": made(NotANumberLater), "good": standard()}, lm, params, tokens, guard)
    alone = autointerp.find_windows({"good": standard()}, lm, params, tokens)
    assert list(said) == ["later"] and found["good"].to_plain() == alone["good"].to_plain()


# --- the guard -------------------------------------------------------------------------------


def test_a_defect_of_the_program_keeps_its_traceback(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        list(evaluation.evaluate({"good": standard(), "defect": made(Defect)}, lm, make_params(), StageFolder(tmp_path)))


def test_what_has_no_meaning_at_all_is_no_failure_of_one() -> None:
    def score(family: dict[str, SparseAutoencoder]) -> Iterator[tuple[str, int]]:
        raise NotApplicable("the model knows nothing")
        yield "", 0

    with pytest.raises(NotApplicable):
        list(Guard(lambda *_: None).each({"good": standard()}, score))
