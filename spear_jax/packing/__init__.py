"""Prefix-shared sequence packing: training rows and prompts become arrays of fixed shapes."""
