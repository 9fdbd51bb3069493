"""The verbs run, sweep, monitor and apply, and what their flags mean."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sae_research.runtime.errors import UserError


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verbs; each sets `run`, a function of the parsed options that returns the exit code."""
    _run_parser(verbs)
    _sweep_parser(verbs)
    _monitor_parser(verbs)
    _release_parser(verbs)
    parser = verbs.add_parser(
        "apply",
        help="bring an experiment's parameters, figures and SAEs into the workspace",
        description="Example: python -m sae_research apply sweep-1a2b3c4d",
    )
    parser.add_argument("name", help="as dvc exp show and the sweep list it")
    parser.set_defaults(run=_apply)


def _run_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "run",
        help="train SAEs from one file, SAE-Interpretability's or overrides of params.yaml",
        description="Example: python -m scripts.run --config_path configs/tinystories/relu.yaml --model "
        "smollm2-135m-instruct --text packaged --tokens 240000 --device cpu saes.sparsity_coeff=3",
    )
    parser.add_argument("--config_path", type=Path, required=True)
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1 or mps, in place of model.device")
    parser.add_argument("--wandb_project", help="in place of the file's; null switches Weights & Biases off")
    parser.add_argument("--output_dir", help="folder of run folders (the file's save_dir, else output)")
    parser.add_argument("--dry_run", action="store_true", help="say how the file is understood, and stop")
    _add_changes(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings in the file's own spelling")
    parser.set_defaults(run=_run)


def _add_changes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("in place of what an SAE-Interpretability file names")
    group.add_argument("--model", help="a packaged model, hub name or folder")
    group.add_argument("--text", help="packaged, a hub data set or a folder")
    group.add_argument("--tokens", type=int, help="length of the run; it keeps its number of steps")


def _sweep_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "sweep",
        help="train and evaluate every point of a grid, as DVC experiments over the devices there are",
        description="Example: python -m scripts.run_experiments --sweep_config sweep.yaml --devices auto --dry_run",
    )
    parser.add_argument("--base_config", type=Path, help="what all points share; without one, params.yaml itself")
    parser.add_argument("--sweep_config", type=Path, help="keys with lists of values")
    parser.add_argument("--devices", default="auto", help="auto, or cuda:0,cuda:1,mps,cpu; a name twice is two workers")
    parser.add_argument("--limit", type=int, help="no more than the first so many points (goes before max_experiments)")
    parser.add_argument("--stages", default="core", help="evaluations beside training, with commas (core)")
    parser.add_argument("--saes_per_run", type=int, default=32, help="SAEs that one pass of the model serves at most (32)")
    parser.add_argument("--sequential", action="store_true", help="one job after the other on the first device, logs shown")
    parser.add_argument("--dry_run", action="store_true", help="say what would run, and stop")
    parser.add_argument("--show_devices", action="store_true", help="list the devices of this machine")
    parser.add_argument("--no_tmux", action="store_true", help="accepted; there is no tmux to turn off")
    parser.add_argument("--name", help="of the sweep, and how its experiments' names begin (the sweep file's)")
    parser.add_argument("--output_dir", type=Path, help="also write each job's parameters and results.csv here")
    parser.add_argument("--wandb_sweep", type=Path, metavar="FILE", help="write a Weights & Biases sweep file, and stop")
    parser.add_argument("--wandb_project", help="the project that file names")
    _add_changes(parser)
    parser.set_defaults(run=_sweep)


def _monitor_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "monitor",
        help="what runs and sweeps are doing; follow or end one",
        description="Example: python -m scripts.monitor_experiments --watch",
    )
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    parser.add_argument("--attach", nargs="?", const="", metavar="NAME", help="follow a job's log; the only one if unnamed")
    parser.add_argument(
        "--kill", nargs="?", const="", metavar="NAME", help="end a job or run of ours; all: every one and the sweep itself"
    )
    parser.set_defaults(run=_monitor)


