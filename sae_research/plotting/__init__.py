"""Axes, panels and labels of figures, shared by the report and the analyses."""
