"""What would be found only at the end of the pipeline is found at its start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.runtime.errors import UserError
from sae_research.setup import run_setup, stage
from sae_research.setup.stage import check_inputs


@pytest.fixture
def texts(in_project: Path) -> Path:
    (in_project / "good.csv").write_text("text,label\nhello,1\n")
    (in_project / "crossed.csv").write_text("text,label,second_label\nhello,1,2\n")
    (in_project / "poor.csv").write_text("text,class\nhello,1\n")
    (in_project / "broken.parquet").write_text("no parquet")
    (in_project / "questions.jsonl").write_text(json.dumps({"question": "q", "choices": ["a", "b"], "answer": 0}) + "\n")
    (in_project / "empty").mkdir()
    return in_project


@pytest.mark.parametrize(
    ("evaluation", "section", "message"),
    [
        ("sparse_probing", {"dataset_names": ["news_topic", "gone.csv"]}, "task gone.csv: no such file"),
        ("sparse_probing", {"dataset_names": ["news_topik"]}, "unknown task 'news_topik', did you mean news_topic"),
        ("sparse_probing", {"dataset_names": ["poor.csv"]}, "poor.csv: no column 'label'; available: text, class"),
        ("sparse_probing", {"dataset_names": ["broken.parquet"]}, "not a valid Parquet file"),
        ("sparse_probing", {"dataset_names": ["empty"]}, "empty: no readable file"),
        ("tpp", {"dataset_names": ["gone.csv"]}, "task gone.csv: no such file"),
        ("scr", {"dataset_names": ["good.csv"]}, "no column 'second_label'"),
        ("scr", {"dataset_names": ["nonsense"]}, "nonsense"),
        ("sparse_probing_sae_probes", {"dataset_names": ["105_click_bait", "105_clickbait"]}, "has no task '105_clickbait'"),
        ("unlearning", {"forget_corpus": "./gone.txt"}, "unlearning.forget_corpus: ./gone.txt: no such file or folder"),
        ("unlearning", {"retain_corpus": "good.csv", "corpus_column": "body"}, "retain_corpus: .*no column 'body'"),
        ("unlearning", {"retain_questions": ["good.csv"]}, "retain_questions: .*no column 'question'"),
        ("ravel", {"prompts": "./gone"}, "ravel.prompts: ./gone: no such file or folder"),
        ("transfer", {"dataset": "poor.csv", "column_name": "body"}, "transfer.dataset: .*no column 'body'"),
    ],
)
def test_what_an_evaluation_would_not_find(texts: Path, evaluation: str, section: dict[str, Any], message: str) -> None:
    only = {"core": False, "sparse_probing": False, evaluation: True}
    with pytest.raises(UserError, match=message) as caught:
        check_inputs(Params.model_validate({"eval_types": only, evaluation: section}))
    assert str(caught.value).startswith(f"{evaluation}.") and "\n" not in str(caught.value)
    check_inputs(Params.model_validate({"eval_types": {**only, evaluation: False}, evaluation: section}))


def test_what_can_be_read_passes(texts: Path) -> None:
    on = dict.fromkeys(Params().eval_types.model_dump(), True)
    check_inputs(Params.model_validate({"eval_types": on}))
    check_inputs(
        Params.model_validate(
            {
                "eval_types": on,
                "sparse_probing": {"dataset_names": ["good.csv", str(texts / "good.csv"), "fancyzhx/ag_news"]},
                "scr": {"dataset_names": ["crossed.csv"]},
                "sparse_probing_sae_probes": {"dataset_names": "all"},
                "unlearning": {
                    "forget_corpus": "good.csv",
                    "retain_corpus": "owner/data:config",
                    "forget_questions": ["questions.jsonl", "cais/wmdp:wmdp-bio"],
                },
                "transfer": {"dataset": "good.csv"},
                "ravel": {"prompts": "empty"},
            }
        )
    )


def test_the_check_needs_no_torch() -> None:
    code = "import sys, sae_research.text.crossed_tasks, sae_research.text.questions; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_setup_refuses_before_it_computes(project: Path, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "load_configured", lambda *_: pytest.fail("loaded a model"))
        with pytest.raises(UserError, match="sparse_probing.dataset_names: task ./gone.csv: no such file"):
            run_setup(make_params(sparse_probing={"dataset_names": ["./gone.csv"]}))
    monkeypatch.setattr(stage, "preflight", lambda *_: pytest.fail("computed"))
    monkeypatch.setattr(stage.controls, "sample_pairs", lambda *_: pytest.fail("computed"))
    with pytest.raises(UserError, match="pca_components = 33 is larger"):
        run_setup(make_params(controls={"pca_components": 33, "s": 2}))
    with pytest.raises(UserError, match="preflight.tokens: text.dataset .* the split core_eval ends after"):
        run_setup(make_params(preflight={"tokens": 10**6}))
    assert not (project / "downloaded_saes").exists() and not list(project.glob(".downloaded_saes*"))
