"""Streaming statistics shared by training, set-up and the evaluations. Of the modules `intervals` alone needs no torch."""
