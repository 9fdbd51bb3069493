"""One set of defaults, strict types at every leaf, and files that are damaged, cut off or hostile: each one clear line."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from dvc.utils.hydra import apply_overrides
from pydantic import ValidationError
from ruamel.yaml import YAML

from sae_research.cli.pipeline import read_preset
from sae_research.config.params import Params, check_params, check_trained_names, load_params, read_params
from sae_research.config.recipes import AnyRecipe
from sae_research.config.reporting import Style
from sae_research.config.section import Section
from sae_research.config.yaml_files import read_mapping
from sae_research.experiments import sae_interpretability
from sae_research.experiments.config_files import flatten, parse_overrides, with_values
from sae_research.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "params.yaml").read_text()


def test_defaults_are_those_of_the_committed_file() -> None:
    """What a notebook computes without a file compares with METRICS.md."""
    file, defaults = (flatten(params.model_dump()) for params in (load_params(ROOT / "params.yaml"), Params()))
    assert "train.saes.topk.k" in defaults and defaults["comparison_saes.trained"]
    assert {key: (file.get(key), defaults.get(key)) for key in file | defaults if file.get(key) != defaults.get(key)} == {}
    assert check_params({"train": {"learning_rate": 1e-4}}, "x").train.saes["topk"].learning_rate == 1e-4
    assert check_params({"train": {"learning_rate": 1e-4}}, "x").train.saes["standard"].learning_rate == 4e-3


# --- files -----------------------------------------------------------------------------------


def _refused_or_whole(path: Path, text: str, whole: Params) -> None:
    path.write_text(text)
    try:
        found = load_params(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500
    else:
        assert found == whole and text.startswith(TEXT.rstrip()[: TEXT.rindex("architectures: {}") + 17])


def _line_ends() -> list[int]:
    return [at + 1 for at, character in enumerate(TEXT) if character == "\n"][:-1]


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path, whole, last = tmp_path / "params.yaml", load_params(ROOT / "params.yaml"), TEXT.index("\nvisualization:")
    for cut in [*_line_ends()[::17], *(at - 7 for at in _line_ends()[::41]), *range(last, len(TEXT), 9)]:
        _refused_or_whole(path, TEXT[:cut], whole)


@pytest.mark.slow
def test_a_file_cut_off_at_any_line_or_within_it_is_refused(tmp_path: Path) -> None:
    path, whole, last = tmp_path / "params.yaml", load_params(ROOT / "params.yaml"), TEXT.index("\nvisualization:")
    for cut in [*_line_ends(), *(at - 7 for at in _line_ends()), *range(last, len(TEXT))]:
        _refused_or_whole(path, TEXT[:cut], whole)


def test_a_section_is_missed_and_a_key_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("model: {name: x}\ntext: {dataset: y}\n")
    with pytest.raises(UserError, match=r"lacks random_seed, token_mask, .* and 19 more; .*partial=True"):
        load_params(path)
    assert load_params(path, partial=True).text.dataset == "y"
    values = YAML(typ="safe").load(TEXT)
    del values["train"]["precision"], values["sae_variants"]["ihtp"]["iterations"]
    with path.open("w") as stream:
        YAML().dump(values, stream)
    assert load_params(path) == Params()
    assert (
        "leaves out train.precision ('bfloat16'), sae_variants.ihtp.iterations (0): defaults are taken"
        in capsys.readouterr().err
    )
    del values["visualization"]["architectures"]
    with path.open("w") as stream:
        YAML().dump(values, stream)
    with pytest.raises(UserError, match=r"ends within the section visualization, without visualization\.architectures"):
        load_params(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "found nothing"),
        (b"# only a comment\n", "found nothing"),
        ("modèle: 1".encode("latin-1"), "not UTF-8 text"),
        (TEXT.encode("utf-16"), "not UTF-8 text"),
        (bytes(range(256)) * 50, "not UTF-8 text"),
        (b"model:\0\0\0", "not valid YAML"),
        (b"model:\n\tname: x\n", "not valid YAML"),
        (b"model: {name: a}\nmodel: {name: b}\n", "not valid YAML.*duplicate"),
        (b"--- {a: 1}\n--- {b: 2}\n", "not valid YAML"),
        (b"- model\n", "expected keys and values"),
        (BOMB.encode(), "once aliases are followed"),
        (b"model: &a [*a]\n", "an alias holds itself"),
        (b"model: " + b"[" * 20_000, "nested too deeply|not valid YAML"),
        (b"model: " + b"[" * 60 + b"]" * 60, "nested more than"),
        (b"random_seed: 0x" + b"f" * 9_000, "bits"),
        (b"random_seed: " + b"9" * 9_000, "not valid YAML"),
        (b"model: {name: 2024-13-45}", "not valid YAML"),
        (b"model: {name: !!int ''}", "not valid YAML"),
        (b"model: {name: !!timestamp x}", "not valid YAML"),
        (b"model: !!python/object:os.system {}", "not valid YAML"),
        (b"1: 2\n", "the key 1 is no text"),
        (b"model: {null: 2}\n", "the key None is no text"),
        (b"model: {name: 2024-12-01}", "model.name: Input should be a valid string"),
        (b"model: null", "model: Input should be"),
        (b"train: {saes: null}", "train.saes"),
        (
            b"train: {saes: {" + b", ".join(b"s%d: {recipe: top_k, d_sae: 8, k: 9}" % n for n in range(300)) + b"}}",
            "295 more",
        ),
        (b"text: {dataset: [" + b"x, " * 2_000 + b"]}", "text.dataset"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "file",
)
def test_a_damaged_or_hostile_file_is_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        load_params(path, partial=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    with pytest.raises(UserError):
        read_params(path)


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "closed").write_text(TEXT)
    (tmp_path / "closed").chmod(0)
    for name, line in [
        ("fifo", "not a file"),
        (".", "not a file"),
        ("none", "no such file"),
        ("x" * 300, "cannot be read"),
        ("/dev/zero", "not a file"),
        *([("closed", "cannot be read")] if os.geteuid() else []),
    ]:
        with pytest.raises(UserError, match=line):
            read_mapping(tmp_path / name)
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
    assert load_params(tmp_path / "bom.yaml") == Params()
    with pytest.raises(UserError, match="nested"):
        parse_overrides(["lr=" + "[" * 500])
    with pytest.raises(UserError, match="full_key: model.name"):
        with_values({"model": {}}, {"model.name": "a${"})


# --- leaves ----------------------------------------------------------------------------------

NEVER = [
    math.nan,
    math.inf,
    -math.inf,
    1e18,
    10**18,
    -(10**18),
    1e300,
    "",
    " ",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    [math.nan],
    [True],
    [""],
    ["\t"],
    [10**18],
    {"": 1},
    {"a": True},
    {"a": math.nan},
    [[]],
    (),
    object(),
]
"""What no parameter may be, of whatever type."""
EMPTY_IS_MEANT = {("Autointerp", "api_key_env", ""), ("ChatEndpoint", "api_key_env", "")}
RECIPE = {
    "d_sae": 64,
    "l1_coefficient": 0.1,
    "l0_coefficient": 0.1,
    "target_l0": 4.0,
    "k": 4,
    "s": 4,
    "sparsity_coefficient": 1.0,
}


def _sections(model: type[Section]) -> Iterator[type[Section]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _sections(field.annotation)


def _cases() -> Iterator[tuple[type[Section], dict[str, Any]]]:
    for model in dict.fromkeys(_sections(Params)):
        yield model, model().model_dump()
    for model in get_args(AnyRecipe):
        recipe = get_args(model.model_fields["recipe"].annotation)[0]
        yield model, {key: value for key, value in {"recipe": recipe, **RECIPE}.items() if key in model.model_fields}
    yield Style, {"marker": "o", "color": "red"}
    data = {"dataset_name": "x", "n_train_samples": 8}
    saes = {"sae_type": "relu", "sae_positions": ["blocks.0.hook_resid_pre"], "sparsity_coeff": 0.1}
    yield sae_interpretability.Data, data
    yield sae_interpretability.SAEs, saes
    yield sae_interpretability.Config, {"lr": 1e-3, "data": data, "saes": saes}


def _accepts(model: type[Section], values: dict[str, Any]) -> bool:
    try:
        model.model_validate(values)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(("model", "values"), list(_cases()), ids=lambda case: getattr(case, "__name__", ""))
def test_no_leaf_takes_what_it_cannot_be(model: type[Section], values: dict[str, Any]) -> None:
    assert _accepts(model, values)
    for key, field in model.model_fields.items():
        if field.annotation is Any:
            continue
        default = values.get(key, field.default)
        switch = isinstance(default, bool) or bool in get_args(field.annotation)
        never = [*NEVER, *([1, 0, "true", "on"] if switch else [True, False])]
        wrong = [
            value
            for value in never
            if _accepts(model, values | {key: value})
            and (model.__name__, key, value if isinstance(value, str) else None) not in EMPTY_IS_MEANT
            and not (key == "prompt_template" or isinstance(value, (dict, list)) and value == [])
        ]
        assert not wrong, f"{model.__name__}.{key} takes {wrong}"
        if _accepts(model, values | {key: "8"}):
            assert _accepts(model, values | {key: "x"}), f"{model.__name__}.{key} takes a number as text"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"preflight": {"max_norm_ratio": math.nan}}, r"preflight\.max_norm_ratio: Input should be a finite number"),
        ({"text": {"dataset": ""}}, r"text\.dataset: String should have at least 1 character"),
        ({"text": {"dataset": "  "}}, r"text\.dataset: is blank"),
        ({"sparse_probing": {"k_values": [1, True]}}, r"sparse_probing\.k_values\.1: Input should be a valid integer"),
        ({"train": {"saes": {"a": {"recipe": "top_k", "d_sae": 1e18, "k": 4}}}}, r"train\.saes\.a\.d_sae: .*16777216"),
        ({"train": {"tokens": 10**18}}, r"train\.tokens: .*10000000000000 "),
        ({"train": {"saes": {"a" * 300: {"recipe": "top_k", "d_sae": 8, "k": 4}}}}, "at most 150 characters"),
        ({"train": {"tokens": 100}}, r"train: batch_size 512 exceeds tokens 100"),
        ({"train": {"saes": {"a": {"recipe": "jump_relu", "d_sae": 8, "target_l0": 9}}}}, "target_l0 = 9 exceeds d_sae = 8"),
        ({"train": {"saes": {"a": {"recipe": "matching_pursuit", "d_sae": 8, "s": 9}}}}, "s = 9 exceeds d_sae = 8"),
        (
            {"train": {"saes": {"a": {"recipe": "p_anneal", "d_sae": 8, "l1_coefficient": 1, "anneal_start": 1}}}},
            "anneal_end",
        ),
        ({"comparison_saes": {"sae_regex_pattern": "(", "sae_block_pattern": "x"}}, "not a regular expression"),
        ({"visualization": {"architectures": None}}, r"visualization\.architectures"),
        ({"absorption": {"prompt_template": "x" * 5_000}}, r"must hold \{word\} once.*…$"),
    ],
)
def test_impossible_values_are_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line) as caught:
        check_params(values, "x")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_names_that_setup_will_miss_are_said_before_training() -> None:
    check_trained_names(Params())
    check_trained_names(Params(baseline_sae=HUB, comparison_saes={"trained": ["all"]}, train={"saes": {}}))
    check_trained_names(Params(train={"enabled": False, "saes": {}}))
    for values, line in [
        ({"baseline_sae": {"name": "absent"}}, r"baseline_sae\.name: absent is not among train\.saes"),
        ({"comparison_saes": {"trained": ["tpok"]}}, r"saes\.trained: tpok .* did you mean topk"),
    ]:
        with pytest.raises(UserError, match=line):
            check_trained_names(Params(**values))


def test_a_whole_float_is_a_whole_number() -> None:
    assert check_params({"train": {"tokens": 1e6}}, "x").train.tokens == 1_000_000


# --- where an SAE comes from -----------------------------------------------------------------

HUB = {"repo_id": "canrager/lm_sae", "filename": "resid_post_layer_4/trainer_8/ae.pt", "hook_layer": 4}


def test_a_block_that_names_no_source_means_that_of_its_keys(tmp_path: Path) -> None:
    assert check_params({"baseline_sae": HUB}, "x").baseline_sae.source == "hub"
    assert check_params({"baseline_sae": {"path": "p"}}, "x").baseline_sae.source == "folder"
    assert check_params({"baseline_sae": {"name": "topk"}}, "x").baseline_sae.source == "trained"
    assert check_params({"transfer": {"sae": {"release": "r", "sae_id": "i"}}}, "x").transfer.sae.source == "sae_lens"
    values = YAML(typ="safe").load(TEXT) | {"baseline_sae": HUB}
    with (tmp_path / "params.yaml").open("w") as stream:
        YAML().dump(values, stream)
    assert load_params(tmp_path / "params.yaml").baseline_sae.filename == HUB["filename"]


@pytest.mark.parametrize(
    ("block", "line"),
    [
        ({"source": "trained", **HUB}, "source: trained does not use repo_id and filename; write source: hub, or null"),
        ({**HUB, "path": "p"}, "keys of several sources; add source: hub or source: folder"),
        ({"repo_id": "r"}, "source: hub needs filename"),
        ({"source": "folder", "path": "p", "release": "r"}, "source: folder does not use release"),
    ],
)
def test_a_block_that_contradicts_itself_is_refused(block: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"baseline_sae: .*{line}"):
        check_params({"baseline_sae": block}, "x")


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "presets").glob("*.txt")))
def test_presets_make_whole_files(
    tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "params.yaml"
    path.write_text(TEXT)
    apply_overrides(path, read_preset(preset))
    params = load_params(path)
    assert params.baseline_sae.source in ("trained", "packaged", "hub", "sae_lens") and "note" not in capsys.readouterr().err
