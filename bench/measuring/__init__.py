"""How it is measured: machine, ceilings, floors, gate, interleaved timing, memory, and the rows that are kept."""
