"""What lies under `.cache` is believed only while it is, byte for byte, what was written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import ActivationCaching, Params
from sae_research.evals.core import evaluation
from sae_research.lm import LanguageModel, collect, load, load_language_model
from sae_research.runtime import cache as cached_files
from sae_research.runtime import numba_cache
from sae_research.runtime.cache import CHECKSUMS, cache_dir, damage, intact, new_entry, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json
from tests.helpers.damage import DAMAGES, flip, read_only
from tests.helpers.evals_saes import HOOK, standard


@pytest.fixture(scope="session")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def params(tiny_inputs: Path, in_project: Path) -> Params:
    return Params.model_validate(
        {
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 4},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "core_eval": {
                "batch_size_prompts": 2,
                "n_eval_reconstruction_batches": 1,
                "n_eval_sparsity_variance_batches": 2,
            },
        }
    )


def figures(lm: LanguageModel, params: Params) -> dict[str, Any]:
    return dict(evaluation.evaluate({"standard": standard()}, lm, params))["standard"]


def another_process() -> None:
    """Nothing is known any more of what was read."""
    cached_files._found_intact.clear()


# --- entries ---------------------------------------------------------------------------------


@pytest.fixture
def entry(in_project: Path) -> Path:
    path = cache_dir("kind") / "entry"
    with new_entry(path) as folder:
        (folder / "data.bin").write_bytes(bytes(range(256)) * 8)
        (folder / "sub").mkdir()
        (folder / "sub/more.txt").write_text("more")
    return path


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_entry_is_used_only_as_it_was_written(entry: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert usable(entry) and usable(entry, {"data.bin": 2048}) and not usable(entry, {"data.bin": 4096})
    capsys.readouterr()
    DAMAGES[kind](entry / "sub/more.txt")
    assert not usable(entry)
    assert "sub/more.txt" in capsys.readouterr().out
    another_process()
    assert not usable(entry)


def test_its_list_may_be_damaged_too(entry: Path) -> None:
    path = entry / CHECKSUMS
    good = path.read_text()
    digit = good.index('"sha256": "') + 15
    for bad in (
        "",
        "[]",
        "{}",
        "null",
        good[:-9],
        good.replace("2048", "2047"),
        good.replace('"bytes"', '"length"'),
        good[:digit] + ("1" if good[digit] == "0" else "0") + good[digit + 1 :],
    ):
        path.write_text(bad)
        assert damage(entry) is not None, bad
    path.write_bytes(b"\xff\xfe")
    assert damage(entry) == f"{CHECKSUMS} is damaged"
    path.write_text(good)
    assert damage(entry) is None
    (entry / "further.json").write_text("{}")
    assert "further.json" in str(damage(entry))


def test_bytes_are_read_once_in_a_process(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_process()
    hashed: list[str] = []
    real = cached_files.file_sha256
    monkeypatch.setattr(cached_files, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    for _ in range(3):
        assert usable(entry)
    assert sorted(hashed) == ["data.bin", "more.txt"]


def test_an_entry_is_written_whole_and_takes_the_place_of_another(entry: Path) -> None:
    with pytest.raises(KeyError), new_entry(entry) as folder:
        (folder / "half").write_text("half")
        raise KeyError
    assert damage(entry) is None
    leftover = entry.parent / ".entry.killed.tmp"
    leftover.mkdir()
    with new_entry(entry) as folder:
        (folder / "new").write_text("new")
    assert sorted(path.name for path in entry.iterdir()) == [CHECKSUMS, "new"] and usable(entry)
    assert [path.name for path in entry.parent.iterdir()] == ["entry"], "nothing half written, nothing left over"


# --- activations and results -----------------------------------------------------------------


def test_damaged_activations_change_no_figure(lm: LanguageModel, params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    clean = figures(lm, params)
    [path] = cache_dir("activations").rglob("activations.bin")
    good = path.read_bytes()
    for kind, damaged in DAMAGES.items():
        shutil.rmtree(cache_dir("results"))
        damaged(path)
        another_process()
        assert figures(lm, params) == clean, kind
        assert "activations.bin" in capsys.readouterr().out
        assert path.read_bytes() == good and intact(path.parent)


def test_activations_are_opened_for_reading_alone(lm: LanguageModel, in_project: Path) -> None:
    tokens = torch.arange(40).reshape(4, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = collect(lm, HOOK, tokens, 2, ActivationCaching())
        want = first.flat.clone()
        first.flat += 1  # copies what it writes to
        again = collect(lm, HOOK, tokens, 2, ActivationCaching())
    assert torch.equal(again.flat, want)


def _changed_digit(text: str) -> str:
    at = max(i for i, character in enumerate(text) if character.isdigit())
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


CHANGES: list[Callable[[str], str]] = [
    _changed_digit,
    lambda text: "[]\n",
    lambda text: "{}",
    lambda text: "",
    lambda text: text[:-3],
    lambda text: json.dumps(json.loads(text)["value"]),
    lambda text: json.dumps({**json.loads(text), "value": [1.0]}),
    lambda text: text.replace('_tokens"', '_token"').replace('"l0"', '"l1"'),
]


def test_a_changed_result_is_computed_again(lm: LanguageModel, params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    clean = figures(lm, params)
    paths = list(cache_dir("results").glob("core_*/*.json"))
    assert len(paths) == 2
    for change in CHANGES:
        for path in paths:
            path.write_text(change(path.read_text()))
        assert figures(lm, params) == clean
        assert capsys.readouterr().out.count("not what was written") == 2
    assert figures(lm, params) == clean and not capsys.readouterr().out


def test_one_switch_passes_over_every_cache(lm: LanguageModel, in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, ran = torch.arange(40).reshape(4, 10), []
    collect(lm, HOOK, tokens, 2, ActivationCaching())
    handle = lm.layers[0].register_forward_hook(lambda *_: ran.append(1))
    try:
        collect(lm, HOOK, tokens, 2, ActivationCaching())
        assert not ran
        monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
        collect(lm, HOOK, tokens, 2, ActivationCaching())
        assert len(ran) == 2
    finally:
        handle.remove()
    with new_entry(cache_dir("kind") / "entry") as folder:
        (folder / "data").write_text("x")
    assert not usable(cache_dir("kind") / "entry") and intact(cache_dir("kind") / "entry")


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "fingerprint.json"])
def test_an_unpacked_model_is_unpacked_again_where_a_file_changed(
    name: str, tiny_inputs: Path, in_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        load,
        "_convert_gguf",
        lambda source, file, target: shutil.copytree(  # 30 s for the real one
            tiny_inputs / "tiny", target, dirs_exist_ok=True
        ),
    )
    packaged = next(iter(load.PACKAGED))
    clean = load_language_model(packaged, "cpu")
    folder, tokens = load.packaged_folder(packaged), torch.arange(12)[None]
    want = clean.logits(tokens)  # now: weights are mapped from the file
    flip(folder / name)
    another_process()
    again = load_language_model(packaged, "cpu")
    assert again.fingerprint == clean.fingerprint and torch.equal(again.logits(tokens), want)
    assert f"{name} has another checksum" in capsys.readouterr().out
    assert intact(folder)


def test_a_noted_fingerprint_is_not_believed_of_other_weights(tiny_inputs: Path, in_project: Path) -> None:
    made = load.cache_dir("models") / "made"
    with new_entry(made) as folder:
        shutil.copytree(tiny_inputs / "tiny", folder, dirs_exist_ok=True)
        write_json(folder / "fingerprint.json", {"fingerprint": "noted"})
    assert load_language_model(str(made), "cpu").fingerprint == "noted"
    other = Path(shutil.copytree(made, made.with_name("tuned")))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (other / "model.safetensors").write_bytes(data)
    found = load_language_model(str(other), "cpu").fingerprint
    assert found != "noted" and len(found) == 64


# --- read-only -------------------------------------------------------------------------------


def test_a_full_cache_need_not_be_writable(lm: LanguageModel, params: Params, in_project: Path) -> None:
    clean, cache = figures(lm, params), in_project / ".cache"
    with read_only(cache):
        assert figures(lm, params) == clean
    shutil.rmtree(cache / "results/core_predictions")
    with read_only(cache), pytest.raises(UserError, match=r"core_predictions cannot be written .* make \.cache writable"):
        figures(lm, params)
    shutil.rmtree(cache / "activations")
    with read_only(cache), pytest.raises(UserError, match="activations cannot be written"):
        figures(lm, params)
    shutil.rmtree(cache)
    with read_only(in_project), pytest.raises(UserError, match="cannot be written"):
        figures(lm, params)


def test_numba_gets_a_copy_of_what_it_could_not_write_in(in_project: Path) -> None:
    kept = cache_dir("numba")
    assert numba_cache._folder() == kept
    (kept / "kernel.nbi").write_text("compiled")
    with read_only(in_project / ".cache"):
        copy = numba_cache._folder()
        assert copy != kept and (copy / "kernel.nbi").read_text() == "compiled"
        (copy / "more").touch()
    shutil.rmtree(copy)
