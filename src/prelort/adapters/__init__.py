"""`LoraAdapter`, its scale rule, its algebra and its PEFT folder."""

from prelort.adapters.adapter import AdapterSchema, Factors, LoraAdapter, Trained, check_shapes
from prelort.adapters.scale import ScaleRule

__all__ = ["AdapterSchema", "Factors", "LoraAdapter", "ScaleRule", "Trained", "check_shapes"]
