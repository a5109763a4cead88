"""Two-level softmax over clusters: the Keras thread's benchmark, then quality on a text."""
