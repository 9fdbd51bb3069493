"""`python -m sae_research analyze VERB`: what each verb takes. What it does stands in `verbs.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

RESULTS = Path("analysis_results")
PROG = "python -m sae_research analyze"


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `analyze` with its own verbs; each sets `run`, a function of the parsed options that returns the exit
    code."""
    parser = verbs.add_parser(
        "analyze",
        help="see inside an SAE: statistics of latents, runs, steering, ablation, ...",
        description=f"Example: {PROG} stats --sae standard --help",
    )
    fill(parser)


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the verbs to a parser."""
    verbs = parser.add_subparsers(dest="analysis", required=True)
    for add in (_saes, _stats, _run, _generate, _steer, _ablate, _attribute, _subspace, _explain, _neuronpedia, _dashboard):
        add(verbs)


Verbs = argparse._SubParsersAction  # type: ignore[type-arg]


def _saes(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "saes",
        "list, search and describe SAEs: SAELens' releases and those of this project",
        "saes --search gemma",
        sae=False,
    )
    verb.add_argument("--search", metavar="TEXT", help="releases whose name, model or repository match (regular expression)")
    verb.add_argument(
        "--describe", metavar="RELEASE or SAE", help="every field of a release and of its SAEs, or everything about one SAE"
    )
    verb.add_argument("--local", action="store_true", help="only SAEs of this project")


def _stats(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "stats",
        "density, maxima, quantiles and contexts of every latent, in one pass that can be resumed",
        "stats --sae standard --tokens 65536",
        several=True,
    )
    verb.add_argument("--latent", type=int, nargs="+", default=[], help="show these latents' top contexts")


def _run(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "run",
        "a prompt with and without SAEs (several hooks at once), and search for latents",
        'run --sae standard --prompt "The capital of France is" --answer " Paris"',
        several=True,
    )
    verb.add_argument("--prompt")
    verb.add_argument("--answer", help="one token, leading space included")
    verb.add_argument("--top", type=int, default=5, help="latents shown of each token")
    verb.add_argument("--search-prompt", metavar="TEXT", help="latents that a text activates most")
    verb.add_argument(
        "--search-promoted",
        metavar="TOKEN",
        nargs="+",
        help="latents that raise these tokens most; with --prompt also by measured effect",
    )


def _generate(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "generate",
        "sampled texts of the model, with and without SAEs in it, from equal seeds",
        'generate --sae standard --prompt "The capital of France is" --temperature 0.7 --top-k 50 --seed 0',
        several=True,
        needed=False,
    )
    verb.add_argument("--prompt", required=True)
    verb.add_argument("--length", type=int, default=40, help="tokens of a text")
    verb.add_argument("--texts", type=int, default=4, help="of seeds in turn")
    verb.add_argument("--seed", type=int, default=0, help="of the first")
    verb.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    verb.add_argument("--top-k", type=int, help="the likeliest tokens that are drawn from (default: all)")
    verb.add_argument("--top-p", type=float, default=1.0, help="of these, those that make up so much of the probability")


def _steer(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "steer",
        "texts with a latent's direction added, held or emptied, over strengths with equal seeds",
        'steer --sae standard --prompt "I will see you on" --targets " Monday" " Friday" --strengths 0.5 1',
        needed=False,
    )
    verb.add_argument("--prompt", required=True)
    verb.add_argument("--latent", type=int, help="default: the one that measurably raises --targets most after the prompt")
    verb.add_argument("--method", default="add", help="add, clamp or project")
    verb.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0.5, 1.0, 2.0],
        help="in units of the latent's largest activation in the statistics",
    )
    verb.add_argument("--maximum", type=float, help="in place of that activation")
    verb.add_argument("--targets", nargs="+", metavar="TOKEN", help="tokens to count (default: the ten it promotes most)")
    verb.add_argument("--seeds", type=int, default=4, help="texts of each strength")
    verb.add_argument("--length", type=int, default=40, help="tokens of a text")
    verb.add_argument("--temperature", type=float, default=0.7)
    verb.add_argument("--top-p", type=float, default=0.9)
    verb.add_argument("--neutral-tokens", type=int, default=512, help="of text on which the cost is measured")
    verb.add_argument("--engine", choices=("local", "neuronpedia"), default="local")
    verb.add_argument("--source", metavar="MODEL/SOURCE", help="with --engine neuronpedia, e.g. gpt2-small/7-res-jb")
    verb.add_argument("--base-url", help="another Neuronpedia server")


def _ablate(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "ablate",
        "the answer without some latents, with and without the error term",
        'ablate --sae standard --prompt "The capital of France is" --answer " Paris"',
    )
    verb.add_argument("--prompt", required=True)
    verb.add_argument("--latents", type=int, nargs="+", help="default: the three whose removal lowers the answer most")
    verb.add_argument("--answer", help="one token, leading space included (default: the likeliest)")
    verb.add_argument("--positions", type=int, nargs="+", help="0 is the separator in front, -1 the last (default: all)")


def _attribute(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "attribute",
        "shares of latents, error and bias in a metric, checked against real ablations",
        'attribute --sae standard --prompt "The capital of France is" --answer " Paris" --against " London"',
        several=True,
    )
    verb.add_argument("--prompt", required=True)
    verb.add_argument("--answer", help="one token; the metric is its log-probability (default: the likeliest token's)")
    verb.add_argument("--against", help="one token; the metric is the difference of the two logits")
    verb.add_argument("--hooks", nargs="+", default=[], help="plain hook points to attribute to as well")
    verb.add_argument("--steps", type=int, default=0, help="of integrated gradients (default: the plain gradient)")
    verb.add_argument("--top", type=int, default=10, help="latents shown of each SAE")
    verb.add_argument("--check", type=int, default=30, metavar="N", help="latents really ablated; 0 checks nothing")


def _subspace(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "subspace",
        "principal components of what a set of latents reconstructs, grouped by token",
        "subspace --sae standard --latents 12 99 340 512 --groups Monday Tuesday Wednesday",
    )
    verb.add_argument("--latents", type=int, nargs="+", required=True)
    verb.add_argument("--groups", nargs="+", metavar="WORD", help="words that are groups (default: every token's text)")
    verb.add_argument("--components", type=int, default=3)


def _explain(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "explain",
        "what latents fire on, without labels, scored by predicting held-out firing",
        "explain --sae standard --latents 17 230",
    )
    verb.add_argument("--latents", type=int, nargs="+", help="default: all")
    verb.add_argument("--top", type=int, default=20, help="latents shown, best predicted first")


def _neuronpedia(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "neuronpedia",
        "search explanations at Neuronpedia, and addresses of its pages and lists of latents",
        'neuronpedia --source gpt2-small/7-res-jb --search "days of the week"',
        sae=False,
    )
    verb.add_argument("--source", metavar="MODEL/SOURCE", help="as `saes --describe RELEASE` lists them")
    verb.add_argument("--sae", metavar="sae_lens:RELEASE:ID", help="in place of --source")
    verb.add_argument("--search", metavar="TEXT", help="latents whose explanations come nearest")
    verb.add_argument("--whole-model", action="store_true", help="of every source of the model")
    verb.add_argument("--limit", type=int, default=20, help="results of a search")
    verb.add_argument("--latents", type=int, nargs="+", default=[], help="their pages, and the list of them")
    verb.add_argument("--base-url", help="another Neuronpedia server to search")


def _dashboard(verbs: Verbs) -> None:
    verb = _verb(
        verbs,
        "dashboard",
        "a site to browse latents with, opened from disk: no server, no network",
        "dashboard --sae standard topk --compare standard topk",
        several=True,
    )
    verb.add_argument("--compare", nargs=2, metavar="SAE", action="append", default=[], help="two of them side by side")
    verb.add_argument("--other-model", metavar="MODEL", help="every SAE on this model too, beside itself")
    verb.add_argument("--neuronpedia", action="store_true", help="write Neuronpedia's JSON too")


def _verb(
    verbs: Verbs, name: str, help_line: str, example: str, sae: bool = True, several: bool = False, needed: bool = True
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(
        name,
        help=help_line,
        description=f"{help_line[0].upper()}{help_line[1:]}. Example: {PROG} {example.replace('%', '%%')}",
    )
    if sae:
        verb.add_argument(
            "--sae",
            nargs="+" if several else None,
            required=needed,
            action="extend" if several else "store",
            help="a folder, a name in downloaded_saes/ or trained_saes/, or sae_lens:RELEASE:ID"
            + ("; several may be given" if several else ""),
        )
        verb.add_argument("--model", help="in place of model.name in params.yaml")
        verb.add_argument("--tokens", type=int, help="of text the statistics are from, in place of analysis.tokens")
        verb.add_argument("--out", type=Path, default=RESULTS / name, help=f"folder of results (default {RESULTS / name})")
    verb.set_defaults(run=_runner(name))
    return verb


def _runner(name: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        from sae_research.cli import analyze_edits, analyze_verbs  # torch takes seconds to import

        own = getattr(analyze_edits, name, None)  # which may be a module of that name
        (own if callable(own) else getattr(analyze_verbs, name))(options)
        return 0

    return run
