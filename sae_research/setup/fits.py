"""Does an SAE belong to this model? Cheap checks, made as soon as an SAE is read."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from torch import nn

from sae_research.errors import UserError
from sae_research.lm import LanguageModel
from sae_research.lm.load import folder_fingerprint
from sae_research.saes import SparseAutoencoder


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: hub organisation, path and case aside, and TransformerLens' other names for it."""
    one, other = _bare(one), _bare(other)
    return one == other or _official(one) == _official(other)


def _bare(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last.removeprefix("meta-") if last.startswith("meta-llama-") else last  # the hub has Llama 3.1 under both


def _official(name: str) -> str:
    model, _, revision = name.partition("@")
    return f"{_official_names().get(model, model)}@{revision}"


@cache
def _official_names() -> dict[str, str]:
    """Name on the hub by every other name that TransformerLens has for a model, both without organisation and case. Read
    from its source: importing it takes 8 s."""
    spec = importlib.util.find_spec("transformer_lens")  # located, not imported
    names: dict[str, str] = {}
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in (Path(place) / "supported_models.py", Path(place) / "loading_from_pretrained.py"):
            table = _assigned(path, "MODEL_ALIASES") if path.is_file() else {}
            names |= {_bare(alias): _bare(official) for official, aliases in table.items() for alias in aliases}
            names |= {_bare(official): _bare(official) for official in table}
    return names


def _assigned(path: Path, name: str) -> dict[str, list[str]]:
    """The literal that a module assigns to `name`; empty where it assigns none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)
    return {}


def is_model(name: str, lm: LanguageModel) -> bool:
    """Whether `name` means this model. Two local folders are one model when their weights are the same."""
    folder, own = (os.path.expanduser(one) for one in (name, lm.name))
    if os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(own):
        return os.path.samefile(folder, own) or folder_fingerprint(Path(folder)) == lm.fingerprint
    return any(same_model(name, known) for known in lm.names)


def fill_in(sae: SparseAutoencoder, model_name: str, hook_name: str) -> list[str]:
    """Complete a configuration that names no model or hook; returns what was assumed, in words."""
    assumed = []
    if not sae.cfg.model_name:
        assumed.append(f"names no model; assumed {model_name}")
        sae.cfg = sae.cfg.replace(model_name=model_name)
    if not sae.cfg.hook_name:
        assumed.append(f"names no hook; assumed {hook_name}")
        sae.cfg = sae.cfg.replace(hook_name=hook_name)
    return assumed


def check_fits(name: str, sae: SparseAutoencoder, lm: LanguageModel, same_as: Sequence[str] | None = None) -> None:
    """Raises `UserError` when the SAE was made for another model, another width, or a hook the model
    lacks. same_as: further names of this model (`model.same_as`)."""
    cfg = sae.cfg
    known = cfg.provenance.get("model_fingerprint") == lm.fingerprint or is_model(cfg.model_name, lm)
    if not known and not any(same_model(cfg.model_name, other) for other in same_as or ()):
        if not (lm.saved_from and same_model(cfg.model_name, lm.saved_from)):
            raise UserError(f"SAE {name} was trained on {cfg.model_name}, model.name is {lm.name}; set model.name: "
                            f"{cfg.model_name} or choose another SAE; if {lm.name} is that model under another name, set "
                            f"model.same_as: [{cfg.model_name}]")
        print(f"SAE {name} was trained on {cfg.model_name}; the config in {lm.name} says that it was saved from "
              f"{lm.saved_from}: taken for that model, which a finetune of it is not", flush=True)
    width = lm.d_in(cfg.hook_name)
    if cfg.d_in != width:
        raise UserError(f"SAE {name} reads {cfg.d_in} dimensions, {lm.name} has {width} at {cfg.hook_name}")
    if cfg.center_input and not any(isinstance(module, nn.LayerNorm) for module in lm.model.modules()):
        raise UserError(f"SAE {name} was trained with center_writing_weights, which a model without "
                        f"LayerNorm such as "
                        f"{lm.name} does not allow")


def check_tokenizer(lm: LanguageModel) -> None:
    """Raises `UserError` when the tokenizer makes ids the model has no embedding for."""
    if len(lm.tokenizer) > lm.vocab_size:
        raise UserError(f"model.name: the tokenizer of {lm.name} has {len(lm.tokenizer)} tokens, the model "
                        f"{lm.vocab_size}; they do not belong together")
