"""The mathematics: stateless, differentiable functions, one file a family."""
