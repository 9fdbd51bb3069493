"""RAVEL (arXiv 2402.17700): do single latents carry single attributes of an entity?

Two prompts ask about two entities that differ in an attribute ("The city of Paris is located in the country of"). A
mask over latents is learnt such that giving the base's last entity token the source's values of those latents makes
the model answer with the source's attribute (cause), while other attributes stay (isolation). Disentanglement is
the mean of both, over attributes and entity classes. A mask that changes nothing has 0.5.

SAE Bench 0.6.0's definition puts the reconstruction alone in place of the token and splits pairs at random. Ours
(`lab_v1`) keeps what the SAE leaves unexplained, learns on some entities and scores on others, compares whole words,
gives intervals, and reports beside it what patching the whole activation does: what this token carries of the entity at this
hook. Results are SAE Bench's `RAVELEvalOutput`.

Some of SAE Bench's code is not followed: it runs only with Gemma 2 and GPT-NeoX under transformers 4, always at a layer's
output whatever the SAE's hook, patches the token after the entity where the tokenizer adds no BOS, and shows encoders the
one token alone. Here the SAE's own hook, the entity's own last token, and whole prompts are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import Group, by_hook, made_once, model_key
from sae_research.evals.ravel.pairs import Pair, Task, build_tasks, seems_isolation
from sae_research.evals.ravel.patches import Problem, PromptActivations, Swap, learn
from sae_research.evals.ravel.prompts import Known, known_prompts, right, right_sae_bench
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.stats.intervals import Ratio, interval, ratio, stored


def ravel_result(
    name: str,
    info: SAEInfo,
    known: Sequence[Known],
    tasks: Sequence[Task],
    findings: Mapping[str, Any],
    whole: Mapping[str, Sequence[str]],
    params: Params,
    lm: LanguageModel,
) -> dict[str, Any]:
    """A validated `RAVELEvalOutput` as plain data. findings: task -> definition -> latents and answers; whole: task ->
    answers when the whole activation is patched."""
    bench = {
        task.name: sae_bench_scores(known, task.sae_bench.test, findings[task.name]["sae_bench"]["answers"])
        for task in tasks
    }
    by_class = {
        f"{kind}_results": {
            task.name: _sae_bench_names(bench[task.name], "disentangle_score") for task in tasks if task.entity_class == kind
        }
        for kind in dict.fromkeys(task.entity_class for task in tasks)
    }
    return harness.output(
        "ravel",
        name,
        info,
        config=_config(lm, params),
        metrics={"ravel": _sae_bench_names(mean_scores(bench, tasks), "disentanglement_score")},
        unstructured={**by_class, harness.LAB: _lab(known, tasks, findings, whole, params.random_seed)},
        sae_bench="ravel:RAVELEvalOutput",
    )


def _config(lm: LanguageModel, params: Params) -> dict[str, Any]:
    config = params.ravel
    return {
        "entity_attribute_selection": config.entity_attribute_selection,
        "top_n_entities": config.top_n_entities,
        "full_dataset_downsample": config.full_dataset_downsample,
        "random_seed": params.random_seed,
        "num_pairs_per_attribute": config.num_pairs_per_attribute,
        "train_test_split": config.train_test_split,
        "model_name": lm.name,
        "llm_dtype": params.model.torch_dtype,
        "llm_batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "num_epochs": config.num_epochs,
        "n_generated_tokens": config.n_generated_tokens,
    }


def _lab(
    known: Sequence[Known], tasks: Sequence[Task], findings: Mapping[str, Any], whole: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Any]:
    found = Outcomes(known, tasks, {task.name: findings[task.name][harness.LAB]["answers"] for task in tasks})
    scores, most = found.scores(), Outcomes(known, tasks, whole).scores()
    latents = {task.name: findings[task.name][harness.LAB]["latents"] for task in tasks}
    return {
        "metrics": {
            **_names(mean_scores(scores, tasks)),
            "mask_latents": sum(latents.values()) / len(latents),
            **{f"whole_activation_{key}": value for key, value in _names(mean_scores(most, tasks)).items()},
        },
        **found.evidence(seed),
        "attributes": {
            task.name: {
                **_names(scores[task.name]),
                "intervals": bounds(found.figures(task), seed),
                "mask_latents": latents[task.name],
                "train_pairs": len(task.lab.train),
                "test_pairs": len(task.lab.test),
                **{f"whole_activation_{key}": value for key, value in _names(most[task.name]).items()},
            }
            for task in tasks
        },
    }


def _names(scores: Scores) -> dict[str, float]:
    return {"disentanglement": scores.disentanglement, "cause": scores.cause, "isolation": scores.isolation}


def _sae_bench_names(scores: Scores, mean: str) -> dict[str, float]:
    return {"cause_score": scores.cause, "isolation_score": scores.isolation, mean: scores.disentanglement}


KINDS = ("cause", "isolation")
CLUSTERS = "entities"


class Scores(NamedTuple):
    """Fractions of pairs."""

    cause: float
    """Of cause pairs: the patched model says the source's value."""
    isolation: float
    """Of isolation pairs: it still says the base's value."""

    @property
    def disentanglement(self) -> float:
        return (self.cause + self.isolation) / 2


