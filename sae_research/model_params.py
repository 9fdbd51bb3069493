"""What the sections `model`, `text`, `token_mask` and `activation_caching` of `params.yaml` may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sae_research.section import Above0, Above1, LocalName, Name, Positive, Section


class Model(Section):
    name: LocalName = "smollm2-135m-instruct"
    """Packaged name, hub name (`pythia-70m-deduped`, `google/gemma-2-2b`, `pythia-70m-deduped@step3000` for a revision) or
    a local folder."""
    same_as: list[Name] | None = None
    """Further names that SAEs may give this model, e.g. a hub name where `name` is a folder."""
    llm_batch_size: Positive = 16
    """Sequences per forward pass of the language model."""
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"


class Text(Section):
    dataset: LocalName = "packaged"
    """`packaged`, a local folder of .txt/.jsonl/.csv/.parquet files, or a hub data set's name."""
    column_name: Name = "text"
    context_size: Annotated[Positive, Field(ge=8)] = 128
    """Tokens per context, the leading separator included."""
    held_out_characters: Positive = 20_000_000
    """Where the core_eval split ends, after 5 million tokens or so. It is read and indexed before training starts, since
    training text near it is left out: ten times as much is then streamed of a hub's data, once."""


class TokenMask(Section):
    """Which tokens count: special and padding tokens never do."""

    drop_first_position: bool = True
    outlier_norm_multiple: Above1 | None = 3.0
    """Tokens whose activation norm exceeds this many times the median are sinks; null keeps them."""


class ActivationCaching(Section):
    enabled: bool = True
    max_gb: Above0 = 10.0
    """Size limit of .cache/activations, of .cache/tokens (long texts) and of .cache/train (checkpoints of interrupted runs),
    each; the least recently used go first."""
