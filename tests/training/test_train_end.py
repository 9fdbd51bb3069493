"""What a run needs at its end is looked at before its start, and what is trained outlives whatever comes after."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from sae_research.config.params import Params
from sae_research.runtime.errors import Interrupted, UserError
from sae_research.saes import load_sae
from sae_research.training import evaluation, loop, stage
from sae_research.training.checkpoints import ProgressFile, progress_path, run_folder, run_key, saved_checkpoints
from tests.helpers.training import STANDARD, TOP_K

FEW = {"topk": TOP_K}


@pytest.fixture
def short(make_params):
    return make_params(saes=FEW, tokens=2048)


@pytest.fixture
def undisturbed(short, tmp_path_factory, monkeypatch, _done={}) -> dict[str, bytes]:  # noqa: B006  (made once)
    """What the short run writes."""
    if not _done:
        folder = tmp_path_factory.mktemp("undisturbed")
        with monkeypatch.context() as patch:
            patch.setenv("DVC_ROOT", str(folder))
            stage.train(short, folder / "out")
        _done |= files(folder / "out")
    return _done


@pytest.fixture
def no_steps(monkeypatch):
    """Any step is a failure of the test."""
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("took a step"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- before the first step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["one two three " * 2000], r"every document stands in one split as a whole: give more documents, long ones cut"),
        (["word " * 900 + str(number) for number in range(12)], "train.held_out_tokens: .*split core_eval ends after"),
        (["", "  "], "the data set is empty"),
        (None, "no readable file"),
    ],
)
def test_text_that_cannot_be_measured_on_is_refused_at_the_start(short, documents, message, tmp_path, no_steps):
    folder = tmp_path / "books"
    folder.mkdir()
    if documents is not None:
        (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    params = short.model_copy(
        update={
            "text": short.text.model_copy(update={"dataset": str(folder)}),
            "train": short.train.model_copy(update={"held_out_tokens": 20_000}),
        }
    )
    with pytest.raises(UserError, match=message) as caught:
        stage.train(params, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_contexts_longer_than_the_text_are_named(short, tmp_path, no_steps):
    text = short.text.model_copy(update={"context_size": 10_000_000})
    with pytest.raises(UserError, match=r"do not fill one context; lower text.context_size \(10,000,000\)"):
        stage.train(short.model_copy(update={"text": text}), tmp_path / "out")


def test_a_missing_column_is_named(short, tmp_path, no_steps):
    text = short.text.model_copy(update={"column_name": "body"})
    with pytest.raises(UserError, match="no column 'body'; available: text"):
        stage.train(short.model_copy(update={"text": text}), tmp_path / "out")


def test_names_and_places_that_cannot_be_written_are_refused_at_the_start(make_params, tmp_path, no_steps):
    for length in (151, 240, 300):
        with pytest.raises(ValueError, match="at most 150"):
            make_params(saes={"a" * length: TOP_K})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file where a folder is to be written"):
        stage.train(make_params(saes=FEW), tmp_path / "file")
    longest = make_params(saes={"a" * 150: TOP_K})
    stage.check_output(longest, tmp_path / "out")
    with pytest.raises(UserError, match="train.saes: the name aaa.* of 230 characters is too long for this file system"):
        stage.check_output(
            longest.model_copy(
                update={"train": longest.train.model_copy(update={"saes": {"a" * 230: longest.train.saes["a" * 150]}})}
            ),
            tmp_path / "out",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_without_room_is_said_at_the_start(make_params, tmp_path, monkeypatch, capsys, no_steps):
    original = stage.shutil.disk_usage
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: original(path)._replace(free=10_000))
    with pytest.raises(UserError, match=r"the SAEs of train.saes take 1.64e-05 GB, the disk has 1e-05 GB free; make room"):
        stage.train(make_params(saes=FEW), tmp_path / "out")
    monkeypatch.setattr(stage.shutil, "disk_usage", lambda path: original(path)._replace(free=20_000))
    lm = stage.load_model(make_params())
    stage.check_room(make_params(saes=FEW), lm, tmp_path / "out")
    assert "warning: a checkpoint takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"controls": {"pca_components": 33}}, "controls.pca_components = 33 is larger than the activations' width 32"),
        ({"controls": {"names": ["random"], "s": 65}}, "controls.s = 65 is larger than the baseline's d_sae = 64"),
        (
            {"controls": {"names": []}, "sae_variants": {"mpsae": {"s_values": [3, 65]}}},
            "sae_variants.mpsae.s_values: 65 is larger",
        ),
    ],
)
def test_the_pipeline_s_training_refuses_what_setup_would(make_params, tmp_path, no_steps, sections, message):
    params = Params.model_validate({**make_params().model_dump(), **sections})
    with pytest.raises(UserError, match=message):
        stage.train(params, tmp_path / "out", compared=True)


# --- after the last step --------------------------------------------------------------------------


def broken(*_: object, **__: object) -> None:
    raise UserError("cannot be measured")


def test_a_failed_measurement_is_made_up_for_without_a_step(short, undisturbed, make_params, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be measured"):
        patch.setattr(evaluation, "read_held_out", broken)
        stage.train(short, tmp_path / "out")
    [(step, _)] = saved_checkpoints(run_folder(short))
    assert f"the SAEs are trained and kept, all {step} steps; start the same run again" in capsys.readouterr().err
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("took a step"))
    fewer = make_params(saes=FEW, tokens=2048, held_out_tokens=256, evaluate_tokens=0)
    stage.train(fewer, tmp_path / "fewer")
    assert f"going on from the checkpoint of step {step}" in capsys.readouterr().out
    ours, theirs = files(tmp_path / "fewer"), undisturbed
    assert ours["topk/sae_weights.safetensors"] == theirs["topk/sae_weights.safetensors"]
    assert json.loads(ours["topk/eval_results.json"])["tokens"] < json.loads(theirs["topk/eval_results.json"])["tokens"]
    assert not saved_checkpoints(run_folder(short))


@pytest.mark.parametrize("where", ["evaluate", "the final checkpoint"])
def test_a_signal_after_the_last_step_keeps_what_is_trained(short, undisturbed, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="the SAEs are trained and kept, all") as stop:
        if where == "the final checkpoint":
            original = loop.Trainer.save_checkpoint

            def save(self) -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                original(self)

            patch.setattr(loop.Trainer, "save_checkpoint", save)
        else:
            patch.setattr(stage, where, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        stage.train(short, tmp_path / "out")
    assert stop.value.code == 143 and json.loads(progress_path(short).read_text())["state"] == "interrupted"
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("took a step"))
    stage.train(short, tmp_path / "out")
    assert files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("where", ["save_sae", "remove_checkpoints"])
def test_a_signal_while_saes_are_written_lets_them_be_written(short, tmp_path, monkeypatch, where):
    original = getattr(stage, where)

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(stage, where, signalled)
    stage.train(short, tmp_path / "out")
    assert load_sae(tmp_path / "out" / "topk").cfg.d_sae == 64
    assert json.loads(progress_path(short).read_text())["state"] == "finished"


def test_a_checkpoint_that_could_not_be_written_is_not_promised(short, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sae_research.training.session.save_checkpoint", full)
    monkeypatch.setattr(stage, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted, match="nothing is kept: no checkpoint could be written"):
        stage.train(short, tmp_path / "out")


def test_a_full_disk_does_not_end_a_run_by_its_progress_file(tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sae_research.training.checkpoints.write_json", full)
    progress = ProgressFile(tmp_path / "progress.json", "cpu")
    progress.update(0.5)
    progress.end("finished")
    assert capsys.readouterr().err.count("progress cannot be followed") == 1


# --- the name of a run ----------------------------------------------------------------------------

SAME = {"held_out_tokens": 99, "evaluate_tokens": 0, "checkpoint_seconds": None, "checkpoint_steps": 7, "enabled": False}
OTHER = {
    "tokens": 640,
    "batch_size": 32,
    "accumulation_steps": 2,
    "buffer_tokens": 2048,
    "llm_dtype": "bfloat16",
    "warmup_fraction": 0.2,
    "sparsity_warmup_fraction": 0.2,
    "decay_fraction": 0.2,
    "dead_fraction": 0.2,
    "precision": "bfloat16",
    "hook_name": "blocks.0.hook_resid_post",
    "saved_checkpoints": 2,
    "learning_rate": 0.1,
    "device": "mps",
    "saes": FEW,
}


def test_a_run_is_called_by_what_changes_a_weight(make_params):
    """Every key of `train` is in one list: a new one has to be put there."""
    entries = {"standard": {key: value for key, value in STANDARD.items() if key != "learning_rate"}, "topk": TOP_K}
    params = make_params(saes=entries)
    assert set(SAME) | set(OTHER) == set(type(params.train).model_fields)
    assert {key: run_key(make_params(saes=entries, **{key: value})) for key, value in SAME.items()} == dict.fromkeys(
        SAME, run_key(params)
    )
    keys = [run_key(make_params(**{"saes": entries, key: value})) for key, value in OTHER.items()]
    assert len({run_key(params), *keys}) == len(OTHER) + 1
    updated = {
        "tracking": {"project": "p"},
        "activation_caching": {"enabled": False},
        "controls": {"s": 2},
        "model": {**params.model.model_dump(), "torch_dtype": "bfloat16"},
        "core_eval": {"batch_size_prompts": 1},
    }
    assert run_key(Params.model_validate(params.model_dump() | updated)) == run_key(params)


def test_what_comes_to_the_same_is_one_run(make_params):
    params = make_params(saes={"topk": TOP_K})
    hook = params.train.hook_name
    for entry in ({"hook_name": hook}, {"seed": params.random_seed}, {"inference": "top_k"}):
        assert run_key(make_params(saes={"topk": {**TOP_K, **entry}})) == run_key(params), entry
    own_hook = make_params(saes={"topk": {**TOP_K, "hook_name": hook}}, hook_name="blocks.0.hook_resid_post")
    assert run_key(own_hook) == run_key(params)
    kinds = [run_key(make_params(saes=FEW, device=device)) for device in ("cuda", "cuda:0", "cuda:1", None, "cpu")]
    assert len(set(kinds[:3])) == 1 and len(set(kinds)) == 2 and kinds[3] == kinds[4] == run_key(params)
    moments = [
        run_key(make_params(saes={"topk": {**TOP_K, "inference": way}}, saved_checkpoints=2))
        for way in ("top_k", "threshold")
    ]
    assert len(set(moments)) == 2, "SAEs of moments on the way are of one form"


def test_another_way_to_write_trained_saes_takes_no_step(make_params, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(stage, "evaluate", broken)
        stage.train(make_params(saes=FEW, tokens=1024), tmp_path / "out")
    asked = make_params(saes={"topk": {**TOP_K, "inference": "top_k"}}, tokens=1024)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *_: pytest.fail("took a step"))
        stage.train(asked, tmp_path / "out")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))
    stage.train(asked, tmp_path / "undisturbed")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert load_sae(tmp_path / "out" / "topk").cfg.form == "topk"
