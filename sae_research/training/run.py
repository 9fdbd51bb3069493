"""The `train` stage: all SAEs of `params.train.saes` in one pass of the model, into `trained_saes/`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.errors import Interrupted, UserError
from sae_research.folders import replaced_folder
from sae_research.lm import LanguageModel, load_language_model, pick_device
from sae_research.params import Params
from sae_research.precision import pass_dtype
from sae_research.recipe_params import SAERecipe
from sae_research.saes import SAEConfig, SparseAutoencoder, save_sae
from sae_research.stats import ReconstructionStats
from sae_research.store import fingerprint, round_significant, write_json, write_text
from sae_research.text.corpus import text_fingerprint
from sae_research.text.stored import long_contexts
from sae_research.training.after import EVAL_FILE, Results, after_training, finding_lines
from sae_research.training.before import check_comparison, check_output, check_room, held_out_tokens
from sae_research.training.checkpoint import in_use, remove_checkpoints, saved_checkpoints
from sae_research.training.held_out import held_out_stats, kept, read_held_out
from sae_research.training.member import CurveRow, Member
from sae_research.training.pca import pca_variance_explained
from sae_research.training.progress import ProgressFile, progress_path, run_folder
from sae_research.training.session import open_session, training_seed
from sae_research.training.signals import Stop, StopSignals
from sae_research.training.snapshots import Snapshots
from sae_research.training.stream import ActivationStream
from sae_research.training.tracking import Tracker, tracked
from sae_research.training.trainer import Trainer

OUTPUT = Path("trained_saes")
REPORT_FILE = "training_report.json"
CURVE_FILE = "training_curve.tsv"
TRAIN_SPLIT = "sae_train"
PCA_COMPONENTS = (16, 32, 64, 128)

Report = dict[str, Any]


def train(params: Params, output: Path = OUTPUT, compared: bool = False) -> Report:
    """Run the stage; `output` is replaced whole when everything is done, and left alone if anything fails.

    What the end needs is looked at before the first step: the held-out text, room on the disk, names and rights; with
    `compared` also whether the setup stage can make its controls and variants of the baseline trained here. The run can be
    followed in `progress.progress_path(params)`. A run that was interrupted goes on from its last checkpoint and ends with
    the same bytes on a CPU; one whose measurement failed is measured only. Raises `UserError` when the text runs out, a loss
    diverges, model and hook do not match or the device fails, and `Interrupted` on SIGTERM and Ctrl-C, after saving a
    checkpoint.
    """
    if not (params.train.enabled and params.train.saes):
        report = _report(params, tokens=0)
        with replaced_folder(output) as folder:
            write_json(folder / REPORT_FILE, report)
        print("nothing to train: train.enabled is false or train.saes is empty")
        return report
    check_output(params, output)
    progress = ProgressFile(progress_path(params), params.train.device or params.model.device)
    with in_use(run_folder(params), params.activation_caching.max_gb), tracked(params) as tracker, \
            StopSignals() as signals, _reported(progress):
        report = _train(params, output, compared, progress, signals, tracker)
    print(held_out_table(report))
    return report


def _train(params: Params, output: Path, compared: bool, progress: ProgressFile, signals: StopSignals,
           tracker: Tracker) -> Report:
    dtype = pass_dtype(params.train.llm_dtype, pick_device(params.model.device))
    lm = load_language_model(params.model.name, params.model.device, dtype)
    if compared:
        check_comparison(params, lm)
    check_room(params, lm, output)
    held_out = held_out_tokens(params, lm)
    text = text_fingerprint(params.text, TRAIN_SPLIT)
    contexts = long_contexts(lm.tokenizer, lm.separator_id, params.text, TRAIN_SPLIT, params.train.tokens, text,
                             params.activation_caching.max_gb)
    session = open_session(lm, contexts, params)
    stream, members = session.stream, session.members
    progress.values |= {"checkpoint_step": session.resumed_at, "device": str(members[0].loss_sum.device)}

    def export(member: Member) -> SparseAutoencoder:
        return _exported(member, lm, params, stream, text)

    snapshots = Snapshots(session.folder / "saved", params.train.saved_checkpoints, members, export,
                          None if session.resumed_at is None else stream.fraction)

    def at_step(fraction: float) -> None:
        snapshots.at_step(fraction)
        tracker.update(members)

    Trainer(stream, members, params.train, progress, signals, session.save, at_step).run()
    saes = {member.name: export(member) for member in members}
    report = _report(params, max(member.tokens for member in members))
    results = _evaluate(report, members, saes, stream, held_out, lm, params)
    signals.carry_through()
    with replaced_folder(output) as folder:
        for member in members:
            save_sae(saes[member.name], folder / member.name)
            write_text(folder / member.name / CURVE_FILE, curve_tsv(member.curve))
            write_json(folder / member.name / EVAL_FILE, results[member.name])
        snapshots.move_into(folder)
        write_json(folder / REPORT_FILE, round_significant(report))
    remove_checkpoints(session.folder)
    shutil.rmtree(snapshots.folder, ignore_errors=True)
    tracker.finish(results, finding_lines(report))
    return report


@contextmanager
def _reported(progress: ProgressFile) -> Iterator[None]:
    """Leave in the progress file how the run ended, and turn what ends it from outside into one line."""
    try:
        yield
    except Stop as stop:
        message = _kept(progress)
        progress.end("interrupted", message)
        raise Interrupted(message, stop.number) from None
    except torch.AcceleratorError as error:
        message = (f"the device failed ({str(error).strip().partition(chr(10))[0]}); the last checkpoint is kept, start "
                   "the same run again to go on from there")
        progress.end("failed", message)
        raise UserError(message) from None
    except torch.OutOfMemoryError as error:
        mend = (f"lower model.llm_batch_size or train.held_out_tokens; {_kept(progress)}" if progress.trained else
                "raise train.accumulation_steps, or lower train.batch_size, train.buffer_tokens or model.llm_batch_size")
        message = f"out of device memory ({str(error).strip().partition('. ')[0]}); {mend}"
        progress.end("failed", message)
        raise UserError(message) from None
    except BaseException as error:
        if progress.trained:
            print(_kept(progress), file=sys.stderr, flush=True)
        progress.end("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    progress.end("finished")


def _kept(progress: ProgressFile) -> str:
    """What is left of a run that ends here, in words."""
    kept = saved_checkpoints(progress.path.parent)
    if not kept:
        return ("nothing is kept: no checkpoint could be written" if progress.trained or progress.values["step"] else
                "before the first step: nothing to keep")
    if progress.trained and kept[0][0] == progress.values["step"]:
        return f"the SAEs are trained and kept, all {kept[0][0]} steps; start the same run again to measure and write them"
    return f"the checkpoint of step {kept[0][0]} is kept; start the same run again to go on from there"


def hyper_parameters(config: SAERecipe, params: Params) -> dict[str, Any]:
    """What shaped one SAE's training: its own section, and what the run's section says for all."""
    shared = (
        "batch_size",
        "accumulation_steps",
        "buffer_tokens",
        "precision",
        "llm_dtype",
        "warmup_fraction",
        "sparsity_warmup_fraction",
        "decay_fraction",
        "dead_fraction",
    )
    return {
        **config.model_dump(exclude={"recipe", "seed", "hook_name"}, exclude_none=True),
        **params.train.model_dump(include=set(shared)),
    }


def curve_tsv(curve: list[CurveRow]) -> str:
    """A training curve as a table, 4 significant digits."""
    rows = ["\t".join(str(round_significant(value)) for value in row) for row in curve]
    return "\n".join(["\t".join(CurveRow._fields), *rows]) + "\n"


def held_out_table(report: Report) -> str:
    """The held-out figures as a plain table, by hook, PCA below each."""
    lines = [f"\nheld-out text, {report['model_name']}, {report['tokens']:,} training tokens"]
    for hook, at_hook in report["hooks"].items():
        lines.append(f"{hook:32s}{'L0':>8s}{'variance explained':>20s}{'alive':>8s}")
        for name, entry in report["saes"].items():
            if entry["hook_name"] == hook:
                figures = entry["held_out"]
                lines.append(f"{name:32s}{figures['l0']:8.1f}{figures['variance_explained']:20.3f}"
                             f"{figures['fraction_alive']:8.3f}")
        lines += [f"{f'PCA, {n} components':32s}{int(n):8d}{value:20.3f}" for n, value in at_hook["pca_reference"].items()]
    return "\n".join(lines)


def _exported(
    member: Member, lm: LanguageModel, params: Params, stream: ActivationStream, text: str
) -> SparseAutoencoder:
    """The SAE as it stands, in the model's own units; `text` identifies the training text."""
    config, buffer = params.train.saes[member.name], stream.buffers[member.hook]
    recipe = {
        "recipe": config.recipe,
        "tokens": member.tokens,
        "text": params.text.dataset,
        "text_fingerprint": text,
        "model_fingerprint": lm.fingerprint,
        "hyper_parameters": hyper_parameters(config, params),
    }
    cfg = SAEConfig(
        form=member.recipe.form,
        d_in=buffer.d_in,
        d_sae=config.d_sae,
        model_name=params.model.name,
        hook_name=member.hook,
        context_size=params.text.context_size,
        options=member.recipe.options(),
        provenance={
            "seed": training_seed(config, params),
            "recipe_id": fingerprint([recipe, member.hook, params.token_mask.model_dump()])[:16],
            **recipe,
            # what the preflight compares another model's or text's activations with
            "activation_norm": round_significant(buffer.calibration.mean_norm),
        },
    )
    return member.recipe.export(buffer.calibration.scale, cfg)


