"""Codecs of one level for each element."""
