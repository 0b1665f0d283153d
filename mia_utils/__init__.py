"""Membership inference on visual models: attacks, controls, protocol and figures of four papers."""

__version__ = "0.1.0"
