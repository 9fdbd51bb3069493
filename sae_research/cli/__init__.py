"""The command `python -m sae_research`: its verbs and what they do."""

from sae_research.runtime.errors import require_environment

require_environment()
