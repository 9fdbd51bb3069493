"""params.yaml: the committed file is valid and complete, and every mistake is one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sae_research.cli.pipeline import read_preset
from sae_research.config.params import Params, load_params
from sae_research.config.reporting import load_visualization
from sae_research.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_committed_file_names_every_section_and_key() -> None:
    """DVC refuses to track a parameter that the file does not have."""
    load_params(ROOT / "params.yaml")
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    for section, field in Params.model_fields.items():
        assert section in values
        for key in getattr(field.annotation, "model_fields", {}):
            assert key in values[section], f"{section}.{key}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {devcie: cpu}", r"unknown key model\.devcie, did you mean device\?"),
        ("modle: {name: x}", r"unknown key modle, did you mean model\?"),
        ("train: {saes: {a: {recipe: standard, d_sae: 8, l1_coefficient: 1, kk: 3}}}", r"train\.saes\.a\.kk"),
        ("core_eval: {batch_size_prompts: many}", r"core_eval\.batch_size_prompts: .*integer.*'many'"),
        ("core_eval: {batch_size_prompts: 0}", r"core_eval\.batch_size_prompts"),
        ("random_seed: -1", "random_seed"),
        ("model: {device: gpu}", r"model\.device"),
        ("model: {torch_dtype: float8}", r"model\.torch_dtype"),
        ("baseline_sae: {source: hub}", "source: hub needs repo_id"),
        ("train: {saes: {Bad-Name: {recipe: standard, d_sae: 8, l1_coefficient: 1}}}", "Bad-Name"),
        ("train: {saes: {a: {recipe: top_k, d_sae: 8, k: 9}}}", "k = 9 exceeds d_sae = 8"),
        ("comparison_saes: {sae_regex_pattern: x}", "go together"),
        ("comparison_saes: {match: x}", "match chooses among the ids of `release`"),
        ("controls: {names: [unknown]}", r"controls\.names"),
        ("model: [", "not valid YAML"),
        ("just text", "expected keys and values"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_params(path, partial=True)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("controls: {pca_components: 6_4}\npreflight: {max_norm_ratio: 1e1}\n")
    params = load_params(tmp_path / "params.yaml", partial=True)
    assert params.controls.pca_components == [64]
    assert params.preflight.max_norm_ratio == 10


def test_unknown_preset_names_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="pythia-70m"):
        read_preset("nothing")


def test_the_drawing_stage_reads_its_section_as_the_others_do(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    whole = (ROOT / "params.yaml").read_text()
    path.write_text(whole.replace("dpi: 110", "dpi: 72"))
    assert load_visualization(path) == load_params(path).visualization
    assert load_visualization(path).dpi == 72
    path.write_text(whole.replace("  dpi: 110", "  dpii: 72"))
    with pytest.raises(UserError, match=r"ends within the section visualization, without visualization\.dpi"):
        load_visualization(path)
    path.write_text(whole.replace("  dpi: 110", "  dpi: 110\n  dpii: 72"))
    with pytest.raises(UserError, match=r"unknown key visualization\.dpii, did you mean dpi\?"):
        load_visualization(path)
    with pytest.raises(UserError, match="no such file"):
        load_visualization(tmp_path / "other.yaml")
