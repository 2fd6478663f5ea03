"""The feedback controller: latency SLOs in, activation budgets out. Needs no torch and no SGLang."""
