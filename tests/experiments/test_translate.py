"""SAE-Interpretability's files as parameters: every key, in every spelling, and what each loss becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from sae_research.config.params import Train, check_params, load_params
from sae_research.experiments import sae_interpretability as foreign
from sae_research.experiments.config_files import parse_overrides, with_values
from sae_research.experiments.grid import expand
from sae_research.experiments.sae_interpretability import Changes, Scale, translate
from sae_research.runtime.errors import UserError
from sae_research.training.recipes import RECIPES
from tests.helpers.experiments import README_CONFIG, README_SWEEP

ROOT = Path(__file__).parents[2]
SCALE = Scale(64, 10.0)


def scales(_: Any, hooks: list[str]) -> dict[str, Scale]:
    return {hook: SCALE for hook in hooks}


def read(text: str) -> dict[str, Any]:
    return YAML(typ="safe").load(text)


def translated(changes: Changes = Changes(), **overrides: Any):  # noqa: B008
    given = {**foreign.canonical(read(README_CONFIG), "file"), **overrides}
    return translate(foreign.parse(given, "file"), given, changes, scales)


def test_the_published_example_becomes_parameters() -> None:
    result = translated()
    values = with_values(read((ROOT / "params.yaml").read_text()), result.overrides)
    params = check_params(values, "translated")
    assert params.model.name == "roneneldan/TinyStories-1M"
    assert params.text.dataset == "org/tokens" and params.text.column_name == "input_ids"
    assert params.text.context_size == 1024
    assert params.train.tokens == 100_000 * 1024
    assert params.train.batch_size == 20 * 20 * 1024 and params.train.accumulation_steps == 20
    assert params.train.warmup_fraction == 0.2 and params.train.decay_fraction == 0.8
    assert params.tracking.project == "my-project" and params.tracking.tags == ["relu"]
    assert params.train.hooks == ["blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre"]
    sae = params.train.saes["relu_blocks_2_hook_resid_pre"]
    assert (sae.recipe, sae.d_sae, sae.learning_rate, sae.seed) == ("relu", 32 * 64, 1e-3, 42)
    assert sae.l1_coefficient == pytest.approx(0.1 / 10)
    assert (sae.lr_schedule, sae.min_lr_factor) == ("cosine", 0.1)


@pytest.mark.parametrize("sae_type", ["relu", "gated", "hard_concrete", "gated_hard_concrete"])
def test_a_translated_loss_is_theirs_up_to_one_factor(sae_type: str) -> None:
    """Their loss of any errors and penalties on raw activations, times d s^2 / m, is ours on scaled ones."""
    m, strength, aux, d, s = 2.0, 0.3, 0.25, SCALE.d_in, 1 / SCALE.rms_norm
    own = {"saes.aux_coeff": aux} if "gated" in sae_type else {}
    result = translated(
        **{
            "saes.sae_type": sae_type,
            "saes.sparsity_coeff": strength,
            "saes.mse_coeff": m,
            "saes.sae_positions": "blocks.0.hook_resid_pre",
            **own,
        }
    )
    sae = result.overrides["train.saes"][sae_type]
    error, l1, l0, gate_error = torch.rand(4).double() * 50  # |e|^2, |z|_1, expected L0, |e_gate|^2: raw units
    penalty = {"relu": l1 / d, "gated": l1}.get(sae_type, l0 / d)
    theirs = m * error / d + strength * penalty + (aux * gate_error / d if own else 0)
    size = l1 * s if "l1_coefficient" in sae else l0
    coefficient = sae["l1_coefficient"] if "l1_coefficient" in sae else sae["l0_coefficient"]
    ours = error * s**2 + coefficient * size + (sae["aux_coefficient"] * gate_error * s**2 if own else 0)
    assert float(ours) == pytest.approx(float(theirs * d * s**2 / m), rel=1e-3)


def test_settings_of_hard_concrete_gates_carry_over() -> None:
    sae = translated(
        **{
            "saes.sae_type": "hard_concrete",
            "saes.initial_beta": 1.0,
            "saes.final_beta": 0.3,
            "saes.beta_annealing": True,
            "saes.input_dependent_gates": False,
            "saes.hard_concrete_stretch_limits": [-0.2, 1.2],
            "saes.name": "Gates",
            "saes.sae_positions": ["blocks.0.hook_resid_pre"],
        }
    ).overrides["train.saes"]["gates"]
    assert (sae["initial_beta"], sae["final_beta"], sae["beta_annealing"]) == (1.0, 0.3, True)
    assert sae["input_dependent_gates"] is False and sae["stretch"] == [-0.2, 1.2]


@pytest.mark.parametrize("sae_type", ["hard_concrete", "gated_hard_concrete"])
def test_the_published_block_anneals_beta_to_half(sae_type: str) -> None:
    """SAE-Interpretability's README gives `beta_annealing: true` and no `final_beta`."""
    result = translated(
        **{
            "saes.sae_type": sae_type,
            "saes.initial_beta": 0.5,
            "saes.beta_annealing": True,
            "saes.sae_positions": ["blocks.0.hook_resid_pre"],
        }
    )
    sae = check_params({"train": {"saes": result.overrides["train.saes"]}}, "x").train.saes[sae_type]
    assert sae.beta_annealing and sae.last_beta == 0.25
    assert any(note.startswith("saes.final_beta: not given: 0.25") for note in result.notes)
    recipe = RECIPES[sae_type](8, sae.model_copy(update={"d_sae": 4}), Train(warmup_fraction=0.0))
    recipe.prepare(1.0)
    assert float(recipe.beta) == pytest.approx(0.25)


