"""Files of other libraries in and out; runs of SAE-Interpretability against its formulas, written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sae_research.cli.main import main
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.exchange import export_saes, import_saes
from sae_research.saes.formats.dictionary_learning import load_dictionary_learning
from sae_research.saes.formats.sae_interpretability import load_run
from sae_research.saes.layouts import open_place
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations

HOOKS = ("blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre")
LOW, HIGH = -0.1, 1.1


def weights(kind: str, generator: torch.Generator, input_dependent: bool = True) -> dict[str, Tensor]:
    """Tensors of one SAE of SAE-Interpretability under its own names."""

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 2

    if kind == "relu":
        return {
            "encoder.0.weight": r(D_SAE, D_IN),
            "encoder.0.bias": r(D_SAE),
            "decoder.weight": r(D_IN, D_SAE),
            "decoder.bias": r(D_IN),
        }
    if kind == "hard_concrete":
        rows = 2 * D_SAE if input_dependent else D_SAE
        gates = {} if input_dependent else {"gate_logits": r(D_SAE)}
        return {
            "encoder.weight": r(rows, D_IN),
            "encoder.bias": r(rows),
            "decoder.weight": r(D_IN, D_SAE),
            "decoder.bias": r(D_IN),
            "beta": torch.tensor(0.5),
            **gates,
        }
    beta = {"beta": torch.tensor(0.5)} if kind == "gated_hard_concrete" else {}
    return {
        "decoder_bias": r(D_IN),
        "encoder.weight": r(D_SAE, D_IN),
        "decoder.weight": r(D_IN, D_SAE),
        **{name: r(D_SAE) for name in ("r_mag", "mag_bias", "gate_bias")},
        **beta,
    }


def reconstruct(kind: str, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """Its forward pass in evaluation mode."""

    def gate(logits: Tensor) -> Tensor:
        return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)

    if kind in ("relu", "hard_concrete"):
        D = s["decoder.weight"] / s["decoder.weight"].norm(dim=0, keepdim=True)
        if kind == "relu":
            c = torch.relu(x @ s["encoder.0.weight"].T + s["encoder.0.bias"])
        else:
            pre = x @ s["encoder.weight"].T + s["encoder.bias"]
            logits, magnitude = (s["gate_logits"], pre) if "gate_logits" in s else pre.chunk(2, dim=-1)
            c = gate(logits) * magnitude
        return c @ D.T + s["decoder.bias"]
    pi = (x - s["decoder_bias"]) @ s["encoder.weight"].T
    logits = pi + s["gate_bias"]
    open_ = (logits > 0).float() if kind == "gated" else gate(logits)
    c = open_ * torch.relu(s["r_mag"].exp() * pi + s["mag_bias"])
    return c @ s["decoder.weight"].T + s["decoder_bias"]


def write_run(
    folder: Path, kind: str, hooks: tuple[str, ...] = HOOKS, input_dependent: bool = True, **saes: Any
) -> dict[str, dict[str, Tensor]]:
    """A run folder with an early and a last checkpoint; returns the last one's tensors by hook."""
    generator = torch.Generator().manual_seed(2)
    folder.mkdir(parents=True)
    for samples in (9000, 100000):  # by number, not by name: 9000 sorts last
        states = {hook: weights(kind, generator, input_dependent) for hook in hooks}
        torch.save(
            {f"{hook.replace('.', '-')}.{name}": tensor for hook, state in states.items() for name, tensor in state.items()},
            folder / f"samples_{samples}.pt",
        )
    config = {
        "seed": 42,
        "tlens_model_name": "roneneldan/TinyStories-1M",
        "tlens_model_path": None,
        "lr": 1e-3,
        "data": {"context_length": 1024},
        "saes": {
            "name": "x",
            "sae_type": kind,
            "sae_positions": list(hooks),
            **({"hard_concrete_stretch_limits": [LOW, HIGH]} if "concrete" in kind else {}),
            **saes,
        },
    }
    (folder / "final_config.yaml").write_text(yaml.safe_dump(config))
    return states


