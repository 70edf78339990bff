"""Tandem's front door: the command line, the doctor and the demo. No other room imports it."""

__version__ = "0.1.0"
