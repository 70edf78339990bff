"""Causal models as policies: loading, tokenizing, adapters, sampling."""
