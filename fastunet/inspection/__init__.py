"""For developers of kernels: the calls and launches of a network, their machine code, counted traffic and tuning.

Imports the operators and their launchers. No user loads it: nothing else imports it but the command line, and the
dispatcher when a search was asked for.
"""
