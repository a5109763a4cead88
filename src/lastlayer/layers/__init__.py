"""Trainable output layers, one method a file."""
