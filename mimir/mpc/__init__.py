"""Secure computation: shares, the correlations they consume, and the operations built on both."""
