"""Sixty-four lanes as one value, for Numba; importing any of it imports Numba."""
