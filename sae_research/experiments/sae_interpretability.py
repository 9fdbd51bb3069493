"""How wide and how large a model's activations are at a hook: what settings made for raw activations translate by.

SAE-Interpretability's settings as overrides of `params.yaml`, and a line for each that means something else here.

Samples become tokens, samples of warm-up and cool-down fractions of the run. Its losses are means over dimensions of raw
activations; here they are sums over activations scaled to a mean square norm of 1. With m = mse_coeff, d = d_in, s = 1 /
root mean square norm, multiplying its loss by `d s^2 / m` gives ours with the coefficients of `_coefficients`, so that a
run minimises the same thing.

SAE-Interpretability's YAML: which keys there are, in which spellings, and what they mean there.

A file has settings of the run, `data` and `saes`. Its sweep files spell the same keys in the plural
(`learning_rates`, `dict_size_ratios`) and keep those of single architectures under `sae_specific`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator

from sae_research.config.params import Params, explained, got
from sae_research.config.section import Above0, Count, Fraction, Interval, Name, NonNegative, Positive, Section, Seed
from sae_research.experiments.config_files import Values, flatten, with_values
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import round_significant, slugify

TOKENS = 4_096
"""Tokens that norms are measured on."""


class Scale(NamedTuple):
    """Activations at one hook."""

    d_in: int
    rms_norm: float
    """Root of the mean squared norm over tokens that count, model units."""


def measure(params: Params, hooks: Iterable[str]) -> dict[str, Scale]:
    """Width and norm at each hook, on the first training text. Runs the model on some thousand tokens.

    Raises `UserError` for a model, hook or text that is not there, and where no token counts.
    """
    from sae_research.lm import load_configured, median_activation_norm, pick_device, token_mask
    from sae_research.text.tokens import token_contexts
    from sae_research.training.products import pass_dtype

    dtype = pass_dtype(params.train.llm_dtype, pick_device(params.model.device))
    lm = load_configured(params.model, dtype=dtype)
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", min(TOKENS, params.train.tokens))
    scales = {}
    for hook in hooks:
        d_in, squares, count = lm.d_in(hook), 0.0, 0
        for start in range(0, len(contexts.tokens), params.model.llm_batch_size):
            part = slice(start, start + params.model.llm_batch_size)
            tokens, counted = contexts.tokens[part], None if contexts.counted is None else contexts.counted[part]
            acts = lm.activations(tokens.to(lm.device), hook).float().cpu()
            median = median_activation_norm(lm, tokens, acts, counted)
            rows = acts[token_mask(lm, tokens, acts, params.token_mask, median, counted)]
            squares, count = squares + float(rows.double().square().sum()), count + len(rows)
        if not count or not squares > 0:
            raise UserError(
                f"{hook} of {params.model.name}: no token of the first {contexts.tokens.numel():,} counts, or "
                "all activations are zero"
            )
        scales[hook] = Scale(d_in, (squares / count) ** 0.5)
    return scales


MIN_BATCH = 256
"""A shortened run keeps its number of steps, but no step falls below this many activations."""

Measure = Callable[[Values, Iterable[str]], dict[str, Scale]]
"""Scales at hooks, for dotted overrides of `params.yaml` that name model and text."""


class Changes(NamedTuple):
    """What the command line puts in place of a file's own: model, text, and the run's length."""

    model: str | None = None
    text: str | None = None
    tokens: int | None = None


class Translation(NamedTuple):
    overrides: Values
    """Dotted keys of `params.yaml`; `train.saes` whole, one entry a position."""
    notes: list[str]


def translate(config: Config, given: Iterable[str], changes: Changes, measure: Measure, name: str = "") -> Translation:
    """A parsed file as overrides. given: the keys that the file names, dotted: only those are noted. name: of the SAE,
    by default the file's `saes.name` or its type; several positions add theirs.

    Raises `UserError` where a setting has no counterpart and cannot be left out.
    """
    given = set(given)
    _refuse(config, changes)
    model = changes.model or config.tlens_model_name or config.tlens_model_path
    overrides = {"model.name": model, **_text(config, changes), **_run(config, changes), **_tracking(config)}
    scales = measure(overrides, config.saes.sae_positions)
    base = slugify(name or config.saes.name or config.saes.sae_type)
    several = len(config.saes.sae_positions) > 1
    saes = {
        slugify(f"{base}_{hook}") if several else base: _recipe(config, given, hook, scales[hook])
        for hook in config.saes.sae_positions
    }
    overrides["train.hook_name"] = config.saes.sae_positions[0]
    notes = [*_notes(config, given, changes), *_scale_notes(config, saes, scales)]
    return Translation({**overrides, "train.saes": saes}, notes)


def _refuse(config: Config, changes: Changes) -> None:
    saes, data = config.saes, config.data
    if saes.pretrained_sae_paths or saes.retrain_saes:
        raise UserError(
            "saes.pretrained_sae_paths and saes.retrain_saes: training goes on from its own checkpoints alone; "
            "to evaluate weights you have, name them in comparison_saes.folders of params.yaml"
        )
    if data.split != "train" and changes.text is None:
        raise UserError(
            f"data.split: {data.split!r}: texts come from the split train, and a hash of each decides whether "
            "it is trained or evaluated on; leave the key out, or give other text with --text"
        )
    if config.max_grad_norm is not None and config.max_grad_norm != 1.0:
        raise UserError(
            f"max_grad_norm: {config.max_grad_norm}: the four recipes clip gradients to a norm of 1.0, and no "
            "setting changes that; set max_grad_norm: 1.0"
        )


def _text(config: Config, changes: Changes) -> Values:
    if changes.text is not None:
        return {"text.dataset": changes.text, "text.context_size": config.data.context_length}
    return {
        "text.dataset": config.data.dataset_name,
        "text.column_name": config.data.column_name,
        "text.context_size": config.data.context_length,
    }


def _run(config: Config, changes: Changes) -> Values:
    """Length, batch and schedules of the run."""
    data = config.data
    total = data.n_train_samples
    file_tokens = total * data.context_length
    tokens = changes.tokens or file_tokens
    parts = config.gradient_accumulation_steps
    batch = data.train_batch_size * data.context_length * parts
    if tokens < file_tokens:
        batch, parts = max(MIN_BATCH, round(batch * tokens / file_tokens)), 1
    if batch > tokens:
        raise UserError(
            f"one step takes {batch:,} activations, the whole run {tokens:,} tokens; lower "
            "data.train_batch_size or gradient_accumulation_steps"
        )
    values: Values = {
        "train.tokens": tokens,
        "train.batch_size": batch,
        "train.accumulation_steps": parts,
        "train.warmup_fraction": _share(config.warmup_samples, total, "warmup_samples"),
        "train.sparsity_warmup_fraction": 0.0,
        "train.decay_fraction": _share(config.cooldown_samples, total, "cooldown_samples"),
    }
    if config.lr_schedule == "cosine":
        values["train.decay_fraction"] = round_significant(1 - values["train.warmup_fraction"])
    if data.n_eval_samples is not None and changes.tokens is None:
        values["train.held_out_tokens"] = data.n_eval_samples * data.context_length
    return values


def _tracking(config: Config) -> Values:
    """Weights & Biases: a file that names no project switches it off, as there."""
    values: Values = {"tracking.project": config.wandb_project}
    if config.wandb_tags is not None:
        values["tracking.tags"] = config.wandb_tags
    if config.wandb_run_name is not None:
        values["tracking.name"] = config.wandb_run_name + (" {sae}" if len(config.saes.sae_positions) > 1 else "")
    return values


def _share(samples: int, total: int, key: str) -> float:
    if samples > total:
        raise UserError(f"{key}: {samples:,} is more than data.n_train_samples: {total:,}")
    return round_significant(samples / total)


def _recipe(config: Config, given: set[str], hook: str, scale: Scale) -> dict[str, Any]:
    saes = config.saes
    recipe: dict[str, Any] = {
        "recipe": saes.sae_type,
        "hook_name": hook,
        "d_sae": max(1, round(saes.dict_size_to_input_ratio * scale.d_in)),
        "learning_rate": config.lr,
        **({"lr_schedule": "cosine", "min_lr_factor": config.min_lr_factor} if config.lr_schedule == "cosine" else {}),
        **round_significant(_coefficients(config, scale)),
    }
    if "seed" in given:
        recipe["seed"] = config.seed
    if saes.init_decoder_orthogonal:
        recipe["init"] = "orthogonal"
    own = OWN_KEYS[saes.sae_type]
    for key, ours in (
        ("initial_beta", "initial_beta"),
        ("final_beta", "final_beta"),
        ("beta_annealing", "beta_annealing"),
        ("hard_concrete_stretch_limits", "stretch"),
        ("input_dependent_gates", "input_dependent_gates"),
    ):
        if key in own and f"saes.{key}" in given and getattr(saes, key) is not None:
            value = getattr(saes, key)
            recipe[ours] = list(value) if isinstance(value, tuple) else value
    return recipe


def _coefficients(config: Config, scale: Scale) -> dict[str, float]:
    """Penalties in normalised units (see the module's docstring).

    `relu`: m |e|^2 / d + c |z|_1 / d. `gated`: m |e|^2 / d + c |gate|_1 + a |e_gate|^2 / d, its penalty not divided by d.
    Hard concrete: m |e|^2 / d + c E[L0] / d [+ a |e_gate|^2 / d].
    """
    saes, shrink = config.saes, 1 / scale.rms_norm
    strength = saes.sparsity_coeff / saes.mse_coeff
    auxiliary = {"aux_coefficient": saes.aux_coeff / saes.mse_coeff} if "aux_coeff" in OWN_KEYS[saes.sae_type] else {}
    if saes.sae_type == "relu":
        return {"l1_coefficient": strength * shrink}
    if saes.sae_type == "gated":
        return {"l1_coefficient": strength * scale.d_in * shrink, **auxiliary}
    return {"l0_coefficient": strength * shrink**2, **auxiliary}


def _scale_notes(config: Config, saes: dict[str, dict[str, Any]], scales: dict[str, Scale]) -> list[str]:
    lines = []
    for recipe in saes.values():
        key, hook = "l1_coefficient" if "l1_coefficient" in recipe else "l0_coefficient", recipe["hook_name"]
        lines.append(
            f"saes.sparsity_coeff {config.saes.sparsity_coeff:g} is {key} {recipe[key]:.4g} at {hook}: its "
            f"activations, {scales[hook].rms_norm:.4g} long, are scaled to length 1"
        )
    return lines


NOTES = {
    "save_every_n_samples": "changes no result; runs keep checkpoints of their own and go on from them",
    "eval_every_n_samples": "changes no result; held-out metrics are taken at the end",
    "log_every_n_grad_steps": "changes no result; curves have 60 rows",
    "data.streaming": "changes no result",
    "data.eval_batch_size": "changes no result",
    "data.train_batch_size": "with gradient_accumulation_steps and context_length, the activations of one step; the model "
    "reads model.llm_batch_size contexts at a time",
    "data.seed": "not used: documents come in one order, their tokens are shuffled by random_seed",
    "data.tokenizer_name": "not used: a model reads through its own tokenizer",
    "data.is_tokenized": "not used: a column's lists are token ids, of the model's own tokenizer; anything else is text",
    "seed": "of the SAE's start and draws; the order of text follows random_seed of params.yaml",
    "saes.beta_annealing": "starts when the learning rate's warm-up ends",
}


def _notes(config: Config, given: set[str], changes: Changes) -> list[str]:
    lines = []
    for key, text in NOTES.items():
        section, _, field = key.rpartition(".")
        value = getattr(getattr(config, section), field) if section else getattr(config, field)
        if key in given and value not in (None, False):
            lines.append(f"{key}: {text}")
    saes = config.saes
    if saes.beta_annealing and saes.final_beta is None:
        lines.append(
            f"saes.final_beta: not given: {saes.initial_beta / 2:g}, half of initial_beta, as in the sweep that "
            "SAE-Interpretability ships (1.0 to 0.5)"
        )
    if "min_lr_factor" in given and config.lr_schedule == "linear":
        lines.append("min_lr_factor: not used: a linear decay ends at 0, as there")
    if changes.model:
        lines.append(
            f"model {changes.model} in place of {config.tlens_model_name or config.tlens_model_path}: "
            "saes.sparsity_coeff was chosen for the other's activations"
        )
    if changes.tokens and changes.tokens < config.data.n_train_samples * config.data.context_length:
        lines.append(
            f"the shorter run keeps the file's number of steps, with smaller batches, but none below {MIN_BATCH} activations"
        )
    return lines


SAEType = Literal["relu", "gated", "hard_concrete", "gated_hard_concrete"]
OWN_KEYS: dict[str, frozenset[str]] = {
    "relu": frozenset(),
    "gated": frozenset({"aux_coeff"}),
    "hard_concrete": frozenset(
        {"initial_beta", "final_beta", "beta_annealing", "hard_concrete_stretch_limits", "input_dependent_gates"}
    ),
    "gated_hard_concrete": frozenset(
        {
            "aux_coeff",
            "initial_beta",
            "final_beta",
            "beta_annealing",
            "hard_concrete_stretch_limits",
            "input_dependent_gates",
        }
    ),
}
"""Settings of one architecture each."""
_ALL_OWN = frozenset().union(*OWN_KEYS.values())
ALIASES = {
    "learning_rate": "lr",
    "dict_size_ratio": "dict_size_to_input_ratio",
    "batch_size": "train_batch_size",
    "sparsity": "sparsity_coeff",
    "model_name": "tlens_model_name",
    "stretch_limits": "hard_concrete_stretch_limits",
}
"""Further spellings, in the singular."""


class Data(Section):
    dataset_name: Name
    tokenizer_name: Name | None = None
    context_length: Annotated[Positive, Field(ge=8)] = 256
    n_train_samples: Positive
    """Contexts of `context_length` tokens, as all samples are."""
    n_eval_samples: Positive | None = None
    train_batch_size: Positive = 32
    """Samples of one pass of the language model."""
    eval_batch_size: Positive | None = None
    streaming: bool = True
    seed: Seed | None = None
    is_tokenized: bool = True
    column_name: Name = "input_ids"
    split: Name = "train"


class SAEs(Section):
    name: Name | None = None
    sae_type: SAEType
    dict_size_to_input_ratio: Above0 = 1.0
    pretrained_sae_paths: Any = None
    retrain_saes: bool = False
    sae_positions: Annotated[list[Name], Field(min_length=1)]
    init_decoder_orthogonal: bool | None = None
    sparsity_coeff: NonNegative
    mse_coeff: Above0 = 1.0
    aux_coeff: NonNegative = 1.0
    initial_beta: Above0 = 0.5
    final_beta: Above0 | None = None
    beta_annealing: bool = False
    hard_concrete_stretch_limits: Interval = (-0.1, 1.1)
    input_dependent_gates: bool = True

    @field_validator("sae_positions", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Config(Section):
    wandb_project: Name | None = None
    wandb_run_name: Name | None = None
    wandb_tags: list[Name] | None = None
    seed: Seed = 0
    tlens_model_name: Name | None = None
    tlens_model_path: Name | None = None
    save_dir: Name | None = None
    save_every_n_samples: Positive | None = None
    eval_every_n_samples: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    lr: Above0
    lr_schedule: Literal["cosine", "linear"] = "cosine"
    min_lr_factor: Fraction = 0.1
    warmup_samples: Count = 0
    cooldown_samples: Count = 0
    max_grad_norm: Above0 | None = None
    log_every_n_grad_steps: Positive = 20
    data: Data
    saes: SAEs


_SECTIONS: dict[str, type[Section]] = {"": Config, "data": Data, "saes": SAEs}


def canonical(values: Values, where: str) -> Values:
    """Every key in its one spelling, dotted: `{"saes.sparsity_coeffs": 1}` -> `{"saes.sparsity_coeff": 1}`.

    A key without a section is looked for in the run's settings, then in `data` and `saes`. where: the file's name,
    for the message. Raises `UserError` for a key that no section has, with the nearest there is, and for two
    spellings of one key.
    """
    result: Values = {}
    for key, value in flatten(values).items():
        name = canonical_key(key, where)
        if name in result:
            raise UserError(f"{where}: {name} is given twice, in two spellings")
        result[name] = value
    return result


def canonical_key(key: str, where: str) -> str:
    section, _, last = key.rpartition(".")
    if section in ("sae_specific", "saes.sae_specific"):
        section = "saes"
    sections = [section] if section else list(_SECTIONS)
    for candidate in (last, last.removesuffix("s"), ALIASES.get(last, last), ALIASES.get(last.removesuffix("s"), last)):
        for name in sections:
            if name in _SECTIONS and candidate in _SECTIONS[name].model_fields and candidate not in _SECTIONS:
                return f"{name}.{candidate}" if name else candidate
    known = {
        f"{name}.{field}" if name else field
        for name, model in _SECTIONS.items()
        if name in sections
        for field in model.model_fields
        if field not in _SECTIONS
    }
    if section and section not in _SECTIONS:
        raise UserError(f"{where}: unknown section {section}{did_you_mean(section, ('data', 'saes', 'sae_specific'))}")
    known |= set() if section else set(ALIASES)
    raise UserError(f"{where}: unknown key {key}{did_you_mean(f'{section}.{last}' if section else last, known)}")


def parse(values: Values, where: str) -> Config:
    """The configuration from canonical keys. Raises `UserError` in one line for what is missing, of a wrong type, or
    a setting of another architecture."""
    nested = with_values({"data": {}, "saes": {}}, values)
    try:
        config = Config.model_validate(nested)
    except ValidationError as error:
        raise UserError(f"{where}: {explained(error, _explain)}") from None
    for key in sorted(foreign_keys(nested["saes"], config.saes.sae_type)):
        raise UserError(f"{where}: saes.{key} is no setting of {config.saes.sae_type}")
    if (config.tlens_model_name is None) == (config.tlens_model_path is None):
        raise UserError(f"{where}: give one of tlens_model_name and tlens_model_path")
    return config


def _explain(item: Mapping[str, Any]) -> str:
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].removeprefix('Value error, ')}{got(item)}"


def foreign_keys(keys: Iterable[str], sae_type: str) -> set[str]:
    """Those of `keys` (without section) that belong to other architectures alone."""
    return (set(keys) & _ALL_OWN) - OWN_KEYS.get(sae_type, frozenset())
