"""One command with verbs: `sae-research VERB`, which is `python -m sae_research VERB`."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Collection
from pathlib import Path

from sae_research.cli import experiments, plan, results
from sae_research.cli.analyze import add_verb as add_analyze
from sae_research.cli.pipeline import read_preset, run_pipeline, unfinished_stages
from sae_research.reporting import shapes
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import replaced_folder, round_significant, user_path
from sae_research.runtime.former_names import elsewhere
from sae_research.runtime.sources import PROJECT


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verbs; each sets `run`, a function of the parsed options that returns the exit code."""
    export = verbs.add_parser(
        "export",
        help="write SAEs for dictionary_learning and SAE Bench, SAELens, sparsify or SAE-Interpretability",
        description="Example: python -m sae_research export trained_saes exported --format dictionary_learning",
    )
    export.add_argument("source", type=user_path, help="a folder with an SAE, or with folders of SAEs")
    export.add_argument("output", type=user_path)
    export.add_argument(
        "--format", default="dictionary_learning", help="dictionary_learning, sae_lens, sparsify or sae_interpretability"
    )
    export.add_argument("--dict_class", help="a class of dictionary_learning other than the usual one (docs/training.md)")
    export.set_defaults(run=_export)

    bring_in = verbs.add_parser(
        "import",
        help="read SAEs of other libraries (docs/formats.md)",
        description="Example: python -m sae_research import output/relu_lr_1e-3_2025-07-20 my_saes",
    )
    bring_in.add_argument("source", type=user_path, help="a folder with an SAE, or with folders of SAEs")
    bring_in.add_argument("output", type=user_path)
    bring_in.set_defaults(run=_import)

    upload = verbs.add_parser(
        "upload",
        help="send folders of SAEs to a hub repository; the token comes from HF_TOKEN",
        description="Example: python -m sae_research upload trained_saes --hf_repo_id me/my-saes",
    )
    upload.add_argument("folders", type=user_path, nargs="+")
    upload.add_argument("--hf_repo_id", required=True, metavar="ORG/NAME")
    upload.add_argument("--private", action="store_true", help="when the repository is made now: only you see it")
    upload.set_defaults(run=_upload)

    pareto = verbs.add_parser(
        "pareto",
        help="draw L0 against loss recovered for every recipe of one or more folders",
        description="Example: python -m sae_research pareto trained_saes other_run=before --out pareto.png",
    )
    pareto.add_argument("folders", nargs="+", metavar="FOLDER[=LABEL]", help="with the SAEs' eval_results.json below")
    pareto.add_argument("--out", type=Path, required=True, help="the picture, a .png")
    pareto.add_argument("--metric", default="loss_recovered", help="or variance_explained, fraction_alive")
    pareto.set_defaults(run=_pareto)

    finetune = verbs.add_parser(
        "finetune",
        help="fine-tune a finished SAE or transcoder on the model's predictions (KL and MSE)",
        description="Example: python -m sae_research finetune topk finetuned/topk --tokens 2e5; then "
        "comparison_saes.folders: [finetuned/*]",
    )
    finetune.add_argument("sae", help="a folder, the name of a trained or prepared SAE, or sae_lens:RELEASE:ID")
    finetune.add_argument("output", type=user_path, help="folder of the fine-tuned SAE; replaced where it is one")
    finetune.add_argument("--tokens", type=float, default=2e5)
    finetune.add_argument("--learning_rate", type=float, default=3e-3, help="relative to each tensor's size (0.003)")
    finetune.add_argument("--tensors", choices=["auto", "all", "decoder"], default="auto", help="what learns (auto)")
    finetune.set_defaults(run=_finetune)

    extract = verbs.add_parser(
        "extract",
        help="write the training text's activations in shards, from as many workers as there are",
        description="Example: python -m sae_research extract activations --tokens 1e6; then activation_caching.shards: "
        "[activations] in params.yaml. Model, text and tokens are params.yaml's.",
    )
    extract.add_argument("output", type=user_path, help="folder of the shards; what lies there already is kept")
    extract.add_argument("--hook", action="append", metavar="HOOK", help="one or more; default: those of train.saes")
    extract.add_argument("--tokens", type=float, help="default: train.tokens")
    extract.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: train.llm_dtype")
    extract.add_argument("--max-gb", type=float, help="refuse to write more; default: activation_caching.max_gb")
    extract.set_defaults(run=_extract)


# torch and matplotlib take seconds to import: each verb its own


def _export(options: argparse.Namespace) -> int:
    from sae_research.saes.exchange import export_saes

    export_saes(options.source, options.output, options.format, options.dict_class)
    return 0


def _import(options: argparse.Namespace) -> int:
    from sae_research.saes.exchange import import_saes

    import_saes(options.source, options.output)
    return 0


