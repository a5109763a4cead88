"""Where Hugging Face Transformers meets this library: another head under a model, and the states that it meets."""

from lastlayer.transformers.hidden_states import hidden_states
from lastlayer.transformers.replace import ReplacedHead, replace_lm_head

__all__ = ["ReplacedHead", "hidden_states", "replace_lm_head"]
