"""Samplers: which classes stand in for all of them in one training step, and how often each is expected."""
