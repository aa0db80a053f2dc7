"""Adapters and merged models for stock PEFT and transformers, with cards."""
