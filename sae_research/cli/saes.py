"""The verbs that move trained SAEs about: export, import, upload, pareto."""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_research.runtime.files import user_path


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verbs; each sets `run`, a function of the parsed options that returns the exit code."""
    export = verbs.add_parser(
        "export",
        help="write SAEs for dictionary_learning and SAE Bench, or for SAELens",
        description="Example: python -m sae_research export trained_saes exported --format dictionary_learning",
    )
    export.add_argument("source", type=user_path, help="a folder with an SAE, or with folders of SAEs")
    export.add_argument("output", type=user_path)
    export.add_argument("--format", default="dictionary_learning", help="dictionary_learning or sae_lens")
    export.add_argument("--dict_class", help="a class of dictionary_learning other than the usual one (docs/training.md)")
    export.set_defaults(run=_export)

    bring_in = verbs.add_parser(
        "import",
        help="read SAEs of dictionary_learning, SAELens or SAE-Interpretability",
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


# torch and matplotlib take seconds to import: each verb its own


def _export(options: argparse.Namespace) -> int:
    from sae_research.saes.formats.exchange import export_saes

    export_saes(options.source, options.output, options.format, options.dict_class)
    return 0


def _import(options: argparse.Namespace) -> int:
    from sae_research.saes.formats.exchange import import_saes

    import_saes(options.source, options.output)
    return 0


def _upload(options: argparse.Namespace) -> int:
    from sae_research.saes.hub import upload

    print(upload(options.folders, options.hf_repo_id, private=options.private))
    return 0


def _pareto(options: argparse.Namespace) -> int:
    from sae_research.reporting.pareto import draw_pareto

    draw_pareto(options.folders, options.out, options.metric)
    print(options.out)
    return 0
