"""Measurements of this project, beside what exists."""

from sae_research.runtime.errors import require_environment

require_environment()
