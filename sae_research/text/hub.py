"""The Hugging Face hub as a source of text: what goes wrong there, said in one line.

`datasets` and `huggingface_hub` are imported inside functions: they take seconds, and the offline default
never needs them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any, NamedTuple
from urllib.parse import quote

from sae_research.runtime.errors import UserError

OFFLINE_TEXT = "set `text.dataset: packaged`"
OFFLINE_TASKS = "name packaged tasks in `sparse_probing.dataset_names`"


def hub_answers(path: str) -> bool:
    """Whether the hub says anything, be it a refusal, when asked for `path`, within HF_HUB_ETAG_TIMEOUT seconds (10 where
    unset). The hub's own client goes on asking a server that accepts and says nothing for six minutes."""
    import requests
    from huggingface_hub import constants

    heard: list[int] = []

    def ask() -> None:
        try:
            answer = requests.head(f"{constants.ENDPOINT}/{path}", timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except (requests.RequestException, OSError, ValueError):
            return
        heard.append(answer.status_code)

    thread = Thread(target=ask, daemon=True)  # its own thread: headers that drip in one by one pass every read's limit
    thread.start()
    thread.join(constants.HF_HUB_ETAG_TIMEOUT)
    return bool(heard)


@contextmanager
def offline_if_silent(path: str) -> Generator[None]:
    """Where the hub does not answer to `path`, its client looks into its cache alone during the block."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not hub_answers(path)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_errors(name: str, offline_mend: str) -> Generator[None]:
    """Turn what the hub's libraries raise about data set `name` into one `UserError`.

    Seen with datasets 3.6 and huggingface_hub 2.4: an unreachable hub arrives as a `FileNotFoundError` with
    the `httpx` error deep in its chain, `HF_HUB_OFFLINE=1` as a `ConnectionError`, an unknown name as
    `DatasetNotFoundError`. `offline_mend` says how to do without the hub.
    """
    from datasets import config
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from requests.exceptions import RequestException

    if not constants.HF_HUB_OFFLINE and not hub_answers(f"api/datasets/{quote(name.partition(':')[0])}"):
        raise UserError(
            f"hub data set {name!r}: the hub cannot be reached ({constants.ENDPOINT} gave no answer within "
            f"{constants.HF_HUB_ETAG_TIMEOUT} s); to run offline, {offline_mend}"
        )
    setattr(config, "STREAMING_READ_MAX_RETRIES", 2)  # noqa: B010  (of a read that the hub's client has tried six times itself)
    known = (
        DatasetsError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RequestException,
        ConnectionError,
        FileNotFoundError,
    )
    try:
        yield
    except known as error:
        raise UserError(f"hub data set {name!r}: {_reason(error)}; to run offline, {offline_mend}") from error


def _reason(error: BaseException) -> str:
    """Why loading failed: a hub out of reach, or a name or file that it does not have."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    chain = _chain(error)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain) or "OfflineMode" in str(error):
        return "the hub is switched off (HF_HUB_OFFLINE) and no copy is cached here"
    # HfHubHTTPError is the hub answering; any other HTTPError is the way to it
    unreachable = [
        link
        for link in chain
        if isinstance(link, ConnectionError | LocalEntryNotFoundError)
        or (isinstance(link, HTTPError) and not hasattr(link, "response"))
    ]
    if unreachable:
        why = one_line(unreachable[-1])
        return f"the hub cannot be reached ({why}), and nothing of that name lies in this folder"
    return f"{one_line(error).rstrip('.')}; check the name and your access"


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from or during, outermost first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def one_line(error: BaseException, limit: int = 200) -> str:
    """The error's message on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def stream_rows(name: str) -> Iterator[dict[str, Any]]:
    """Rows of the hub data set's `train` split, streamed. Raises `UserError` if it cannot be loaded."""
    with hub_errors(name, OFFLINE_TEXT):
        from datasets import load_dataset

        try:
            dataset = load_dataset(name, split="train", streaming=True)
        except ValueError as error:  # no `train` split, a configuration to choose, a script to trust
            raise UserError(f"hub data set {name!r}: {one_line(error)}") from None
        yield from dataset


def hub_revision(name: str) -> str:
    """The commit the hub data set's `main` points at. [40 hex digits] Raises `UserError` if out of reach."""
    with hub_errors(name, OFFLINE_TEXT):
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name).sha)


class HubName(NamedTuple):
    """A part of a hub data set."""

    dataset: str
    config: str | None
    split: str


def parse_hub_name(name: str, split: str) -> HubName:
    """`owner/data`, `owner/data:config` or `owner/data:config:split`; `split` where none is named.

    Raises `UserError` for anything else.
    """
    parts = name.split(":")
    if len(parts) > 3 or not all(parts[:1] + parts[2:]):
        raise UserError(f"data set {name!r}: expected owner/data, owner/data:config or owner/data:config:split")
    return HubName(parts[0], (parts[1:2] or [""])[0] or None, parts[2] if len(parts) == 3 else split)


def named_rows(name: HubName) -> Iterator[dict[str, Any]]:
    """Rows of a part of a hub data set, streamed; call it inside `hub_errors`. Raises `UserError` for a configuration or
    split it lacks, and for a data set that would run code."""
    from datasets import load_dataset

    try:
        dataset = load_dataset(name.dataset, name.config, split=name.split, streaming=True)
    except ValueError as error:
        raise UserError(f"hub data set {':'.join(part for part in name if part)!r}: {one_line(error)}") from None
    yield from dataset