def sae_bench_scores(known: Sequence[Known], pairs: Sequence[Pair], answers: Sequence[str]) -> Scores:
    """SAE Bench's, its way of telling the kinds of pairs and of comparing answers included."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for pair, answer in zip(pairs, answers, strict=True):
        hit = right_sae_bench(known[pair.base].prompt.text, known[pair.target].prompt.label, answer)
        hits[not seems_isolation(known, pair)].append(hit)
    return Scores(*(sum(hits[kind]) / len(hits[kind]) for kind in (True, False)))


def mean_scores(by_task: Mapping[str, Scores], tasks: Sequence[Task]) -> Scores:
    """The mean over a class's attributes, then over classes, as in SAE Bench."""
    classes = dict.fromkeys(task.entity_class for task in tasks)
    means = [np.mean([by_task[task.name] for task in tasks if task.entity_class == name], axis=0) for name in classes]
    return Scores(*(float(x) for x in np.mean(means, axis=0)))


class Outcomes:
    """Right answers to the held-out pairs, by task, kind and base entity: an entity's pairs vary together."""

    def __init__(self, known: Sequence[Known], tasks: Sequence[Task], answers: Mapping[str, Sequence[str]]) -> None:
        self.tasks = tasks
        self.entities = sorted({_base(known, pair) for task in tasks for pair in task.lab.test})
        """(class, entity) of every column."""
        classes = sorted({entity_class for entity_class, _ in self.entities})
        self.strata = [classes.index(entity_class) for entity_class, _ in self.entities]
        column = {entity: i for i, entity in enumerate(self.entities)}
        self.right, self.pairs = (np.zeros((len(tasks), len(KINDS), len(column))) for _ in range(2))
        for row, task in enumerate(tasks):
            for pair, answer in zip(task.lab.test, answers[task.name], strict=True):
                where = row, int(not pair.cause), column[_base(known, pair)]
                self.right[where] += right(known[pair.target].prompt.label, answer)
                self.pairs[where] += 1
        self.key = fingerprint(
            [[task.name, [[known[row].prompt.text for row in pair[:2]] for pair in task.lab.test]] for task in tasks]
        )[:16]

    def scores(self) -> dict[str, Scores]:
        """By task."""
        shares = self.right.sum(-1) / self.pairs.sum(-1)
        return {task.name: Scores(*map(float, shares[row])) for row, task in enumerate(self.tasks)}

    def figures(self, only: Task | None = None) -> dict[str, Ratio]:
        """Cause, isolation and disentanglement of all tasks (`mean_scores`), or of one, as ratios of sums over entities.

        A mean of fractions is a ratio of sums once every pair weighs one over the pairs of its task and kind.
        """
        sizes: dict[str, int] = {}
        for task in self.tasks:
            sizes[task.entity_class] = sizes.get(task.entity_class, 0) + 1
        share = [float(only is None or task is only) / sizes[task.entity_class] for task in self.tasks]
        weight = np.asarray(share)[:, None, None] / self.pairs.sum(-1, keepdims=True)
        parts = {"cause": slice(0, 1), "isolation": slice(1, 2), "disentanglement": slice(0, 2)}
        return {
            key: Ratio(
                (weight * self.right)[:, kinds].sum((0, 1)),
                (weight * self.pairs)[:, kinds].sum((0, 1)),
                np.asarray(self.strata),
            )
            for key, kinds in parts.items()
        }

    def evidence(self, seed: int) -> dict[str, Any]:
        """What `lab_v1` holds on how sure its metrics are: intervals, and the sums by entity behind them."""
        figures = self.figures()
        return {
            "intervals": bounds(figures, seed),
            "clusters": {
                CLUSTERS: {"level": "entity", "clusters": len(self.entities), "strata": self.strata, "key": self.key}
            },
            "cluster_sums": {key: stored(figure, CLUSTERS) for key, figure in figures.items()},
        }


def bounds(figures: Mapping[str, Ratio], seed: int) -> dict[str, list[float]]:
    """Intervals of those metrics that rest on enough entities."""
    # entities without a pair of some kind say nothing of it, and are not drawn
    found = {key: interval(ratio(one.numerator, one.denominator, one.strata), seed) for key, one in figures.items()}
    return {key: list(limits) for key, limits in found.items() if limits is not None}


def _base(known: Sequence[Known], pair: Pair) -> tuple[str, str]:
    prompt = known[pair.base].prompt
    return prompt.entity_class, prompt.entity


# one SAE's findings: task -> definition -> {"latents": how many the mask takes, "answers": to every test pair}
Findings = dict[str, dict[str, dict[str, Any]]]


