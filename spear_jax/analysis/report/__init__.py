"""The report page: runs and their traces as tables, figures and one page.

It reads files only, and needs no JAX.
"""