@pytest.mark.parametrize("kind", ["relu", "gated", "hard_concrete", "gated_hard_concrete", "hard_concrete_no_input"])
def test_runs_compute_what_they_computed(kind: str, tmp_path: Path) -> None:
    input_dependent, kind = not kind.endswith("_no_input"), kind.removesuffix("_no_input")
    states, x = write_run(tmp_path / "run", kind, input_dependent=input_dependent), random_activations()
    saes = load_run(tmp_path / "run")
    assert list(saes) == list(HOOKS)
    for hook, sae in saes.items():
        torch.testing.assert_close(sae.decode(sae.encode(x)), reconstruct(kind, states[hook], x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
        assert (sae.cfg.hook_name, sae.cfg.model_name) == (hook, "roneneldan/TinyStories-1M")
        assert (sae.cfg.context_size, sae.cfg.architecture) == (1024, kind)
    written = import_saes(tmp_path / "run", tmp_path / "ours")
    assert [path.name for path in written] == ["blocks_2_hook_resid_pre", "blocks_4_hook_resid_pre"]
    for path, sae in zip(written, saes.values(), strict=True):
        assert torch.equal(load_sae(path).encode(x), sae.encode(x))


def test_runs_that_are_refused(tmp_path: Path) -> None:
    def refused(message: str, folder: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_run(tmp_path / folder)
        assert "\n" not in str(caught.value)

    write_run(tmp_path / "a", "relu")
    (tmp_path / "a" / "final_config.yaml").write_text("saes: {sae_type: gumbel_topk}")
    refused("sae_type 'gumbel_topk' is not supported; known: relu", "a")
    (tmp_path / "a" / "final_config.yaml").write_text("saes: {sae_type: gated}")
    refused("not an SAE of sae_type gated: lacks decoder_bias, .* and also holds decoder.bias", "a")
    (tmp_path / "a" / "final_config.yaml").write_text("saes: {sae_type: relu, sae_positions: [blocks.7.hook_mlp_out]}")
    refused("no SAE of blocks.7.hook_mlp_out; it has blocks-2", "a")
    (tmp_path / "a" / "final_config.yaml").write_text("a: [")
    refused("not valid YAML", "a")
    (tmp_path / "a" / "final_config.yaml").write_text("a: 1")
    refused("no `saes` section", "a")
    write_run(tmp_path / "b", "relu")
    for path in (tmp_path / "b").glob("*.pt"):
        path.unlink()
    refused("no samples_<N>.pt", "b")


def test_export_and_import_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = random_activations()
    save_sae(make_sae("standard"), tmp_path / "trained" / "standard")
    save_sae(make_sae("gated", hook_name="blocks.1.hook_mlp_out"), tmp_path / "trained" / "gated")
    figures = {"l0": 3.2, "loss_recovered": 0.91, "variance_explained": 0.5, "tokens": 512}
    (tmp_path / "trained" / "standard" / "eval_results.json").write_text(json.dumps(figures))
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "out"), "--format", "dictionary_learning"]) == 0
    gated, standard = capsys.readouterr().out.splitlines()
    assert gated.endswith("GatedAutoEncoder; SAE Bench's loaders would put it at hook_resid_post of its layer")
    assert standard.endswith("AutoEncoder")
    for name in ("standard", "gated"):
        torch.testing.assert_close(load_dictionary_learning(tmp_path / "out" / name).encode(x), make_sae(name).encode(x))
    theirs = json.loads((tmp_path / "out" / "standard" / "eval_results.json").read_text())
    assert theirs == {
        "l0": 3.2,
        "frac_recovered": 0.91,
        "frac_variance_explained": 0.5,
        "hyperparameters": {"n_tokens": 512, "context_length": 16},
    }
    assert not (tmp_path / "out" / "gated" / "eval_results.json").exists()
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    torch.testing.assert_close(load_sae(tmp_path / "back" / "gated").encode(x), make_sae("gated").encode(x))
    export_saes(tmp_path / "out" / "gated", tmp_path / "lens", "sae_lens")
    assert json.loads((tmp_path / "lens" / "cfg.json").read_text())["architecture"] == "gated"


def test_what_cannot_go_out(tmp_path: Path) -> None:
    save_sae(make_sae("omp"), tmp_path / "omp")
    with pytest.raises(UserError, match="omp: SAELens .* has no form omp"):
        export_saes(tmp_path / "omp", tmp_path / "x", "sae_lens")
    with pytest.raises(UserError, match="omp: dictionary_learning has no class for the form omp"):
        export_saes(tmp_path / "omp", tmp_path / "x", "dictionary_learning")
    save_sae(make_sae("gated"), tmp_path / "mixed" / "gated")
    save_sae(make_sae("linear"), tmp_path / "mixed" / "linear")
    with pytest.raises(UserError, match="mixed/linear: .* has no form linear; .*; the other 1 are written"):
        export_saes(tmp_path / "mixed", tmp_path / "x", "sae_lens")
    assert load_sae(tmp_path / "x" / "gated").cfg.form == "gated" and not (tmp_path / "x" / "linear").exists()
    with pytest.raises(UserError, match="unknown format 'gguf'"):
        export_saes(tmp_path / "omp", tmp_path / "x", "gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no SAE there; expected cfg.json"):
        import_saes(tmp_path / "empty", tmp_path / "x")
    with pytest.raises(UserError, match="no such folder"):
        import_saes(tmp_path / "nowhere", tmp_path / "x")
    with pytest.raises(UserError, match="no SAE there"):
        open_place(tmp_path)
