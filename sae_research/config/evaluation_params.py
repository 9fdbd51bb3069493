"""What the sections of single evaluations of `params.yaml` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sae_research.config.section import (
    Above0,
    Above1,
    Count,
    Fraction,
    LocalName,
    Name,
    NonNegative,
    Positive,
    Prompt,
    Section,
    Tokens,
    Whole,
)

EXACT_WIDTH = 16_384
"""Widest dictionary whose nearest neighbours core evaluation looks for in full: 2.7e8 cosines, 7 s of a CPU core at
d_in = 576."""


class CoreEval(Section):
    """Reconstruction, sparsity and the model's loss with the reconstruction in place."""

    batch_size_prompts: Positive = 6
    """Contexts per batch."""
    n_eval_reconstruction_batches: Positive = 2
    """For loss recovered and KL."""
    n_eval_sparsity_variance_batches: Positive = 16
    """For L0, variance explained, densities."""


class SparseProbing(Section):
    """Linear probes on the few latents that tell a class apart."""

    dataset_names: list[LocalName] = ["news_topic", "code_language", "product_sentiment"]
    """Packaged tasks, local files, or SAE Bench's hub data sets by name."""
    probe_train_set_size: Annotated[Positive, Field(ge=4)] = 80
    """Texts of one binary task: half of a class, half of the others."""
    probe_test_set_size: Annotated[Positive, Field(ge=4)] = 60
    """Test texts of one binary task, half of either kind."""
    context_length: Annotated[Positive, Field(ge=4)] = 64
    """Tokens of a text."""
    k_values: list[Positive] = [1, 2, 5]
    """Latents that a probe may read."""
    train_draws: Annotated[Positive, Field(ge=2)] = 20
    """Sets of training texts that probes are fitted on; their spread is part of every interval. Accuracies are means
    over them. SAE Bench's own metrics come from one set."""
    train_pool: Annotated[Above1, Field(le=100)] = 3.0
    """Texts that these are drawn from without replacement, in sizes of a set. A task with fewer draws with replacement."""


class SCR(Section):
    """Spurious correlation removal."""

    dataset_names: list[LocalName] = [
        "film_or_restaurant_by_sentiment",
        "film_or_product_by_sentiment",
        "restaurant_or_product_by_sentiment",
    ]
    """Two-attribute tasks: packaged, local files, or SAE Bench's hub data sets by name."""
    train_set_size: Annotated[Positive, Field(ge=16)] = 160
    """Texts of one balanced data set: a quarter with each pair of attributes."""
    test_set_size: Annotated[Positive, Field(ge=16)] = 120
    """Test texts of one balanced data set: a quarter with each pair of attributes."""
    context_length: Annotated[Positive, Field(ge=4)] = 128
    """Tokens of a text, the separator in front included."""
    n_values: Annotated[list[Positive], Field(min_length=1)] = [2, 5, 10, 20, 50, 100, 500]
    """How many latents are ablated."""
    probe_epochs: Positive = 20
    """Of the probes that latents are chosen by."""


class TPP(Section):
    """Targeted probe perturbation; null takes sparse probing's value, whose texts then serve both."""

    dataset_names: list[LocalName] | None = None
    """As sparse probing's."""
    train_set_size: Annotated[Positive, Field(ge=4)] | None = None
    """Texts of one class's probe: half of the class, half of the others."""
    test_set_size: Annotated[Positive, Field(ge=4)] | None = None
    """Test texts of one class's probe: half of the class, half of the others."""
    context_length: Annotated[Positive, Field(ge=4)] | None = None
    """Tokens of a text."""
    n_values: Annotated[list[Positive], Field(min_length=1)] = [2, 5, 10, 20, 50, 100, 500]
    """How many latents are ablated."""
    probe_epochs: Positive = 20
    """Passes over the training texts of the probes that latents are chosen by."""


class Absorption(Section):
    """First-letter features that more specific latents absorb."""

    prompt_template: Prompt = "{word} has the first letter:"
    """Read at the last token of the word, wherever the template puts it."""
    icl_examples: Count = 10
    """Solved examples before every word, from the same split."""
    icl_prompts: Positive = 16
    """Lists of examples that words share (SAE Bench: one for every word). Each list runs through the model once."""
    max_words: Positive | None = 3_000
    """Words drawn from the tokenizer's alphabetic tokens; null takes all."""
    max_k_value: Positive = 10
    """Most latents that a letter's main latents may be."""
    f1_jump_threshold: Fraction = 0.03
    """A further latent is a split when it adds more than this to the probe's F1."""
    min_ground_truth_probe_f1: Fraction = 0.6
    """Letters that the model's own activations show no better are skipped. By the F1 of a probe on test words."""
    min_feats_for_eval: Positive = 20
    """SAE Bench reports nothing with fewer letters; here that is a note."""
    k_sparse_probe_l1_decay: NonNegative = 0.01
    """L1 penalty by which a probe's latents are chosen."""

    @model_validator(mode="after")
    def _template(self) -> Absorption:
        if self.prompt_template.count("{word}") != 1:
            raise ValueError(f"prompt_template must hold {{word}} once, got {self.prompt_template!r}")
        return self


