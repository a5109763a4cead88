"""Where Hugging Face Transformers meets this library: another head under a model, and the states that it meets."""

from lastlayer.transformers.after_head import ScaledLogits, hidden_states, logit_map_of, output_layer
from lastlayer.transformers.chunked_loss import chunked_loss, top_predictions
from lastlayer.transformers.deferred_logits import DeferredLogits
from lastlayer.transformers.replace import replace_lm_head
from lastlayer.transformers.replaced_head import ReplacedHead

__all__ = [
    "chunked_loss",
    "DeferredLogits",
    "hidden_states",
    "logit_map_of",
    "output_layer",
    "replace_lm_head",
    "ReplacedHead",
    "ScaledLogits",
    "top_predictions",
]
