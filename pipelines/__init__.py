"""Pipelines in the shape diffusers users know, over the core's sessions."""

from streamgen.pipelines.streaming import StreamingVideoPipeline

__all__ = ["StreamingVideoPipeline"]
