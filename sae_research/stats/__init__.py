"""Sums over tokens, intervals and tests, solvers: what training, setup and the evaluations share. `intervals` needs no torch."""
