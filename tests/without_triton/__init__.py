"""What ``PYTHONPATH=tests/without_triton`` hides Triton from: Python and its children."""
