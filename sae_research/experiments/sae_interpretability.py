"""SAE-Interpretability's YAML: which keys there are, in which spellings, and what they mean there.

A file has settings of the run, `data` and `saes`. Its sweep files spell the same keys in the plural
(`learning_rates`, `dict_size_ratios`) and keep those of single architectures under `sae_specific`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from sae_research.errors import UserError
from sae_research.experiments.config_files import Values, flatten, nearest, with_values
from sae_research.params import explained, got
from sae_research.section import Above0, Count, Fraction, Interval, Name, NonNegative, Positive, Section, Seed

SAEType = Literal["relu", "gated", "hard_concrete", "gated_hard_concrete"]
OWN_KEYS: dict[str, frozenset[str]] = {
    "relu": frozenset(),
    "gated": frozenset({"aux_coeff"}),
    "hard_concrete": frozenset({"initial_beta", "final_beta", "beta_annealing", "hard_concrete_stretch_limits",
                                "input_dependent_gates"}),
    "gated_hard_concrete": frozenset({"aux_coeff", "initial_beta", "final_beta", "beta_annealing",
                                      "hard_concrete_stretch_limits", "input_dependent_gates"}),
}
"""Settings of one architecture each."""
_ALL_OWN = frozenset().union(*OWN_KEYS.values())
ALIASES = {"learning_rate": "lr", "dict_size_ratio": "dict_size_to_input_ratio", "batch_size": "train_batch_size",
           "sparsity": "sparsity_coeff", "model_name": "tlens_model_name", "stretch_limits": "hard_concrete_stretch_limits"}
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
    known = {f"{name}.{field}" if name else field for name, model in _SECTIONS.items() if name in sections
             for field in model.model_fields if field not in _SECTIONS}
    if section and section not in _SECTIONS:
        raise UserError(f"{where}: unknown section {section}{nearest(section, ('data', 'saes', 'sae_specific'))}")
    known |= set() if section else set(ALIASES)
    raise UserError(f"{where}: unknown key {key}{nearest(f'{section}.{last}' if section else last, known)}")


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


def _explain(item: dict[str, Any]) -> str:
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].removeprefix('Value error, ')}{got(item)}"


def foreign_keys(keys: Iterable[str], sae_type: str) -> set[str]:
    """Those of `keys` (without section) that belong to other architectures alone."""
    return (set(keys) & _ALL_OWN) - OWN_KEYS.get(sae_type, frozenset())
