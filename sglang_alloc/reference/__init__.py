"""Offline story, step 0: a small trained MoE that any machine can retrain, calibrate and serve."""
