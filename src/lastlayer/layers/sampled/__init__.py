"""Layers that are a full softmax once trained, and in training compute the logits of a sample of the classes."""
