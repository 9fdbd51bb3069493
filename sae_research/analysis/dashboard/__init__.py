"""A static site to look at latents with: no server, no network (docs/dashboards.md)."""
