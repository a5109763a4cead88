"""The softmax bottleneck: mixtures and logit maps against the plain softmax."""
