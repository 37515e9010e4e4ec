"""Callbacks: when, on which layers and images; they keep the model undisturbed, and leave the numbers to `functional`."""
