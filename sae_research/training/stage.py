"""The `train` stage: all SAEs of `params.train.saes` in one pass of the model, into `trained_saes/`.

`train` comes first. Below it: what a run looks at before its first step, because hours of training must not end in a
refusal; and how its SAEs leave it. `session` has how it starts, `ranks` what differs with several processes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sae_research.config.params import Params, TokenMask, check_sizes
from sae_research.config.recipes import PLUS, hooks_at
from sae_research.lm import LanguageModel, pick_device, token_mask
from sae_research.lm.hooks import parse_hook
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.errors import Interrupted, UserError
from sae_research.runtime.files import (
    check_writable,
    fingerprint,
    replaced_folder,
    round_significant,
    write_json,
    write_text,
)
from sae_research.runtime.formatting import gigabytes, tsv_text
from sae_research.saes import SAEConfig, SparseAutoencoder, save_sae
from sae_research.text.tokens import Contexts, TextRunsOut, token_contexts
from sae_research.training import rank_process
from sae_research.training.checkpoints import (
    ProgressFile,
    in_use,
    progress_path,
    remove_checkpoints,
    run_folder,
    saved_checkpoints,
)
from sae_research.training.evaluation import EVAL_FILE, HELD_OUT_SPLIT, evaluate, finding_lines, held_out_table
from sae_research.training.group import OtherRanks, RankLost
from sae_research.training.loop import Snapshots, Stop, StopSignals, Trainer
from sae_research.training.products import pass_dtype
from sae_research.training.ranks import number_of_ranks, other_ranks, shared_contexts
from sae_research.training.recipes.cross_layer import CrossLayer
from sae_research.training.session import load_model, open_session, training_seed, training_text
from sae_research.training.stream import ActivationStream
from sae_research.training.tracking import DENSITY_TOKENS, Tracker, density_on, tracked
from sae_research.training.training_sae import CurveRow, TrainingSAE

OUTPUT = Path("trained_saes")
REPORT_FILE = "training_report.json"
CURVE_FILE = "training_curve.tsv"

Report = dict[str, Any]


def train(params: Params, output: Path = OUTPUT, compared: bool = False) -> Report:
    """Run the stage; `output` is replaced whole when everything is done, and left alone if anything fails.

    What the end needs is checked before the first step: the held-out text, room on the disk, names and rights; with
    `compared` also whether the setup stage can make its controls and variants of the baseline trained here.
    `checkpoints.progress_path(params)` says how far the run is. A run that was interrupted goes on from its last checkpoint
    and ends with the same bytes on a CPU; one whose measurement failed is measured only. Raises `UserError` when the text
    runs out, a loss diverges, model and hook do not match or the device fails, and `Interrupted` on SIGTERM and Ctrl-C,
    after saving a checkpoint. With several ranks (docs/cluster.md) this process is rank 0, and the same holds; one that dies
    is a `UserError`.
    """
    if not (params.train.enabled and params.train.saes):
        report = _report(params, tokens=0)
        with replaced_folder(output) as folder:
            write_json(folder / REPORT_FILE, report)
        print("nothing to train: train.enabled is false or train.saes is empty")
        return report
    check_output(params, output)
    check_hooks(params, parse_hook)
    progress = ProgressFile(progress_path(params), params.train.device or params.model.device)
    with (
        in_use(run_folder(params), params.activation_caching.max_gb),
        tracked(params) as tracker,
        StopSignals() as signals,
        _reported(progress),
        _others(params) as others,
    ):
        report = _train(params, output, compared, progress, signals, tracker, others)
    print(held_out_table(report))
    return report


@contextmanager
def _others(params: Params) -> Generator[OtherRanks | None]:
    """The other ranks of a run that has some, at work while this one gets ready; they end with the block."""
    size = number_of_ranks(params)
    if size == 1:
        yield None
        return
    threads, device = torch.get_num_threads(), pick_device(params.model.device)
    others = other_ranks(rank_process.__name__, params, size, pass_dtype(params.train.llm_dtype, device))
    try:
        if device.type == "cpu":
            torch.set_num_threads(params.cluster.cpus_per_worker)
        yield others
    finally:
        torch.set_num_threads(threads)
        others.close()


def _train(
    params: Params,
    output: Path,
    compared: bool,
    progress: ProgressFile,
    signals: StopSignals,
    tracker: Tracker,
    others: OtherRanks | None,
) -> Report:
    lm = load_model(params)
    check_hooks(params, lm.d_in)
    if compared:
        check_comparison(params, lm)
    check_room(params, lm, output)
    held_out = held_out_contexts(params, lm)
    text, contexts = training_text(params, lm)
    group = None if others is None else others.join()
    if group is not None:
        shared_contexts(group, contexts)
    session = open_session(lm, contexts, params, group)
    stream, saes = session.stream, session.saes
    progress.values |= {"checkpoint_step": session.resumed_at, "device": str(stream.device)}

    def export(sae: TrainingSAE) -> SparseAutoencoder:
        return _exported(sae, lm, params, stream, text)

    snapshots = Snapshots(
        session.folder / "saved",
        params.train.saved_checkpoints,
        saes,
        export,
        None if session.resumed_at is None else stream.fraction,
        session.peers.gather,
    )

    def at_step(fraction: float) -> None:
        tracker.update(saes)
        for name, saved in snapshots.at_step(fraction).items():
            tracker.checkpoint(name, saved, saved.name)
        for sae in saes:
            if session.peers.owns(sae) and tracker.histogram_is_due(sae):
                tracker.histogram(
                    sae.name, density_on(export(sae), stream.buffers[sae.hook].sample(DENSITY_TOKENS)), sae.step
                )

    trainer = Trainer(stream, saes, params.train, progress, signals, session.save, at_step, session.peers, tracker.log_steps)
    trainer.run()
    trained = {sae.name: export(sae) for sae in saes}
    report = _report(params, max(sae.tokens for sae in saes))
    results = evaluate(report, saes, trained, stream, held_out, lm, params)
    signals.carry_through()
    with replaced_folder(output) as folder:
        for sae in saes:
            save_sae(trained[sae.name], folder / sae.name)
            write_text(folder / sae.name / CURVE_FILE, curve_tsv(sae.curve))
            write_json(folder / sae.name / EVAL_FILE, results[sae.name])
        snapshots.move_into(folder)
        write_json(folder / REPORT_FILE, round_significant(report))
    remove_checkpoints(session.folder)
    shutil.rmtree(snapshots.folder, ignore_errors=True)
    for sae in saes:
        tracker.checkpoint(sae.name, output / sae.name, "trained")
    tracker.finish(results, finding_lines(report))
    return report


@contextmanager
def _reported(progress: ProgressFile) -> Generator[None]:
    """Leave in the progress file how the run ended, and turn what ends it from outside into one line."""
    try:
        yield
    except Stop as stop:
        message = _what_is_kept(progress)
        progress.end("interrupted", message)
        raise Interrupted(message, stop.number) from None
    except RankLost as error:
        message = f"{error}; {_what_is_kept(progress)}"
        progress.end("failed", message)
        raise UserError(message) from None
    except torch.AcceleratorError as error:
        message = (
            f"the device failed ({str(error).strip().partition(chr(10))[0]}); the last checkpoint is kept, start "
            "the same run again to go on from there"
        )
        progress.end("failed", message)
        raise UserError(message) from None
    except torch.OutOfMemoryError as error:
        mend = (
            f"lower model.llm_batch_size or train.held_out_tokens; {_what_is_kept(progress)}"
            if progress.trained
            else "raise train.accumulation_steps, or lower train.batch_size, train.buffer_tokens or model.llm_batch_size"
        )
        message = f"out of device memory ({str(error).strip().partition('. ')[0]}); {mend}"
        progress.end("failed", message)
        raise UserError(message) from None
    except BaseException as error:
        if progress.trained:
            print(_what_is_kept(progress), file=sys.stderr, flush=True)
        progress.end("failed", str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
        raise
    progress.end("finished")


def _what_is_kept(progress: ProgressFile) -> str:
    """What is left of a run that ends here, in words."""
    kept = saved_checkpoints(progress.path.parent)
    if not kept:
        return (
            "nothing is kept: no checkpoint could be written"
            if progress.trained or progress.values["step"]
            else "before the first step: nothing to keep"
        )
    if progress.trained and kept[0][0] == progress.values["step"]:
        return f"the SAEs are trained and kept, all {kept[0][0]} steps; start the same run again to measure and write them"
    return f"the checkpoint of step {kept[0][0]} is kept; start the same run again to go on from there"


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


# --- before the first step -------------------------------------------------------------------


def check_output(params: Params, output: Path) -> None:
    """Raises `UserError` or `OSError` where the SAEs could not be written: a name that the file system does not take, a
    place that is read-only or somebody else's."""
    check_writable(output, list(params.train.saes), "train.saes")