def _report(params: Params, tokens: int) -> Report:
    return {
        "tokens": tokens,
        "hook_name": params.train.hook_name,
        "model_name": params.model.name,
        "text": params.text.dataset,
        "seed": params.random_seed,
        "saes": {},
        "hooks": {},
    }


def _evaluate(
    report: Report,
    members: list[Member],
    saes: dict[str, SparseAutoencoder],
    stream: ActivationStream,
    held_out_contexts: Tensor,
    lm: LanguageModel,
    params: Params,
) -> Results:
    """Add every SAE's held-out figures to the report, PCA's at every hook, and what they show; returns what
    `eval_results.json` of each SAE holds."""
    held_out = read_held_out(lm, params, held_out_contexts,
                             {hook: b.calibration.median_norm for hook, b in stream.buffers.items()})
    stats: dict[str, ReconstructionStats] = {}
    for hook, buffer in stream.buffers.items():
        rows_ND = held_out.rows(hook).to(buffer.device)
        here = [member for member in members if member.hook == hook]
        stats |= held_out_stats({member.name: saes[member.name].to(buffer.device) for member in here}, rows_ND)
        for member in here:
            config = params.train.saes[member.name]
            report["saes"][member.name] = {
                "recipe": config.recipe,
                "hook_name": hook,
                "tokens": member.tokens,
                "hyper_parameters": hyper_parameters(config, params),
                "fraction_silent_at_end": member.fraction_silent,
                "held_out": kept(stats[member.name]),
            }
        explained = pca_variance_explained(buffer.pca, rows_ND * buffer.calibration.scale, PCA_COMPONENTS)
        report["hooks"][hook] = {"fraction_tokens_kept": buffer.fraction_kept,
                                 "pca_reference": {str(n): value for n, value in explained.items()}}
    return after_training(report, stats, saes, members, held_out, lm, params)
