"""The version, in one place: the build, `lightning_interp.__version__` and the changelog's top entry agree with it."""

__version__ = "0.1.0"
