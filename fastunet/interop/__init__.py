"""Networks and weights of other libraries, in and out.

Imports the network and its operators; the other libraries are imported at the call that needs them.
"""
