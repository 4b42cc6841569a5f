"""A trained network at work: frozen copies that keep packed weights or CUDA graphs, and segmentation of whole cases.

Imports the network, its operators and ``fastunet.data``; nothing of training, the command line or inspection.
"""
