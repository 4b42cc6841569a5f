"""Fault campaigns: hostile files, kills, full disks, two processes at once, wrong arguments, long runs.

``python -m tests.faults`` runs them whole and writes ``docs/reliability.md``; pytest runs a quick version of each.
"""
