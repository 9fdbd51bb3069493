"""The comments of `params.yaml`, from the descriptions of parameters in `sae_research.config`; its values stay as they are.
`python -m sae_research.cli.parameters` writes them; a test holds the file to them.

The file has the form in which DVC writes it: `dvc exp run -S` then changes the line of a value and no other. DVC drops
blank lines and comments after the last item of a list, and wraps no comment at the end of a key's line.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from dvc.utils.serialize import dumps_yaml

from sae_research.config.params import Params
from sae_research.config.recipes import recipe_model
from sae_research.config.section import Section
from sae_research.config.yaml_files import parse
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.sources import PROJECT

HEAD = """\
# The one configuration. Every key is checked: a misspelt one is an error with the nearest known name.
# Change a value here, or for one experiment: dvc exp run -S 'sae_variants.ihtp.k_values=[1,2,5,10,20]'
# presets/ holds named settings (make repro PRESET=pythia-70m). Comments: python -m sae_research.cli.parameters
"""
COLUMN, WIDTH = 32, 125


def described(section: type[Section], key: str) -> str:
    """The first sentence of `whole_description`."""
    whole = whole_description(section, key)
    return re.split(r"(?<=[^.][^.])\.(?:\s|$)", whole, maxsplit=1)[0]


def whole_description(section: type[Section], key: str) -> str:
    """What is said of a parameter: the text below it (`Field(description=...)` where a section is made from records), else
    that of the section that it holds; empty without."""
    own = next((text for cls in section.__mro__ if (text := _descriptions(cls).get(key))), None)
    field, inner = section.model_fields.get(key), section_of(section, key)
    whole = own or (field and field.description) or (inner and inner.__dict__.get("__doc__")) or ""
    return " ".join(whole.split())  # ty: ignore[missing-union-attribute]


def section_of(section: type[Section], key: str) -> type[Section] | None:
    """The section that a key holds; None for a value, or for a key there is not."""
    field = section.model_fields.get(key)
    types = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((one for one in types if isinstance(one, type) and issubclass(one, Section)), None)


@cache
def _descriptions(cls: type) -> dict[str, str]:
    """The text below each field of a class."""
    if not issubclass(cls, Section) or cls is Section:
        return {}
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }  # ty: ignore[invalid-explicit-return]


def written(text: str) -> str:
    """`params.yaml` with the comments that its parameters have. Raises `UserError` for one too long for a line."""
    values = parse(text, "params.yaml")
    return HEAD + "".join(_lines(dumps_yaml(values), values))


def _lines(plain: str, values: dict[str, Any]) -> Iterator[str]:
    path: list[str] = []
    after_list = False
    for line in plain.splitlines():
        key = re.match(r"( *)(\w+):", line)
        if key:
            path[len(key[1]) // 2 :] = [key[2]]
            yield "\n" if len(path) == 1 and not after_list else ""
        section = _section_at(path[:-1], values) if key else None
        comment = described(section, path[-1]) if section else ""
        whole = f"{line:<{COLUMN - 1}} # {comment}" if comment else line
        if len(whole) > WIDTH:
            raise UserError(
                f"{'.'.join(path)}: its first sentence is {len(whole) - WIDTH} characters too long for params.yaml"
            )
        yield f"{whole}\n"
        after_list = line.lstrip().startswith("- ")


def _section_at(path: list[str], values: Any) -> type[Section] | None:
    """The section at a path; for an SAE of `train.saes` the settings of its recipe."""
    section: type[Section] | None = Params
    for key in path:
        values = values[key]
        section = section_of(section, key) if section else None
    if path[:2] == ["train", "saes"] and len(path) == 3:
        return recipe_model(values["recipe"])
    return section


def main() -> None:
    path = PROJECT / "params.yaml"
    before = path.read_text()
    after = written(before)
    path.write_text(after)
    print(f"{path.name}: {'as it was' if before == after else 'comments written'}")


if __name__ == "__main__":
    run_main(main)
