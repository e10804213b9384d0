"""Fused, memory-flat operations for multi-objective preference optimisation (MOPO, arXiv 2505.10892)."""

from mopo_kernels.logprob import linear_logprob, sequence_logprob, token_logprob

__all__ = ["linear_logprob", "sequence_logprob", "token_logprob"]