def _upload(options: argparse.Namespace) -> int:
    from sae_research.saes.exchange import upload

    print(upload(options.folders, options.hf_repo_id, private=options.private))
    return 0


def _finetune(options: argparse.Namespace) -> int:
    from sae_research.config.params import load_params
    from sae_research.lm import load_configured
    from sae_research.saes import save_sae
    from sae_research.saes.sources import check_fits, open_sae
    from sae_research.training.end_to_end import finetune

    if not (1 <= options.tokens < math.inf and 0 < options.learning_rate < math.inf):
        raise UserError("--tokens and --learning_rate must be numbers above 0")
    _check_sae_folder(options.output)
    params = load_params()
    sae = open_sae(options.sae)
    lm = load_configured(params.model)
    check_fits(options.sae, sae, lm, params.model.same_as)
    sae = sae.to(lm.device)
    result = finetune(sae, lm, params, int(options.tokens), options.learning_rate, options.tensors)
    about = {"tokens": int(options.tokens), "learning_rate": options.learning_rate, "tensors": result.trained}
    held_out = {"before": result.before._asdict(), "after": result.after._asdict()}
    provenance = {**sae.cfg.provenance, "finetuned": round_significant({**about, "held_out": held_out})}
    provenance.pop("recipe_id", None)  # it is no longer a seed of that recipe
    sae.cfg = sae.cfg.replace(provenance=provenance, role="comparison", base=None)
    with replaced_folder(options.output) as folder:
        save_sae(sae, folder)
    print(options.output)
    return 0


def _check_sae_folder(folder: Path) -> None:
    """Raises `UserError` where an SAE would take the place of anything but an SAE."""
    from sae_research.saes.files import CONFIG_FILE, WEIGHTS_FILE

    if not folder.exists():
        return
    inside = {file.name for file in folder.iterdir()} if folder.is_dir() else {"a file"}
    if not inside <= {CONFIG_FILE, WEIGHTS_FILE}:
        raise UserError(f"{folder}: holds something else than an SAE ({sorted(inside)[0]}); name a new folder")


def _extract(options: argparse.Namespace) -> int:
    from sae_research.config.params import check_params, load_params
    from sae_research.training.extraction import extract

    values = load_params().model_dump(mode="json")
    changes = {"tokens": options.tokens, "llm_dtype": options.dtype}
    values["train"] |= {key: value for key, value in changes.items() if value is not None}
    params = check_params(values, "the command's options")
    print(
        extract(
            params,
            options.hook or params.train.hooks,
            options.output,
            params.activation_caching.max_gb if options.max_gb is None else options.max_gb,
        )
    )
    return 0


def _pareto(options: argparse.Namespace) -> int:
    from sae_research.reporting.pareto import draw_pareto

    draw_pareto(options.folders, options.out, options.metric)
    print(options.out)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit code. Raises `UserError` for a verb that there is none of."""
    given = sys.argv[1:] if arguments is None else arguments
    whole, verbs = parser()
    if given and not given[0].startswith("-") and given[0] not in verbs:
        raise UserError(f"no verb {given[0]}{_instead(given[0], verbs)}")
    options = whole.parse_args(given)
    if "run" in options:
        return options.run(options)
    if options.verb == "check":
        return shapes.report(compare=True, unfinished=unfinished_stages)
    return run_pipeline(options.preset)


def parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The command's parser, and the names of its verbs."""
    parser = argparse.ArgumentParser(prog="sae-research", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    repro = verbs.add_parser(
        "repro",
        help="run the pipeline, then say what failed and what changed",
        description="Example: python -m sae_research repro --preset pythia-70m",
    )
    repro.add_argument("--preset", default="", help="a file of presets/, one -S override a line")
    verbs.add_parser("check", help="say what failed in the last run", description="Example: python -m sae_research check")
    add_verbs(verbs)
    results.add_verbs(verbs)
    experiments.add_verbs(verbs)
    add_analyze(verbs)
    plan.add_verb(verbs, read_preset)
    return parser, verbs.choices


def _instead(verb: str, verbs: Collection[str]) -> str:
    """What does the work of a verb that there is none of: a stage of the pipeline, what another tool's command is called
    here, or the nearest verb."""
    pipeline = PROJECT / "dvc.yaml"
    stages = re.findall(r"^  (\w+):$", pipeline.read_text(), re.MULTILINE) if pipeline.is_file() else []
    named = [stage for stage in (verb, f"{verb}_eval") if stage in stages]
    if named:
        return f"; it is a stage of the pipeline: dvc repro {named[0]}"
    return elsewhere(verb) or did_you_mean(verb, sorted(verbs))
