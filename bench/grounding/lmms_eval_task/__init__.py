"""Held-out scenes of the grounding benchmark as a task for lmms-eval."""
