"""Layers whose classes are divided among processes, on `torch.distributed`."""

from lastlayer.distributed.averaging import GradientAverager
from lastlayer.distributed.layer import ShardedLayer
from lastlayer.distributed.screened import ShardedScreen
from lastlayer.distributed.shard import shard
from lastlayer.functional.sent_bytes import count_bytes

__all__ = ["GradientAverager", "ShardedLayer", "ShardedScreen", "count_bytes", "shard"]
