"""The text that comes as an ordinary dependency: the CSV files inside the package `sae_probes`, and the labelled tasks made
of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_research.runtime.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


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
    import pandas as pd

    path = packaged_folder() / f"{name}.csv.zst"
    if not path.is_file():
        raise UserError(f"{path}: no such file; `sae-probes` {packaged_version()} does not carry it")
    frame = pd.read_csv(path, compression="zstd", usecols=["prompt", "target"], dtype={"prompt": str})  # ty: ignore[no-matching-overload]
    frame = frame.dropna()
    return frame.assign(prompt=frame["prompt"].str.strip())


class PackagedTask(NamedTuple):
    """`files` maps a packaged file to its labels and the classes they stand for; other rows are left out.

    `caveat` is what someone reading the task's numbers should know about the data.
    """

    files: Mapping[str, Mapping[Any, str]]
    caveat: str = ""
    min_characters: int = 1


def _same(*labels: str) -> dict[str, str]:
    return {label: label for label in labels}


SAE_BENCH_CODE_CHARACTERS = 128 * 3
"""SAE Bench takes code of at least 128 tokens, counted as 3 characters each, after the licence header."""

_ENDS_WITH_NAME = (
    "the label belongs to the person whose name ends the text (about 130 tokens in): a context shorter than "
    "the text cuts the name off, and a person may be named in train and in test"
)

PACKAGED_TASKS: dict[str, PackagedTask] = {
    "news_topic": PackagedTask(
        {"97_news_class": _same("Politics", "Technology", "Entertainment", "Sport")},
        "the class name itself stands in 1-8 % of the texts",
    ),
    "news_section": PackagedTask(
        {"161_agnews_0": {1: "World"}, "162_agnews_1": {1: "Sports"}, "163_agnews_2": {1: "Business"}}
    ),
    "disease_area": PackagedTask(
        {
            "101_disease_class": _same(
                "digestive system diseases",
                "cardiovascular diseases",
                "nervous system diseases",
                "neoplasms",
                "general pathological conditions",
            )
        },
        "abstracts that stand under several classes are dropped; the classes still overlap in meaning",
    ),
    "code_language": PackagedTask(
        {"158_code_C": {1: "C"}, "159_code_Python": {1: "Python"}, "160_code_HTML": {1: "HTML"}},
        "the packaged files lack each program's first 150 characters already, as SAE Bench's code texts do; "
        "licence headers remain: 5 % of test texts share their first 200 characters with a train text",
        SAE_BENCH_CODE_CHARACTERS,
    ),
    "film_sentiment": PackagedTask(
        {"113_movie_sent": {0: "negative", 1: "positive"}}, "single sentences, lower-cased and tokenised"
    ),
    "product_sentiment": PackagedTask(
        {"157_amazon_5star": {0: "negative", 1: "positive"}},
        "each review opens with its title, which often gives the verdict",
    ),
    "review_stars": PackagedTask(
        {"111_yelp_data": {stars - 1: f"{stars} stars" for stars in range(1, 6)}},
        "neighbouring ratings are hard to tell apart; line breaks are written as backslash-n",
    ),
    "science_field": PackagedTask(
        {"99_sci_cat": _same("Physics", "Chemistry", "Biology")},
        "comments from forums, many too short or general to show their field",
    ),
    "emotion": PackagedTask(
        {"102_twt_emotion": _same("worry", "happiness", "sadness", "surprise")}, "labels of single tweets are noisy"
    ),
    "ticket_topic": PackagedTask(
        {
            "103_it_tick": _same(
                "HR Support", "Hardware", "Administrative rights", "Access", "Purchase", "Storage", "Internal Project"
            )
        },
        "leaks: tickets follow templates; 'purchase' stands in 74 % of Purchase, 'access' in 28 % of Access",
    ),
    "gender": PackagedTask({"56_wikidatasex_or_gender": _same("female", "male")}, _ENDS_WITH_NAME),
    "party": PackagedTask(
        {"58_wikidatapolitical_party": {"Republican Party": "Republican", "Democratic Party": "Democratic"}}, _ENDS_WITH_NAME
    ),
    "occupation": PackagedTask(
        {
            f"{number}_wikidata_occupation_is{job}": {1: job}
            for number, job in enumerate(("journalist", "athlete", "actor", "politician", "singer", "researcher"), 59)
        },
        _ENDS_WITH_NAME + "; texts on people of several occupations are dropped",
    ),
}
