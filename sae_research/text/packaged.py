"""The real text that comes as an ordinary dependency: the CSV files inside the package `sae_probes`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import pandas as pd

from sae_research.errors import UserError


def packaged_folder() -> Path:
    """The folder of the labelled CSV files. Raises `UserError` if the package is not installed.

    The package is found without importing it: its modules pull in heavy dependencies nobody needs here.
    """
    spec = importlib.util.find_spec("sae_probes")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the packaged text is missing: install `sae-probes`, or run `make setup`")
    return Path(spec.submodule_search_locations[0]) / "data" / "cleaned_data"


def packaged_version() -> str:
    """Version of the package that carries the text, for cache keys."""
    return importlib.metadata.version("sae-probes")


def read_packaged(name: str) -> pd.DataFrame:
    """One packaged file, `97_news_class` say: columns `prompt` (str, stripped) and `target`, in file order.

    Rows without text are left out. Raises `UserError` if the file is missing.
    """
    path = packaged_folder() / f"{name}.csv.zst"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `sae-probes` {packaged_version()} does not carry it")
    frame = pd.read_csv(path, compression="zstd", usecols=["prompt", "target"], dtype={"prompt": str})
    frame = frame.dropna()
    return frame.assign(prompt=frame["prompt"].str.strip())
