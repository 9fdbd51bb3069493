"""What questions to a language model will cost, reckoned before any is asked."""

from __future__ import annotations

import math
from typing import NamedTuple

from sae_research.errors import UserError
from sae_research.eval_params import ChatEndpoint

Messages = list[dict[str, str]]
"""`{"role": "system" | "user" | "assistant", "content": ...}`, in order."""

_BYTES_PER_TOKEN, _TOKENS_PER_MESSAGE = 4, 4


class Budget(NamedTuple):
    """An estimate: requests, prompt tokens, and the most tokens that the answers may have."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, prompt_tokens: int, completion_tokens: int) -> Budget:
        """With one more request."""
        return Budget(self.requests + 1, self.prompt_tokens + prompt_tokens, self.completion_tokens + completion_tokens)

    def cost(self, endpoint: ChatEndpoint) -> float | None:
        """In the currency of the prices; None without prices."""
        prices = (endpoint.prompt_price_per_million, endpoint.completion_price_per_million)
        if prices == (None, None):
            return None
        return (self.prompt_tokens * (prices[0] or 0) + self.completion_tokens * (prices[1] or 0)) / 1e6

    def words(self, endpoint: ChatEndpoint) -> str:
        """`60 requests, about 50,000 prompt tokens and at most 1,890 answer tokens, cost about 0.0087`"""
        cost = self.cost(endpoint)
        return (f"{self.requests:,} requests, about {self.prompt_tokens:,} prompt tokens and at most "
                f"{self.completion_tokens:,} answer tokens" + ("" if cost is None else f", cost about {cost:.4g}"))


def estimate_tokens(messages: Messages) -> int:
    """About how many tokens a prompt has: one per four bytes of UTF-8, and four for each message's frame. Models differ
    in their tokens; English comes out within some 20 %."""
    return sum(math.ceil(len(message["content"].encode("utf-8", "replace")) / _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE
               for message in messages)


def check_budget(budget: Budget, endpoint: ChatEndpoint, section: str, remedy: str) -> None:
    """Raises `UserError` when `budget` exceeds the endpoint's limits: nothing is asked then."""
    tokens = budget.prompt_tokens + budget.completion_tokens
    for key, needed, limit in (("max_requests", budget.requests, endpoint.max_requests),
                               ("max_tokens", tokens, endpoint.max_tokens)):
        if limit is not None and needed > limit:
            raise UserError(f"{section} would need {budget.words(endpoint)}, more than {section}.{key} = {limit:,} "
                            f"allows; nothing was asked; raise the limit or {remedy}")
