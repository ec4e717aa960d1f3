"""A dispatcher lends the address of the process behind it, so that the next requests need not pass through it.

Its answers name a path in the header. Who GETs that path hears a line, the address, and then nothing: the answer ends
when the process does, and while it is read, the process is in use and not stopped for idleness. Nothing rests on it:
a request that fails at the address goes to the dispatcher.
"""

HEADER = "knapper-lease"
PATH = "/lease"
ADDRESSES = "http://127.0.0.1:"  # with which every address begins that is lent