class Unlearning(Section):
    """Clamping latents so that a topic is forgotten; the packaged sets are a stand-in."""

    forget_corpus: LocalName = "packaged_biomedical"
    """To be forgotten: a packaged topic, a local file, wmdp-bio-forget, a hub data set. On the hub as
    `owner/data[:config[:split]]`. Its latents are clamped."""
    retain_corpus: LocalName = "packaged_general"
    """To be kept: the same, or wikitext as in SAE Bench. Its latents are spared."""
    corpus_column: Name = "text"
    """Column of a table or hub data set that holds the text."""
    dataset_size: Positive = 128
    """Contexts of each corpus that densities are measured on (SAE Bench: 1024)."""
    seq_len: Annotated[Positive, Field(ge=8)] = 128
    """Tokens per context (SAE Bench: 1024)."""
    forget_questions: Annotated[list[LocalName], Field(min_length=1)] = ["packaged_biomedical"]
    """Packaged, local files with question, choices and answer, or cais/wmdp:wmdp-bio."""
    retain_questions: Annotated[list[LocalName], Field(min_length=1)] = ["packaged_other_science"]
    """The same for what must be kept, e.g. `cais/mmlu:human_aging`."""
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    """auto, chat (the tokenizer's template) or plain. auto takes the template where there is one."""
    max_known_questions: Positive | None = 40
    """Of each set that an edited model is asked; null takes all that are known."""
    min_known_questions: Positive = 20
    """Not applicable below this number of known questions, on either side."""
    retain_thresholds: Annotated[list[Fraction], Field(min_length=1)] = [0.01]
    """Latents that fire on this fraction of the retain corpus or more are spared. SAE Bench: 0.001 and 0.01."""
    n_features_list: Annotated[list[Positive], Field(min_length=1)] = [10, 20]
    """How many latents are clamped."""
    multipliers: Annotated[list[Positive], Field(min_length=1)] = [50, 100]
    """A chosen latent is set to minus this where it is active (SAE Bench: 25, 50, 100, 200). Every combination of
    threshold, number and multiplier asks all questions again."""
    min_retain_accuracy: Fraction = 0.99
    """A configuration counts only if it keeps this accuracy on the retain questions."""


class SparseProbingSaeProbes(Section):
    """Sparse probes on the binary tasks of sae-probes."""

    dataset_names: Literal["all"] | Annotated[list[Name], Field(min_length=1)] = [
        "21_headline_istrump",
        "22_headline_isobama",
        "65_high-school",
        "74_magnetic-field",
        "96_spam_is",
        "105_click_bait",
        "124_world_country_United_States",
        "125_world_country_Italy",
        "139_news_class_Politics",
        "158_code_C",
        "161_agnews_0",
    ]
    """Of the 113 binary tasks, or the word all (hours on a CPU). The default holds tasks that a probe on the packaged
    model's whole activation solves at layer 8: where that one guesses there is nothing for a latent to carry."""
    k_values: Annotated[list[Positive], Field(min_length=1)] = [1, 2, 5]
    """Latents that a probe may read."""
    context_length: Annotated[Positive, Field(ge=4)] = 64
    """Tokens of a text, counted from its end, the separator in front included (sae-probes: 1024)."""
    max_texts: Annotated[Positive, Field(ge=132)] | None = 260
    """Rows for SAE Bench's split, half of either class; null takes all (up to 5000). 99 of them to test on, at most 1024 to
    train on."""
    probe_train_set_size: Annotated[Positive, Field(ge=32)] = 140
    """Distinct texts in our split, half of either class; fewer where a task has no more."""
    probe_test_set_size: Annotated[Positive, Field(ge=16)] = 100
    """Distinct test texts in our split, half of either class; fewer where a task has no more."""


class MetaSAE(Section):
    """SAEs trained on the decoder's rows; weights only, no model pass."""

    train_steps: Annotated[Whole, Field(ge=1, le=2000)] = 1500
    """Half a minute on 2 cores for a dictionary of 2304 latents. From 2001 on SAE Bench would revive dead latents; here
    nothing does."""
    k: Positive = 4
    """Mean number of meta-latents for each latent of the SAE."""
    width_ratio: Above0 = 0.25
    """Meta-latents for each latent of the SAE."""
    train_batch_size: Positive = 1024
    """Decoder rows of one step."""
    learning_rate: Above0 = 5.0e-4
    """Of Adam, constant over all steps."""
    n_seeds: Positive = 1
    """Meta-SAEs trained for each dictionary; the metrics are their means."""


