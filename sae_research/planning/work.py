"""How much of what each stage computes: tokens by kind of pass, counted from `params.yaml` alone.

An evaluation goes through phases, at each of which its driver waits for all SAEs, and a phase through parts (tasks, batches
of text). A phase's `Work` is that of one part. Where texts are only known once they are read, their number is assumed;
the constants below say how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.text.tasks import SAE_BENCH_TASKS

PROBING_CLASSES = 4
"""Texts of a probing data set come from several classes; about this many on average."""
SCR_SETS = 3
"""Balanced sets that the texts of one two-attribute task make up."""
WORD_TOKENS = 6
"""Of an absorption prompt after its examples."""
EXAMPLE_TOKENS = 9
"""Of a solved example in an absorption prompt."""
QUESTION_TOKENS = 100
"""Of a multiple-choice question."""
FACT_TOKENS = 24
"""Of a RAVEL prompt."""
ALL_WORDS, ALL_QUESTIONS, ALL_TASKS, ALL_TEXTS = 40_000, 250, 113, 5_000
"""Most words of a vocabulary, questions of a set that a model knows, tasks of sae-probes and their texts."""
FACTS_PER_ATTRIBUTE = 200
"""RAVEL prompts that the model is asked, for each attribute."""
SAE_PROBES_AT_ONCE = 200_000
"""Tokens of the tasks that sae-probes takes together."""
MIN_SAMPLE_TOKENS = 8_192
SAMPLE_TOKENS_PER_LATENT = 4


class Work(NamedTuple):
    """Of one part. Tokens, unless said otherwise."""

    prefix: float = 0.0
    """Run up to the hook, once for all SAEs."""
    above: float = 0.0
    """Run from the hook to the logits, once for all SAEs."""
    encoded: float = 0.0
    """That each SAE encodes and decodes."""
    patched: float = 0.0
    """Run from the hook to the logits for each SAE."""
    whole: float = 0.0
    """Run through all of the model, once for all SAEs."""
    patched_whole: float = 0.0
    """Run through all of the model for each SAE."""
    backward: float = 0.0
    """Whose gradients run from the logits back to the hook, for each SAE."""
    texts: float = 0.0
    """Texts on whose latents the host fits probes, for each SAE."""
    geometry: float = 0.0
    """Times that the nearest neighbours of an SAE's decoder rows are looked for."""
    meta_rows: float = 0.0
    """Decoder rows that a meta-SAE is trained on, for each SAE with a dictionary of its own."""


class Hooks(NamedTuple):
    """Where a dictionary stands."""

    read: tuple[str, ...] = ("blocks.0.hook_resid_post",)
    """A crosscoder's are several."""
    written: str = ""
    """A transcoder's; empty where it is what is read."""

    @property
    def resumed(self) -> bool:
        """Whether patched passes start at the written hook; the whole model runs elsewhere (`LanguageModel.resume`)."""
        return self.in_stream or len(self.read) == 1 and self.written.endswith("hook_mlp_out")

    @property
    def in_stream(self) -> bool:
        """Whether one hook of the stream is written."""
        return len(self.read) == 1 and "hook_resid" in (self.written or self.read[0])


class Phase(NamedTuple):
    """What SAEs are scored on before the driver goes on."""

    kind: str
    """Of the result cache."""
    parts: int
    work: Work
    driver: Work = Work()
    """What the driver computes itself before it."""

    @property
    def tokens(self) -> int:
        """That each SAE encodes."""
        return int(self.parts * self.work.encoded)


def sample_size(d_sae: int) -> int:
    """Tokens that controls are made from: enough that the rows drawn are few among them."""
    return max(SAMPLE_TOKENS_PER_LATENT * d_sae, MIN_SAMPLE_TOKENS)


STREAM = Hooks()
"""An SAE of the stream."""


def phases(evaluation: str, params: Params, hooks: Hooks = STREAM) -> list[Phase] | None:
    """An evaluation's phases for dictionaries of the same hooks; None for one that cannot be foretold."""
    if evaluation == "core":
        return _core(params, hooks)
    count = _COUNTS.get(evaluation)
    return None if count is None else count(params)


def takes(evaluation: str, hooks: Hooks) -> bool:
    """Whether it scores dictionaries that stand there: transcoders, crosscoders are left out of some."""
    one = OF_SAES.get(evaluation)
    if one is None:
        return True
    return one.crosscoders if len(hooks.read) > 1 else not (one.one_hook and hooks.written)


def _core(params: Params, hooks: Hooks) -> list[Phase]:
    config, several = params.core_eval, len(hooks.read) if len(hooks.read) > 1 else 0
    batch = config.batch_size_prompts * params.text.context_size
    sparsity = config.n_eval_sparsity_variance_batches * batch
    # Clean, and ablated in our definition twice; SAE Bench's ablation is one sequence in the stream. Each SAE is patched in
    # for either definition. In ours each hook of a crosscoder is ablated and patched alone as well.
    shared = (3 + (not hooks.in_stream) + 2 * several) * batch
    patched = (2 + several) * batch
    predictions = Work(prefix=batch, encoded=batch)
    if hooks.resumed:
        predictions = predictions._replace(above=shared, patched=patched)
    else:
        predictions = predictions._replace(whole=shared, patched_whole=patched)
    return [
        Phase("core_sparsity", 1, Work(prefix=sparsity, encoded=sparsity, geometry=1)),
        Phase("core_predictions", config.n_eval_reconstruction_batches, predictions),
    ]


