"""The primitives under the codecs. ``reference`` is the definition; faster twins must give the same bytes."""
