"""The command `python -m sae_research`: its verbs and what they do."""
