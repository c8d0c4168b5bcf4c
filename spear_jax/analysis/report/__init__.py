"""What `report` writes: runs and their traces -> tables, figures and one page. Reads files only;
needs no JAX.
"""
