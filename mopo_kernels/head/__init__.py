"""The LM head: log-probabilities and gradients from hidden states, without a [tokens, vocab] tensor."""
