"""The guard of all callbacks; it stands in `functional`, whose functions need it too."""

from lightning_interp.functional.undisturbed import generators_kept, shapeless, tensors_to, undisturbed

__all__ = ["generators_kept", "shapeless", "tensors_to", "undisturbed"]
