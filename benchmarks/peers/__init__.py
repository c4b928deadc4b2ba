"""The systems that the CPU table compares, each in a worker process of its own: how they are installed, started, asked.

`*_worker.py` are scripts that run under their own system's Python and import only that system, the standard library and
`protocol.py`; everything else here runs in the project's environment.
"""
