"""Ground that every part stands on: errors, settings, shared types, the device mesh, random keys."""
