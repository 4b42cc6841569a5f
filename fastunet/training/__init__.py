"""Learning from volumes: the loop, its configuration, checkpoints and log, on one process or several.

Imports the network, losses, metrics and ``fastunet.data``; nothing of the command line.
"""