def evaluate(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `RAVELEvalOutput` in plain data.

    Attributes that the model does not know and SAEs that fail are skipped with their reason. Raises `NotApplicable`
    when too few attributes are left, `UserError` for prompts that cannot be read.
    """
    facts, guard = known_prompts(lm, params, stage), Guard(stage.skip)
    stage.notes["pairs_per_attribute"] = f"{params.ravel.num_pairs_per_attribute} of either kind (SAE Bench: 5000)"
    asked = False
    for members in by_hook(saes):
        group = PromptActivations(lm, members.hook, facts, params)
        tasks = build_tasks(facts, group.usable, params, stage)
        if not tasks:
            stage.skip(
                members.hook,
                f"no attribute has pairs enough; {len(group.usable)} of {len(facts)} prompts have an entity "
                "token that counts (token_mask)",
            )
            continue
        whole = _whole_activation(group, tasks, params)
        asked = True
        for name, findings in _findings(members, group, tasks, params, guard).items():
            with guard.on(name):
                yield name, ravel_result(name, members.infos[name], facts, tasks, findings, whole, params, lm)
    if not asked:
        raise NotApplicable("; ".join(f"{what}: {why}" for what, why in stage.skipped.items()))


def _findings(
    members: Group, group: PromptActivations, tasks: list[Task], params: Params, guard: Guard
) -> dict[str, Findings]:
    """Of every SAE at a hook that can be scored."""

    def score(family: Family) -> Iterator[tuple[str, Findings]]:
        latents = group.entity_latents(family)
        for name, sae in family.items():
            with guard.on(name):
                yield name, findings_of(Swap(sae, latents.pop(name), group), tasks, params)

    keys = members.keys(group.lm, _inputs(group.known, params), __name__)
    scores = harness.Scores("ravel", members, keys, guard)
    with scores.progress("masks") as bar:
        scores.fill(score, bar)
    return scores.left()


def findings_of(
    swap: Swap, tasks: Sequence[Task], params: Params, definitions: Sequence[str] = ("sae_bench", harness.LAB)
) -> Findings:
    """Learn one SAE's masks of every task in both definitions, and ask the patched model."""
    asked = [(task, definition) for task in tasks for definition in definitions]
    plans = [task.lab if definition == harness.LAB else task.sae_bench for task, definition in asked]
    problems = [Problem(plan.train, definition == harness.LAB) for plan, (_, definition) in zip(plans, asked, strict=True)]
    findings: Findings = {task.name: {} for task in tasks}
    masks = [numbers > 0 for numbers in learn(problems, swap, params)]
    patches = [partial(_mix, swap, taken, problem.keeps_error) for taken, problem in zip(masks, problems, strict=True)]
    answers = _ask(swap.group, [(plan.test, patch) for plan, patch in zip(plans, patches, strict=True)], params)
    for (task, definition), taken, answer in zip(asked, masks, answers, strict=True):
        findings[task.name][definition] = {"latents": int(taken.sum()), "answers": answer}
    return findings


@torch.no_grad()
def _mix(swap: Swap, taken: Tensor, keeps_error: bool, part: Sequence[Pair]) -> Tensor:
    mask = taken.float().expand(len(part), -1)
    return swap.patched(part, mask, torch.full((len(part),), keeps_error, device=mask.device))


def _whole_activation(group: PromptActivations, tasks: list[Task], params: Params) -> dict[str, list[str]]:
    """Answers to every task's held-out pairs when the source's whole activation is put in; kept in the cache."""
    key = model_key(group.lm, ["whole", group.hook, _inputs(group.known, params)], __name__)

    def answered() -> dict[str, list[str]]:
        asked = [(task.lab.test, lambda part: group.entity[[pair.source for pair in part]]) for task in tasks]
        return {task.name: answers for task, answers in zip(tasks, _ask(group, asked, params), strict=True)}

    return made_once("ravel", key, answered)


def _ask(
    group: PromptActivations,
    asked: Sequence[tuple[list[Pair], Callable[[Sequence[Pair]], Tensor]]],
    params: Params,
) -> list[list[str]]:
    """Answers to every pair's base, patched, of each list of pairs. All are asked together, because one pass over many rows
    is faster than many over few; patches are made a part at a time, for latents of many pairs are large."""
    size = params.model.llm_batch_size
    parts = [patch(pairs[start : start + size]) for pairs, patch in asked for start in range(0, len(pairs), size)]
    answers = iter(group.answers([pair for pairs, _ in asked for pair in pairs], torch.cat(parts)))
    return [list(islice(answers, len(pairs))) for pairs, _ in asked]


def _inputs(facts: Sequence[Known], params: Params) -> list[Any]:
    return [
        params.ravel.model_dump(),
        params.token_mask.model_dump(),
        params.random_seed,
        fingerprint([[one.first, *one.prompt] for one in facts]),
    ]