def test_a_grid_without_bound_is_one_line() -> None:
    params_yaml = read((ROOT / "params.yaml").read_text())
    sweep = {
        f"train.{key}": list(range(1, 22)) for key in ("tokens", "buffer_tokens", "held_out_tokens", "checkpoint_steps")
    }
    with pytest.raises(UserError, match=r"194,481 points, more than the 2,000 .*set max_experiments there \(or --limit\)"):
        expand({}, sweep, params_yaml, Changes(), scales)
    assert len(expand({}, {**sweep, "max_experiments": 5}, params_yaml, Changes(), scales).points) == 5
    assert len(expand({}, sweep, params_yaml, Changes(), scales, limit=3).points) == 3
    with pytest.raises(UserError, match="max_experiments must be a whole number"):
        expand({}, {**sweep, "max_experiments": True}, params_yaml, Changes(), scales)


def test_a_shorter_run_keeps_its_steps_and_fractions() -> None:
    values = translated(Changes(model="smollm2-135m-instruct", text="packaged", tokens=10_240_000)).overrides
    assert values["model.name"] == "smollm2-135m-instruct" and values["text.dataset"] == "packaged"
    assert values["train.tokens"] // values["train.batch_size"] == 100_000 // 400
    assert values["train.warmup_fraction"] == 0.2
    assert translated(Changes(tokens=30_000)).overrides["train.batch_size"] == 256
    linear = translated(**{"lr_schedule": "linear", "cooldown_samples": 25_000}).overrides
    assert linear["train.decay_fraction"] == 0.25 and "lr_schedule" not in next(iter(linear["train.saes"].values()))
    notes = translated(**{"lr_schedule": "linear", "min_lr_factor": 0.2}).notes
    assert "min_lr_factor: not used: a linear decay ends at 0, as there" in notes
    orthogonal = translated(**{"saes.init_decoder_orthogonal": True}).overrides["train.saes"]
    assert {sae["init"] for sae in orthogonal.values()} == {"orthogonal"}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["saes.sparsity_cof=1"], "unknown key saes.sparsity_cof, did you mean saes.sparsity_coeff?"),
        (["learning_rat=1"], "did you mean learning_rate?"),
        (["sae.lr=1"], "unknown section sae, did you mean saes?"),
        (["lr=fast"], "lr: Input should be a valid number"),
        (["saes.aux_coeff=1"], "saes.aux_coeff is no setting of relu"),
        (["saes.sae_type=topk"], "saes.sae_type"),
        (["max_grad_norm=5"], "set max_grad_norm: 1.0"),
        (["saes.retrain_saes=true"], "comparison_saes.folders"),
        (["data.split=validation"], "data.split"),
        (["warmup_samples=200000"], "more than data.n_train_samples"),
        (["data.n_train_samples=100"], "one step takes"),
        (["tlens_model_path=here"], "give one of tlens_model_name"),
        (["lr"], "expected KEY=VALUE"),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as error:
        translated(**foreign.canonical(parse_overrides(overrides), "line"))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_both_spellings_name_one_key() -> None:
    assert foreign.canonical(
        {"learning_rates": 1, "dict_size_ratio": 2, "n_train_samples": 3, "sae_specific": {"initial_betas": 4}}, "sweep"
    ) == {"lr": 1, "saes.dict_size_to_input_ratio": 2, "data.n_train_samples": 3, "saes.initial_beta": 4}
    with pytest.raises(UserError, match="lr is given twice"):
        foreign.canonical({"lr": 1, "learning_rate": 2}, "file")


def test_the_published_sweep_expands_in_the_file_s_order() -> None:
    params_yaml = read((ROOT / "params.yaml").read_text())
    grid = expand(read(README_CONFIG), read(README_SWEEP), params_yaml, Changes(), scales)
    assert grid.total == 3 * 2 * 2 * 2 * 3 * 3 and len(grid.points) == 20
    assert grid.points[0].swept["lr"] == 1e-4
    assert any("sae_specific.initial_betas: left out, relu has no such setting" in note for note in grid.notes)
    assert len({name for point in grid.points for name in point.values["train"]["saes"]}) == 2 * 20
    for point in grid.points:
        check_params(point.values, point.label)
    limited = expand(read(README_CONFIG), read(README_SWEEP), params_yaml, Changes(), scales, limit=3)
    assert [point.swept for point in limited.points] == [point.swept for point in grid.points[:3]]
    with pytest.raises(UserError, match="--tokens sets one for all"):
        expand(read(README_CONFIG), read(README_SWEEP), params_yaml, Changes(tokens=5000), scales)
    with pytest.raises(UserError, match="changes no SAE"):
        expand(read(README_CONFIG), {"data": {"eval_batch_size": [1, 2]}}, params_yaml, Changes(), scales)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_shipped_files_translate(path: Path) -> None:
    given = foreign.canonical(read(path.read_text()), path.name)
    result = translate(foreign.parse(given, path.name), given, Changes(), scales)
    values = with_values(load_params(ROOT / "params.yaml").model_dump(exclude={"train": {"saes"}}), result.overrides)
    params = check_params(values, path.name)
    assert {sae.recipe for sae in params.train.saes.values()} == {path.stem}
    assert params.train.tokens // params.train.batch_size == 1000
    hooks = {"tinystories": (2, 4), "gpt2": (2, 6, 10)}[path.parent.name]
    assert params.train.hooks == [f"blocks.{layer}.hook_resid_pre" for layer in hooks]
    commands = [
        line.split()[line.split().index("--config_path") + 1] for line in path.read_text().splitlines() if "--config" in line
    ]
    assert set(commands) == {path.relative_to(ROOT).as_posix()} and params.text.context_size == 1024