def check_hooks(params: Params, check: Callable[[str], Any]) -> None:
    """Raises `UserError` naming the SAE one of whose hooks `check` refuses."""
    for name in params.train.saes:
        for hook in hooks_at(params.train.place_of(name)):
            try:
                check(hook)
            except UserError as error:
                raise UserError(f"train.saes.{name}: {error}") from error


def check_comparison(params: Params, lm: LanguageModel) -> None:
    """Raises `UserError` where the setup stage would refuse the controls or variants of a baseline that is trained here."""
    name = params.baseline_sae.name
    if params.baseline_sae.source == "trained" and name in params.train.saes:
        config = params.train.saes[name]
        if config.hook_names is not None and config.written is None:
            raise UserError(
                f"baseline_sae.name: {name} is a crosscoder; controls and variants are made of a baseline of one hook"
            )
        hooks = params.train.hook_of(name).split(PLUS)
        layers = len(hooks) if config.written is not None else 1
        check_sizes(params, lm.d_in(hooks[0]), config.d_sae // layers, config.written is not None)


def check_room(params: Params, lm: LanguageModel, output: Path) -> None:
    """Raises `UserError` where the disk does not hold the SAEs; says so where it does not hold a checkpoint, without which
    a run is possible too."""
    train = params.train
    widths = {hook: lm.d_in(hook) for hook in train.hooks}
    needed, free = train.output_bytes(widths), shutil.disk_usage(output.resolve().parent).free
    if needed > free:
        raise UserError(
            f"{output}: the SAEs of train.saes take {gigabytes(needed)}, the disk has {gigabytes(free)} free; "
            "make room (`make clean-cache`), or train fewer or narrower ones"
        )
    needed, free = train.checkpoint_bytes(widths, lm.dtype.itemsize), shutil.disk_usage(cache_dir("train")).free
    if needed > free:
        print(
            f"warning: a checkpoint takes {gigabytes(needed)}, the disk of .cache has {gigabytes(free)} free: an "
            "interrupted run will start afresh",
            file=sys.stderr,
            flush=True,
        )


def held_out_contexts(params: Params, lm: LanguageModel) -> Contexts:
    """The held-out contexts that SAEs will be measured on. Raises `UserError` where the text does not give them."""
    try:
        contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, HELD_OUT_SPLIT, params.train.held_out_tokens)
    except TextRunsOut as error:
        raise UserError(f"train.held_out_tokens: {error}") from None
    without_norms = TokenMask(drop_first_position=params.token_mask.drop_first_position, outlier_norm_multiple=None)
    if not token_mask(lm, contexts.tokens, torch.empty(0), without_norms, counted=contexts.counted).any():
        raise UserError("train.held_out_tokens: no held-out token counts; raise it")
    return contexts