# --- what they do: torch and dvc take seconds to import, each verb its own -----------------------


def _changes(options: argparse.Namespace):  # noqa: ANN202
    from sae_research.experiments.sae_interpretability import Changes

    if options.tokens is not None and options.tokens < 1:
        raise UserError("--tokens must be above 0")
    return Changes(options.model, options.text, options.tokens)


def _release_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser(
        "evaluate-release",
        help="score every dictionary of a release of SAELens' directory, into one leaderboard",
        description="Example: python -m sae_research evaluate-release gpt2-small-res-jb --match 'blocks.[4-8]' "
        "--evaluations core,sparse_probing. What is finished is not done again.",
    )
    parser.add_argument("release", help="as in SAELens' directory (`analyze saes --search TEXT` lists them)")
    parser.add_argument("--match", metavar="REGEX", help="only ids in which this is found")
    parser.add_argument("--evaluations", default="core", help="with commas (core)")
    parser.add_argument("--output_dir", type=Path, help="where results and leaderboard go (releases/RELEASE)")
    parser.add_argument("--published", metavar="PLACE", help="SAE Bench's result files beside: a folder, or a hub data set")
    parser.add_argument("--discard", action="store_true", help="remove weights once scored; the hub's own cache keeps them")
    parser.add_argument("--list", action="store_true", help="only list the ids")
    parser.add_argument(
        "-S", "--set-param", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="of params.yaml"
    )
    parser.set_defaults(run=_release)


def _release(options: argparse.Namespace) -> int:
    from sae_research.experiments.release import evaluate_release

    return evaluate_release(options)


def _run(options: argparse.Namespace) -> int:
    from sae_research.experiments.config_files import parse_overrides
    from sae_research.experiments.single import run_one

    overrides = parse_overrides(options.overrides)
    if options.wandb_project is not None:
        overrides["wandb_project"] = None if options.wandb_project in ("null", "none", "") else options.wandb_project
    return run_one(options.config_path, overrides, _changes(options), options.device, options.output_dir, options.dry_run)


def _sweep(options: argparse.Namespace) -> int:
    if options.show_devices:
        _show_devices()
        if options.sweep_config is None:
            return 0
    if options.sweep_config is None:
        raise UserError("--sweep_config: name the file with the values to sweep (--show_devices alone needs none)")
    if options.no_tmux:
        print("note: --no_tmux: there is no tmux to turn off; python -m scripts.monitor_experiments shows and follows jobs")
    from sae_research.experiments.sweep import carry_out

    return carry_out(options, _changes(options))


def _show_devices() -> None:
    from sae_research.experiments.devices import Slot, available, holder

    for device, description in available():
        busy = holder(Slot(device, 0))
        print(f"{device:8s} {description}{f', busy: {busy}' if busy else ''}")


def _monitor(options: argparse.Namespace) -> int:
    from sae_research.experiments import monitor

    if options.kill is not None:
        return monitor.kill(options.kill)
    if options.attach is not None:
        return monitor.attach(options.attach)
    return monitor.show(options.watch)


def _apply(options: argparse.Namespace) -> int:
    from sae_research.experiments.history import apply_experiment
    from sae_research.runtime.files import project_root
    from sae_research.runtime.workspace import prepare

    root = project_root()
    for line in prepare(root):
        print(line)
    missing = apply_experiment(root, options.name)
    print(f"applied {options.name}: its params.yaml, figures and outputs are in the workspace")
    if missing:
        print(f"not in this project's cache: {', '.join(missing)}; `make repro` computes them")
    return 0


def main(verb: str, arguments: list[str] | None = None) -> int:
    """One verb as a command of its own, for the scripts."""
    parser = argparse.ArgumentParser(prog="python -m sae_research")
    add_verbs(parser.add_subparsers(dest="verb", required=True))
    options = parser.parse_args([verb, *(sys.argv[1:] if arguments is None else arguments)])
    return options.run(options)
