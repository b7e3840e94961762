"""Codecs of two thin factors."""
