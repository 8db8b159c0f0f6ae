"""Healing: what is trained, from what, and what it leaves behind."""
