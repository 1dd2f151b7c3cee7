"""Mimir: autoregressive language-model inference between parties who do not trust one another."""

__version__ = "0.1.0"
