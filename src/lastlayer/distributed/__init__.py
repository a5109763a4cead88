"""Layers whose classes are divided among processes, on `torch.distributed`."""

from lastlayer.distributed.averaging import GradientAverager
from lastlayer.distributed.collectives import count_bytes
from lastlayer.distributed.layer import ShardedLayer
from lastlayer.distributed.screened import ShardedScreen
from lastlayer.distributed.shard import shard

__all__ = ["GradientAverager", "ShardedLayer", "ShardedScreen", "count_bytes", "shard"]