# --- export ----------------------------------------------------------------------------------


def _exported(sae: TrainingSAE, lm: LanguageModel, params: Params, stream: ActivationStream, text: str) -> SparseAutoencoder:
    """The SAE as it stands, in the model's own units; `text` identifies the training text."""
    config, buffer = params.train.saes[sae.name], stream.buffers[sae.hook]
    recipe = {
        "recipe": config.recipe,
        "tokens": sae.tokens,
        "text": params.text.dataset,
        "text_fingerprint": text,
        "model_fingerprint": lm.fingerprint,
        "hyper_parameters": params.train.hyper_parameters(sae.name),
    }
    cfg = SAEConfig(
        form=sae.recipe.form,
        d_in=buffer.d_in,
        d_sae=config.d_sae,
        model_name=params.model.name,
        hook_name=params.train.hook_of(sae.name),
        hook_out=config.written or "",
        d_out=buffer.d_in,
        hook_scales=tuple(buffer.calibration.scales) if config.hook_names and not config.written else (),
        apply_b_dec_to_input=sae.recipe.reads_b_dec,
        context_size=params.text.context_size,
        options=sae.recipe.options(),
        provenance={
            "seed": training_seed(config, params),
            "recipe_id": fingerprint([recipe, sae.hook, params.token_mask.model_dump()])[:16],
            **recipe,
            # what the preflight compares another model's or text's activations with
            "activation_norm": round_significant(buffer.calibration.mean_norm),
        },
    )
    if cfg.is_cross_layer:
        assert isinstance(sae.recipe, CrossLayer)  # no other recipe takes `hook_outs`
        return sae.recipe.export_layers(buffer.calibration.scales, cfg)
    if cfg.is_transcoder:
        read_scale, scale = buffer.calibration.scales
        return sae.recipe.export(scale, cfg, read_scale)
    return sae.recipe.export(buffer.calibration.scale, cfg)


def curve_tsv(curve: list[CurveRow]) -> str:
    """A training curve as a table, 4 significant digits."""
    return tsv_text(CurveRow._fields, ([round_significant(value) for value in row] for row in curve))
