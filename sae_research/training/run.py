"""The `train` stage: all SAEs of `params.train.saes` in one pass of the model, into `trained_saes/`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_research.lm import LanguageModel, load_language_model
from sae_research.params import Params
from sae_research.recipe_params import SAERecipe
from sae_research.saes import SAEConfig, SparseAutoencoder, save_sae
from sae_research.store import fingerprint, round_significant, write_json, write_text
from sae_research.text.corpus import text_fingerprint
from sae_research.text.stream import token_contexts
from sae_research.training.held_out import held_out_metrics, held_out_rows
from sae_research.training.pca import pca_variance_explained
from sae_research.training.stream import ActivationStream
from sae_research.training.trainer import CurveRow, Member, make_member, train_members

OUTPUT = Path("trained_saes")
REPORT_FILE = "training_report.json"
CURVE_FILE = "training_curve.tsv"
TRAIN_SPLIT = "sae_train"
PCA_COMPONENTS = (16, 32, 64, 128)

Report = dict[str, Any]


def train(params: Params, output: Path = OUTPUT) -> Report:
    """Run the stage; `output` is replaced whole when everything is done, and left alone if anything fails.

    Raises `UserError` when the text runs out, a loss diverges, or model and hook do not match.
    """
    if not (params.train.enabled and params.train.saes):
        report = _report(params, tokens=0, fraction_kept=0.0)
        with _replaced(output) as folder:
            write_json(folder / REPORT_FILE, report)
        print("nothing to train: train.enabled is false or train.saes is empty")
        return report
    lm = load_language_model(params.model.name, params.model.device, params.train.llm_dtype)
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, TRAIN_SPLIT, params.train.tokens)
    stream = ActivationStream(lm, contexts.tokens, params)
    members = [
        make_member(name, params.train, stream.calibration.rows, training_seed(config, params))
        for name, config in params.train.saes.items()
    ]
    n_trained = train_members(stream, members)
    saes = {member.name: _exported(member, lm, params, stream, n_trained) for member in members}
    report = _report(params, n_trained, stream.fraction_kept)
    _evaluate(report, members, saes, stream, lm, params)
    with _replaced(output) as folder:
        for member in members:
            save_sae(saes[member.name], folder / member.name)
            write_text(folder / member.name / CURVE_FILE, curve_tsv(member.curve))
        write_json(folder / REPORT_FILE, round_significant(report))
    print(held_out_table(report))
    return report


def hyper_parameters(config: SAERecipe, params: Params) -> dict[str, Any]:
    """What shaped one SAE's training: its own section, and what the run's section says for all."""
    shared = (
        "batch_size",
        "buffer_tokens",
        "llm_dtype",
        "warmup_fraction",
        "sparsity_warmup_fraction",
        "decay_fraction",
        "dead_fraction",
    )
    return {
        **config.model_dump(exclude={"recipe", "seed"}, exclude_none=True),
        **params.train.model_dump(include=set(shared)),
    }


def training_seed(config: SAERecipe, params: Params) -> int:
    return params.random_seed if config.seed is None else config.seed


def curve_tsv(curve: list[CurveRow]) -> str:
    """A training curve as a table, 4 significant digits."""
    rows = ["\t".join(str(round_significant(value)) for value in row) for row in curve]
    return "\n".join(["\t".join(CurveRow._fields), *rows]) + "\n"


def held_out_table(report: Report) -> str:
    """The held-out figures as a plain table, PCA below."""
    lines = [
        f"\nheld-out text, {report['hook_name']} of {report['model_name']}, "
        f"{report['tokens']:,} training tokens",
        f"{'':24s}{'L0':>8s}{'variance explained':>20s}{'alive':>8s}",
    ]
    for name, entry in report["saes"].items():
        figures = entry["held_out"]
        lines.append(
            f"{name:24s}{figures['l0']:8.1f}{figures['variance_explained']:20.3f}"
            f"{figures['fraction_alive']:8.3f}"
        )
    lines += [
        f"{f'PCA, {n} components':24s}{int(n):8d}{value:20.3f}"
        for n, value in report["pca_reference"].items()
    ]
    return "\n".join(lines)


def _exported(
    member: Member, lm: LanguageModel, params: Params, stream: ActivationStream, n_trained: int
) -> SparseAutoencoder:
    config = params.train.saes[member.name]
    recipe = {
        "recipe": config.recipe,
        "tokens": n_trained,
        "text": params.text.dataset,
        "text_fingerprint": text_fingerprint(params.text, TRAIN_SPLIT),
        "model_fingerprint": lm.fingerprint,
        "hyper_parameters": hyper_parameters(config, params),
    }
    cfg = SAEConfig(
        form=member.recipe.form,
        d_in=stream.d_in,
        d_sae=config.d_sae,
        model_name=params.model.name,
        hook_name=params.train.hook_name,
        context_size=params.text.context_size,
        options=member.recipe.options(),
        provenance={
            "seed": training_seed(config, params),
            "recipe_id": fingerprint([recipe, params.train.hook_name, params.token_mask.model_dump()])[:16],
            **recipe,
            # what the preflight compares another model's or text's activations with
            "activation_norm": round_significant(float(
                stream.calibration.rows.norm(dim=1).mean() / stream.calibration.scale)),
        },
    )
    return member.recipe.export(stream.calibration.scale, cfg)


def _report(params: Params, tokens: int, fraction_kept: float) -> Report:
    return {
        "tokens": tokens,
        "hook_name": params.train.hook_name,
        "model_name": params.model.name,
        "text": params.text.dataset,
        "seed": params.random_seed,
        "fraction_tokens_kept": fraction_kept,
        "saes": {},
        "pca_reference": {},
    }


def _evaluate(
    report: Report,
    members: list[Member],
    saes: dict[str, SparseAutoencoder],
    stream: ActivationStream,
    lm: LanguageModel,
    params: Params,
) -> None:
    """Add every SAE's held-out figures to the report, and PCA's."""
    rows_ND = held_out_rows(lm, params, stream.calibration.median_norm)
    metrics = held_out_metrics({name: sae.to(lm.device) for name, sae in saes.items()}, rows_ND)
    for member in members:
        config = params.train.saes[member.name]
        report["saes"][member.name] = {
            "recipe": config.recipe,
            "hyper_parameters": hyper_parameters(config, params),
            "fraction_silent_at_end": member.fraction_silent,
            "held_out": metrics[member.name],
        }
    explained = pca_variance_explained(stream.pca, rows_ND * stream.calibration.scale, PCA_COMPONENTS)
    report["pca_reference"] = {str(n): value for n, value in explained.items()}


@contextmanager
def _replaced(output: Path) -> Iterator[Path]:
    """A temporary neighbour that takes `output`'s place once the block is done, or goes if it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        temporary.chmod(0o755)
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
