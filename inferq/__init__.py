"""The command line and the all-in-one ``inferq up``: the only package that knows every role."""

from importlib.metadata import version

__version__ = version("inferq")

__all__ = ["__version__"]
