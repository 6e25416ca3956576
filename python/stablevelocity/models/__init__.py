"""Models of the velocity field."""

from .sit import SiT, load_public_state_dict, sit

__all__ = ["SiT", "load_public_state_dict", "sit"]