def _texts_of_task(name: str, train: int, test: int, pool: float) -> float:
    """Texts of a probing task: half a probe's from its own class, the rest from the others."""
    drawn = 1.0 if name in SAE_BENCH_TASKS else pool
    return PROBING_CLASSES * (train * drawn + test) / 2


def _probing(params: Params) -> list[Phase]:
    config = params.sparse_probing
    texts = sum(
        _texts_of_task(name, config.probe_train_set_size, config.probe_test_set_size, config.train_pool)
        for name in config.dataset_names
    ) / max(len(config.dataset_names), 1)
    tokens, tasks = texts * config.context_length, len(config.dataset_names)
    work = Work(prefix=tokens, encoded=tokens, texts=texts)
    return [Phase("sparse_probing", tasks, work, Work(prefix=tasks * tokens, texts=tasks * texts))]


def _scr(params: Params) -> list[Phase]:
    config = params.scr
    texts = SCR_SETS * len(config.dataset_names) * (config.train_set_size + config.test_set_size)
    tokens = texts * config.context_length
    return [Phase("scr", 1, Work(prefix=tokens, encoded=tokens, texts=texts))]


def _tpp(params: Params) -> list[Phase]:
    own, probing = params.tpp, params.sparse_probing
    names = own.dataset_names or probing.dataset_names
    train = own.train_set_size or probing.probe_train_set_size
    test = own.test_set_size or probing.probe_test_set_size
    texts = sum(_texts_of_task(name, train, test, 1.0) for name in names)
    tokens = texts * (own.context_length or probing.context_length)
    return [Phase("tpp", 1, Work(prefix=tokens, encoded=tokens, texts=texts))]


def _absorption(params: Params) -> list[Phase]:
    config = params.absorption
    words = config.max_words or ALL_WORDS
    tokens = words * WORD_TOKENS + config.icl_prompts * config.icl_examples * EXAMPLE_TOKENS
    return [Phase("absorption", 1, Work(prefix=tokens, encoded=words, texts=words), Work(prefix=tokens))]


def _unlearning(params: Params) -> list[Phase]:
    config = params.unlearning
    sets = len(config.forget_questions) + len(config.retain_questions)
    questions = sets * min(config.max_known_questions or ALL_QUESTIONS, ALL_QUESTIONS) * QUESTION_TOKENS
    corpora = 2 * config.dataset_size * config.seq_len
    edits = len(config.retain_thresholds) * len(config.n_features_list) * len(config.multipliers)
    work = Work(prefix=corpora + questions, encoded=corpora + questions, patched=2 * edits * questions)
    return [Phase("unlearning", 1, work, Work(prefix=2 * questions, above=2 * questions))]


def _sae_probes(params: Params) -> list[Phase]:
    config = params.sparse_probing_sae_probes
    tasks = ALL_TASKS if isinstance(config.dataset_names, str) else len(config.dataset_names)
    texts = min(config.max_texts or ALL_TEXTS, ALL_TEXTS) + config.probe_train_set_size + config.probe_test_set_size
    tokens = texts * config.context_length
    together = max(1, min(tasks, int(SAE_PROBES_AT_ONCE // tokens)))
    work = Work(prefix=tokens, encoded=texts, texts=texts)
    return [
        Phase("sparse_probing_sae_probes", min(together, tasks - start), work, Work(prefix=tokens * together))
        for start in range(0, tasks, together)
    ]


def _meta_sae(params: Params) -> list[Phase]:
    config = params.meta_sae
    return [Phase("meta_sae", 1, Work(meta_rows=config.train_steps * config.train_batch_size * config.n_seeds))]


def _autointerp(params: Params) -> list[Phase]:
    tokens = params.autointerp.total_tokens  # encoded once to choose latents and once to take windows
    return [Phase("autointerp_windows", 1, Work(prefix=tokens, encoded=2 * tokens))]


def _ravel(params: Params) -> list[Phase]:
    config = params.ravel
    attributes = sum(map(len, config.entity_attribute_selection.values()))
    pairs = 2 * config.num_pairs_per_attribute * attributes  # cause and isolation
    learnt = 2 * pairs * config.train_test_split * config.num_epochs * FACT_TOKENS  # in either definition
    asked = pairs * (1 - config.train_test_split) * (FACT_TOKENS + config.n_generated_tokens)
    facts = attributes * min(config.full_dataset_downsample or FACTS_PER_ATTRIBUTE, FACTS_PER_ATTRIBUTE)
    work = Work(prefix=facts * FACT_TOKENS, encoded=facts, patched=learnt + 2 * asked, backward=learnt)
    asking = facts * (FACT_TOKENS + config.n_generated_tokens) + asked
    return [Phase("ravel", 1, work, Work(prefix=asking, above=asking))]


_COUNTS: dict[str, Callable[[Any], list[Phase]]] = {
    "sparse_probing": _probing,
    "scr": _scr,
    "tpp": _tpp,
    "absorption": _absorption,
    "unlearning": _unlearning,
    "sparse_probing_sae_probes": _sae_probes,
    "meta_sae": _meta_sae,
    "autointerp": _autointerp,
    "ravel": _ravel,
}
