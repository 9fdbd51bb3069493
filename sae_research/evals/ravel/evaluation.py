"""RAVEL: do single latents carry single attributes of an entity?

Two prompts ask about two entities that differ in an attribute ("The city of Paris is located in the country of"). A
mask over latents is learnt such that giving the base's last entity token the source's values of those latents makes
the model answer with the source's attribute (cause), while other attributes stay (isolation). Disentanglement is
the mean of both, over attributes and entity classes. A mask that changes nothing has 0.5.

SAE Bench 0.6.0's definition puts the reconstruction alone in place of the token and splits pairs at random. Ours
(`lab_v1`) keeps what the SAE leaves unexplained, learns on some entities and scores on others, compares whole words,
and reports beside it what patching the whole activation does: what this token carries of the entity at this hook.

Where SAE Bench's code is no guide: it runs only with Gemma 2 and GPT-NeoX under transformers 4, always at a layer's output
whatever the SAE's hook, patches the token after the entity where the tokenizer adds no BOS, and shows encoders the one
token alone. Here the SAE's own hook, the entity's own last token, and whole prompts are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import NotApplicable
from sae_research.evals import output
from sae_research.evals.inputs import by_hook, model_key, result_key
from sae_research.evals.ravel.known import Known, known_prompts
from sae_research.evals.ravel.masks import Problem, learn
from sae_research.evals.ravel.pairs import Pair, Task, build_tasks
from sae_research.evals.ravel.patches import PromptActivations, Swap
from sae_research.evals.ravel.result import ravel_result
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.saes.guard import Family, Guard
from sae_research.store import fingerprint
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder

# one SAE's findings: task -> definition -> {"latents": how many the mask takes, "answers": to every test pair}
Findings = dict[str, dict[str, dict[str, Any]]]


def evaluate(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `RAVELEvalOutput` in plain data.

    Attributes that the model does not know and SAEs that fail are skipped with their reason. Raises `NotApplicable`
    when too few attributes are left, `UserError` for prompts that cannot be read.
    """
    facts, guard = known_prompts(lm, params, stage), Guard(stage.skip)
    stage.notes["pairs_per_attribute"] = f"{params.ravel.num_pairs_per_attribute} of either kind (SAE Bench: 5000)"
    asked = False
    for hook, members in by_hook(saes).items():
        group = PromptActivations(lm, hook, facts, params)
        tasks = build_tasks(facts, group.usable, params, stage)
        if not tasks:
            stage.skip(hook, f"no attribute has pairs enough; {len(group.usable)} of {len(facts)} prompts have an entity "
                       "token that counts (token_mask)")
            continue
        whole = _whole_activation(group, tasks, params)
        asked = True
        for name, findings in _findings(members, group, tasks, params, guard).items():
            with guard.on(name):
                yield name, ravel_result(name, members[name], facts, tasks, findings, whole, params, lm)
    if not asked:
        raise NotApplicable("; ".join(f"{what}: {why}" for what, why in stage.skipped.items()))


def _findings(members: dict[str, SparseAutoencoder], group: PromptActivations, tasks: list[Task],
              params: Params, guard: Guard) -> dict[str, Findings]:
    """Of every SAE at a hook that can be scored, from the cache or afresh."""
    def score(family: Family) -> Iterator[tuple[str, Findings]]:
        latents = group.entity_latents(family)
        for name, sae in family.items():
            with guard.on(name):
                yield name, findings_of(Swap(sae, latents.pop(name), group), tasks, params)

    cache, facts = ResultCache("ravel"), _inputs(group.known, params)
    keys = {name: result_key(sae, group.lm, facts, __name__) for name, sae in members.items()}
    found = {name: cache.get(keys[name]) for name in members}
    missing = {name: sae for name, sae in members.items() if found[name] is None}
    with tqdm(total=len(missing), desc="masks", unit="SAE", dynamic_ncols=True, disable=not missing) as bar:
        for name, findings in guard.each(missing, score):
            with guard.on(name):
                cache.put(keys[name], findings)
                found[name] = findings
            bar.update()
    return guard.left(found)


def findings_of(swap: Swap, tasks: Sequence[Task], params: Params,
                definitions: Sequence[str] = ("sae_bench", output.LAB)) -> Findings:
    """Learn one SAE's masks of every task in both definitions, and ask the patched model."""
    asked = [(task, definition) for task in tasks for definition in definitions]
    plans = [task.lab if definition == output.LAB else task.sae_bench for task, definition in asked]
    problems = [Problem(plan.train, definition == output.LAB) for plan, (_, definition) in zip(plans, asked, strict=True)]
    findings: Findings = {task.name: {} for task in tasks}
    learnt = learn(problems, swap, params)
    for (task, definition), plan, problem, numbers in zip(asked, plans, problems, learnt, strict=True):
        taken = numbers > 0
        findings[task.name][definition] = {"latents": int(taken.sum()), "answers": _ask(
            swap.group, plan.test, partial(_mix, swap, taken, problem.keeps_error), params)}
    return findings


@torch.no_grad()
def _mix(swap: Swap, taken: Tensor, keeps_error: bool, part: Sequence[Pair]) -> Tensor:
    mask = taken.float().expand(len(part), -1)
    return swap.patched(part, mask, torch.full((len(part),), keeps_error, device=mask.device))


def _whole_activation(group: PromptActivations, tasks: list[Task], params: Params) -> dict[str, list[str]]:
    """Answers to every task's held-out pairs when the source's whole activation is put in; kept in the cache."""
    lm, cache = group.lm, ResultCache("ravel")
    key = model_key(lm, ["whole", group.hook, _inputs(group.known, params)], __name__)
    found = cache.get(key)
    if found is None:
        found = {task.name: _ask(group, task.lab.test, lambda part: group.entity[[pair.source for pair in part]], params)
                 for task in tasks}
        cache.put(key, found)
    return found


def _ask(group: PromptActivations, asked: list[Pair], patch: Callable[[Sequence[Pair]], Tensor],
         params: Params) -> list[str]:
    """Answers to every pair's base, patched; a part at a time, for latents of many pairs are large."""
    size = params.model.llm_batch_size
    patched = torch.cat([patch(asked[start:start + size]) for start in range(0, len(asked), size)])
    return group.answers(asked, patched)


def _inputs(facts: Sequence[Known], params: Params) -> list[Any]:
    return [params.ravel.model_dump(), params.token_mask.model_dump(), params.random_seed,
            fingerprint([[one.first, *one.prompt] for one in facts])]