class ChatEndpoint(Section):
    """An OpenAI-compatible service (`POST {base_url}/chat/completions`) and what may be asked of it."""

    base_url: Name | None = None
    """Any OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. Up to and without `/chat/completions`."""
    model: Name | None = None
    """The model's name there, e.g. gpt-4o-mini."""
    api_key_env: Annotated[str, Field(pattern="^[A-Za-z_0-9]*$", min_length=0, max_length=200)] = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; empty sends no key. The key itself stands nowhere."""
    temperature: NonNegative | None = 0.0
    """null leaves it to the endpoint, as SAE Bench does."""
    completion_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """max_tokens or max_completion_tokens, as the endpoint calls the limit on an answer."""
    concurrency: Annotated[Whole, Field(ge=1, le=256)] = 8
    """Questions under way at once."""
    timeout_seconds: Above0 = 60.0
    """Of connecting, and of every wait for more of an answer."""
    max_retries: Count = 4
    """After time-outs, lost connections, 408, 409, 429 and 5xx. After growing pauses, or as long as `Retry-After` says."""
    max_requests: Positive | None = 2_000
    """Ask nothing when more new requests would be needed; null sets no limit."""
    max_tokens: Tokens | None = 2_000_000
    """The same for the estimated tokens, prompts and answers together."""
    prompt_price_per_million: NonNegative | None = None
    """In any currency: the estimate then names the cost."""
    completion_price_per_million: NonNegative | None = None
    """The same for answers."""


class Autointerp(ChatEndpoint):
    """Whether a language model can explain a latent, and tell by that where it fires."""

    n_latents: Positive = 30
    """Random latents of each SAE (SAE Bench: 1000)."""
    override_latents: list[Count] | None = None
    """These latents in place of `n_latents` random ones."""
    total_tokens: Tokens = 65_536
    """Of the core_eval split, that windows are taken from (SAE Bench: 2000000)."""
    dead_latent_threshold: NonNegative = 15
    """A latent that is non-zero on no more tokens than this is passed over."""
    buffer: Positive = 10
    """Tokens shown on either side of the one a window is about."""
    act_threshold_frac: Fraction = 0.01
    """A token counts as active above this fraction of the latent's largest activation."""
    max_tokens_in_explanation: Positive = 30
    """Limit on an answer."""
    max_tokens_in_prediction: Positive | None = None
    """null is SAE Bench's 2 per example + 5; a model that thinks aloud needs more."""
    use_demos_in_explanation: bool = True
    """Show the judge examples of explanations."""
    n_top_ex_for_generation: Positive = 10
    """Windows of largest activation that are explained."""
    n_iw_sampled_ex_for_generation: Positive = 5
    """Windows drawn by activation that are explained."""
    n_top_ex_for_scoring: Positive = 2
    """Windows of largest activation to tell from random ones."""
    n_iw_sampled_ex_for_scoring: Positive = 2
    """Windows drawn by activation to tell from random ones."""
    n_random_ex_for_scoring: Positive = 10
    """Random windows."""
    max_failed_fraction: Fraction = 0.05
    """The stage fails when more latents than this stay without an answer. What was scored is written."""


class Ravel(Section):
    """Whether latents hold one attribute of an entity apart from others."""

    prompts: LocalName = "packaged"
    """packaged, a local folder, or a hub data set (adamkarvonen/ravel_prompts). Of SAE Bench's layout."""
    entity_attribute_selection: dict[Name, Annotated[list[Name], Field(min_length=2)]] = {
        "city": ["Country", "Continent", "Language"]
    }
    """Entity class: at least two attributes."""
    top_n_entities: Positive = 500
    """Entities kept of each class: those about which the model answers most prompts."""
    full_dataset_downsample: Positive | None = None
    """Prompts of a class that the model is asked, at random; null asks all."""
    min_known_entities: Annotated[Positive, Field(ge=4)] = 10
    """An attribute that the model knows of fewer entities is skipped."""
    num_pairs_per_attribute: Annotated[Positive, Field(ge=4)] = 40
    """Pairs of prompts of either kind, cause and isolation (SAE Bench: 5000)."""
    train_test_split: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Fraction of pairs that masks are learnt on."""
    batch_size: Positive = 8
    """Pairs per optimiser step."""
    learning_rate: Above0 = 1.0e-3
    """Of Adam on the masks, one number for each latent."""
    num_epochs: Positive = 2
    """Passes over the training pairs."""
    n_generated_tokens: Positive = 6
    """Tokens of an answer."""
