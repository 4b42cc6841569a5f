"""The 3×3 convolution with bias, ReLU, skip source, pool and head: forward, data gradient and weight gradient.

``forward`` packs and chooses; ``box``, ``rows``, ``split``, ``first`` and ``pointer`` are its tilings.
"""
