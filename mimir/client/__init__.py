"""What a client needs, and nothing a party has: connections to the three parties, sessions, and provisioning.

`federation` says who the parties are; `connection` is one sealed connection; `session` turns a prompt into
masked offsets and checked shares into tokens; `provision` shares a model; `commands` is the command line.
"""
