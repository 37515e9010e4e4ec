"""Callbacks: when, on which layers and images; they keep the model undisturbed. The numbers come from `functional`."""
