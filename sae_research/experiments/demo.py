"""What dictionary_learning's demo does, in one command: six sparsities of each recipe at each layer, on one stream.

    python -m scripts.demo --save_dir saes --layers 8 --architectures standard top_k batch_top_k

One pass of the language model feeds every SAE of every layer. The folder then holds each SAE with its curve and
`eval_results.json`, `training_report.json`, and `pareto.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.config.params import Params, check_params, load_params
from sae_research.runtime.endpoints import secret
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json
from sae_research.runtime.formatting import number, text_table
from sae_research.saes.exchange import TOKEN_NAMES, upload

PICTURE = "pareto.png"
TOKENS = 60_000
WIDTH = 2304
SNAPSHOTS = 7
"""Moments kept with --save_checkpoints: the start, 0.1 %, 0.3 %, 1 %, 3 %, 10 % and 32 % of the run."""


class Ladder(NamedTuple):
    """Six sparsities of one recipe."""

    recipe: str
    key: str
    values: tuple[float, ...]


_L1 = (0.012, 0.015, 0.02, 0.03, 0.04, 0.06)
_L0 = (20, 40, 80, 160, 320, 640)
LADDERS = {
    "standard": Ladder("standard", "l1_coefficient", _L1),
    "standard_new": Ladder("standard_new", "l1_coefficient", _L1),
    "jump_relu": Ladder("jump_relu", "target_l0", _L0),
    "top_k": Ladder("top_k", "k", _L0),
    "batch_top_k": Ladder("batch_top_k", "k", _L0),
    "gated": Ladder("gated_rajamanoharan", "l1_coefficient", (0.012, 0.018, 0.024, 0.04, 0.06, 0.08)),
    "p_anneal": Ladder("p_anneal", "l1_coefficient", (0.006, 0.008, 0.01, 0.015, 0.02, 0.025)),
    "matryoshka_batch_top_k": Ladder("matryoshka_batch_top_k", "k", _L0),
    "relu": Ladder("relu", "l1_coefficient", _L1),
    "hard_concrete": Ladder("hard_concrete", "l0_coefficient", (0.00012, 0.0002, 0.0004, 0.0006, 0.0012, 0.0024)),
    "gated_hard_concrete": Ladder("gated_hard_concrete", "l0_coefficient", (0.0005, 0.0008, 0.0015, 0.003, 0.006, 0.01)),
    "matching_pursuit": Ladder("matching_pursuit", "s", (10, 20, 40, 80, 160, 320)),
}
"""By name on the command line. The first eight are dictionary_learning's, with the sparsities of its demo and of SAE
Bench's suite; `gated` means theirs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    options = _parser().parse_args(arguments)
    params = demo_params(options, load_params() if Path("params.yaml").is_file() else Params())
    print(plan(params), flush=True)
    if options.dry_run:
        return 0
    folder: Path = options.save_dir
    _check(folder, options.hf_repo_id)
    from sae_research.training.stage import train

    train(params, folder)
    from sae_research.reporting.pareto import draw_pareto

    draw_pareto([str(folder)], folder / PICTURE, "loss_recovered" if params.train.evaluate_tokens else "variance_explained")
    print(results_table(folder))
    print(folder / PICTURE)
    if options.hf_repo_id:
        print(upload([folder], options.hf_repo_id))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--save_dir", type=Path, required=True, help="written whole at the end; an earlier demo there is replaced")
    add("--model_name", help="packaged, a hub name or a folder; default: params.yaml's")
    add("--layers", type=int, nargs="+", default=[8], help="SAEs read the residual stream after these")
    add(
        "--architectures",
        nargs="+",
        choices=list(LADDERS),
        default=["standard", "top_k"],
        metavar="NAME",
        help=", ".join(LADDERS),
    )
    add("--device", help="auto, cpu, cuda:0, mps")
    add("--use_wandb", action="store_true", help="curves to Weights & Biases too; the key from WANDB_API_KEY or .env")
    add("--wandb_project", default="sae_research_demo")
    add("--dry_run", action="store_true", help="say what would be trained")
    add("--save_checkpoints", action="store_true", help=f"keep {SNAPSHOTS} moments of each SAE, spaced logarithmically")
    add("--hf_repo_id", metavar="ORG/NAME", help="send the folder to this hub repository; the token from HF_TOKEN")
    add("--tokens", type=int, default=TOKENS, help=f"read by the model (default {TOKENS:,}; SAE Bench: 500,000,000)")
    add("--widths", type=int, nargs="+", default=[WIDTH], help=f"latents (default {WIDTH}; SAE Bench: 4096 16384 65536)")
    add("--learning_rate", type=float, help="of every SAE (SAE Bench: 0.0003, for runs of some 10^5 steps)")
    add("--batch_size", type=int, help="activations per step (SAE Bench: 2048)")
    add("--seeds", type=int, nargs="+", help="of the SAEs; default: params.yaml's random_seed alone")
    add("--text", help="packaged, a folder or a hub data set; default: params.yaml's")
    add("--context_size", type=int, help="tokens per context (SAE Bench: 1024)")
    return parser


