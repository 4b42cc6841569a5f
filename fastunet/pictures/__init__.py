"""What people look at: outlined slices, training curves, a network's drawing and table, the demo's report.

Imports the architecture, the scores of ``inference`` and matplotlib; nothing that computes imports it.
"""
