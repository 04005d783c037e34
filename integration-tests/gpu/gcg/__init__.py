"""Measures a running gcgroup on one GPU through its control files."""
