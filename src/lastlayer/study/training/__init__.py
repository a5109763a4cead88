"""Training a small language model under any output layer, within a budget, resumable."""
