"""The objective: labels and multipliers to a target policy, policy steps towards it, and what moves the multipliers."""
