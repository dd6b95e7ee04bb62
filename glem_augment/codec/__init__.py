"""Codecs between images and the numbers that a flow models: pixel levels, autoencoders, and resizing."""
