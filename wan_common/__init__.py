"""Shared rooms of the Wan 2.1 TPU pipeline: each module's name says what belongs in it.

Importing this package imports nothing heavy: the stage scripts decide whether there is work to do before torch or JAX load.
"""
