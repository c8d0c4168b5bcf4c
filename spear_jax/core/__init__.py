"""Ground that every part stands on: errors, settings, shared types, files, the process's
surroundings, the device mesh, random keys.
"""