def demo_params(options: argparse.Namespace, base: Params) -> Params:
    """The base parameters with the demo's SAEs. Raises `UserError` naming what is impossible."""
    values = base.model_dump()

    def put(section: str, **given: Any) -> None:
        values[section] |= {key: value for key, value in given.items() if value is not None}

    put("model", name=options.model_name, device=options.device)
    put("text", dataset=options.text, context_size=options.context_size)
    put(
        "train",
        enabled=True,
        tokens=options.tokens,
        batch_size=options.batch_size,
        saved_checkpoints=SNAPSHOTS if options.save_checkpoints else None,
    )
    if options.use_wandb:
        put("tracking", project=options.wandb_project)
    values["train"]["hook_name"] = _hook(options.layers[0])
    values["train"]["saes"] = demo_saes(
        options.architectures, options.layers, options.widths, options.seeds, options.learning_rate
    )
    return check_params(values, "demo")


def demo_saes(
    architectures: Sequence[str],
    layers: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int] | None,
    learning_rate: float | None,
) -> dict[str, dict[str, Any]]:
    """`train.saes` of the demo: every layer, architecture, width, seed and sparsity that the width allows."""
    saes: dict[str, dict[str, Any]] = {}
    for layer, name, width, seed in product(layers, architectures, widths, seeds or [None]):
        ladder = LADDERS[name]
        for value in ladder.values:
            if ladder.key in ("k", "target_l0", "s") and value > width:
                continue
            parts = [
                f"layer_{layer}",
                name,
                *([f"w{width}"] if len(widths) > 1 else []),
                *([f"seed{seed}"] if seed is not None and len(seeds or []) > 1 else []),
                _short(ladder.key, value),
            ]
            saes["_".join(parts)] = {
                "recipe": ladder.recipe,
                "d_sae": width,
                "hook_name": _hook(layer),
                ladder.key: value,
                **({} if seed is None else {"seed": seed}),
                **({} if learning_rate is None else {"learning_rate": learning_rate}),
            }
    if not saes:
        raise UserError(f"--widths {' '.join(map(str, widths))}: too narrow for any of the sparsities")
    return saes


def _hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


def _short(key: str, value: float) -> str:
    """`l1_coefficient`, 0.012 -> `l1_0p012`; `k`, 20 -> `k20`."""
    if key in ("k", "s"):
        return f"{key}{value:g}"
    return f"{key.removesuffix('_coefficient').removeprefix('target_')}_{value:g}".replace(".", "p").replace("-", "m")


def plan(params: Params) -> str:
    """What a run will train, one line a recipe and layer."""
    train = params.train
    groups: dict[tuple[str, str], list[str]] = {}
    for name, config in train.saes.items():
        groups.setdefault((train.hook_of(name), config.recipe), []).append(name)
    lines = [
        f"{len(train.saes)} SAEs on {params.model.name}, {train.tokens:,} tokens of {params.text.dataset}, "
        f"steps of {train.batch_size:,}, one pass of the model"
    ]
    for (hook, recipe), names in groups.items():
        shared = f"layer_{hook.split('.')[1]}_"
        lines.append(f"  {hook} {recipe}: {', '.join(name.removeprefix(shared) for name in names)}")
    return "\n".join(lines)


def results_table(folder: Path) -> str:
    """Every SAE's `eval_results.json` as a line."""
    rows = [(path.parent.name, read_json(path)) for path in sorted(folder.glob("*/eval_results.json"))]
    columns = {"l0": "L0", "variance_explained": "VE", "loss_recovered": "recovered", "fraction_alive": "alive"}
    body = [[name, *(number(values.get(key)) for key in columns)] for name, values in rows]
    return "\n" + text_table([("SAE", *columns.values()), *body])


def _check(folder: Path, repo_id: str | None) -> None:
    """What would only fail at the end is said now; no folder but a demo's own is replaced."""
    if (
        folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
        and not (folder / "training_report.json").is_file()
    ):
        raise UserError(f"--save_dir {folder}: holds something else; name a new folder")
    if repo_id and secret(*TOKEN_NAMES) is None:
        raise UserError(f"--hf_repo_id needs a token with write access: set {TOKEN_NAMES[0]} in the environment or in .env")
