"""Batch, instance and group norm with the activation and the max-pool behind it, and their gradient."""
