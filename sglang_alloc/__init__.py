"""sglang-alloc: an activation budget for the Mixture-of-Experts models that SGLang serves."""

__version__ = "0.1.0"
