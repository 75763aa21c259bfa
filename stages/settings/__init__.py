"""The settings of every stage, each declared once: name, type, default, bounds and what it means.

One module per stage holds its frozen configuration. The command line makes options of them, the history writes them
down, the stages compute with them. Nothing here imports numpy or torch at the top, so that `edgetrain --help` can read
all of it in no time.
"""
