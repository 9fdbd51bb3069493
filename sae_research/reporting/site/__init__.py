"""The results site: one folder that opens from disk, drawn from the same run as METRICS.md and the figures."""
