"""A trained network at work: frozen copies that keep packed weights or CUDA graphs, and segmentation of whole cases.

Imports the network, its operators, ``fastunet.data``, metrics and, of training, what reads checkpoints and sets the
precision; nothing of the command line or inspection.
"""
