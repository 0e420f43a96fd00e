"""Nodes for ComfyUI: copy or link this folder into ComfyUI's `custom_nodes`, and install doodl_fast beside it.

They follow ComfyUI's interface for custom nodes (https://docs.comfy.org/custom-nodes/backend/server_overview). They
were tested by calling them as that page describes, and not in a running ComfyUI.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
