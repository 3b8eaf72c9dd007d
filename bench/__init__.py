"""Measurements: speed/, answers in grounding/, their records in results/, and pages/ made from these."""
